"""The pools of one endpoint: its own, and one in host memory that it spills to.

    pool    where everything goes while there is room
    spill   where it goes when `pool` is full: a pool in host memory with the same fields, which
            both sides are attached to; None: then it waits

A handle says by its `pool_id` which of the two it is of, so that what spilled travels in the same
messages as everything else. What arrives in the spill pool while `pool` lies on a GPU is copied to
that GPU: a user gets the same tensors on the same device, whichever way they came.

What it does not do: choose the size of chunks, or wait.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from shmblocks.handle import BlockHandle
    from shmblocks.pool import BlockPool


class Pools:
    """Borrows both."""

    def __init__(self, pool: BlockPool, spill: BlockPool | None) -> None:
        """ValueError, when `pool` cannot spill to `spill`."""
        if spill is not None:
            _check_spill(pool, spill)
        self.own = pool
        self.spill = spill
        # In the order in which they are asked for room.
        self.all = (pool,) if spill is None else (pool, spill)

    @property
    def spill_id(self) -> int:
        """The `pool_id` of the spill pool; 0: there is none."""
        return 0 if self.spill is None else self.spill.pool_id

    def of(self, handle: BlockHandle) -> BlockPool:
        """The pool of a handle; of a foreign one our own, which will refuse it."""
        return self.spill if self.has_spilled(handle) and self.spill is not None else self.own

    def has_spilled(self, handle: BlockHandle) -> bool:
        """Whether the handle is of the spill pool."""
        return self.spill is not None and handle.pool_id == self.spill.pool_id

    def must_move(self, handle: BlockHandle) -> bool:
        """Whether what lies there is to be copied to the device of our own pool."""
        return self.own.config.is_on_gpu and self.has_spilled(handle)

    def alloc(self, num_tokens: int, req_id: str) -> BlockHandle | None:
        """Reserve blocks in the first pool that has room; None: none has."""
        for pool in self.all:
            if num_tokens <= pool.config.total_tokens:
                handle = pool.alloc(num_tokens, req_id=req_id)
                if handle is not None:
                    return handle
        return None

    @property
    def device(self) -> torch.device:
        """Where this process has the fields of its own pool."""
        return self.own.field(self.own.config.fields[0].name).device


def _check_spill(pool: BlockPool, spill: BlockPool) -> None:
    if spill.config.is_on_gpu:
        raise ValueError(
            f"spill: expected a pool in host memory, {spill.name} lies on {spill.config.device}"
        )
    if spill.pool_id == pool.pool_id:
        raise ValueError(f"spill: expected another pool than {pool.name} itself")
    ours, theirs = pool.config, spill.config
    if (ours.fields, ours.block_size) != (theirs.fields, theirs.block_size):
        raise ValueError(
            f"spill: expected a pool with the fields and the block_size of {pool.name}, "
            f"{spill.name} has others: create it with msgspec.structs.replace(pool.config, "
            "device='cpu', total_tokens=...)"
        )
