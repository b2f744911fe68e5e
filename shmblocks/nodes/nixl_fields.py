"""What an agent of NIXL may touch of a pool: its fields, and neither its state nor `aux`."""

from __future__ import annotations

from shmblocks.nodes.agent_process import Fields
from shmblocks.nodes.nixl_agent import is_tcp_only
from shmblocks.pool import BlockPool


def require_fields(pool: BlockPool) -> None:
    """Raises ValueError for a pool that has nothing but `aux`."""
    if not pool.config.fields:
        raise ValueError(f"pool {pool.name}: expected a pool with fields: it has no rows to read")


def fields_of(pool: BlockPool, *, is_written: bool) -> Fields:
    """The fields of a pool, for an agent process: nothing of its state, nor `aux`."""
    layout = pool.state.layout
    start = min(layout.fields.values())
    # Who only reads has no lock, and cannot write even if a peer makes him: but memory is
    # registered for an adapter as writable memory, or not at all.
    is_writable = is_written or not is_tcp_only()
    if is_written:
        file = pool.state.open_for_writer()
    else:
        file = pool.state.locks.open_again("r+b" if is_writable else "rb")
    return Fields(file, start, layout.segment_bytes - start, is_writable)
