"""Who has the blocks that somebody waits for: the part of a timeout's message that names names."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shmblocks._state.info import AllocationInfo, LeaseInfo
    from shmblocks.pool import BlockPool

# Allocations that are named. Smaller: the one that matters may be left out. Larger: a full pool
# makes a message that nobody reads.
MOST_NAMED = 12


def who_holds_blocks(pool: BlockPool) -> str:
    """The largest allocations: who holds how many blocks for which request since when."""
    config = pool.config
    held = sorted(pool.allocations(), key=lambda info: info.num_blocks, reverse=True)
    free = config.total_blocks - sum(info.num_blocks for info in held)
    lines = [f"pool {pool.name}: {free} of {config.total_blocks} blocks are free; held are"]
    lines += [f"  {_line(info)}" for info in held[:MOST_NAMED]]
    if len(held) > MOST_NAMED:
        lines.append(f"  and {len(held) - MOST_NAMED} smaller allocations")
    return "\n".join(lines)


def _line(info: AllocationInfo) -> str:
    owner = info.owner or f"participant {info.owner_id.slot} (gone)"
    request = f" for request {info.req_id!r}" if info.req_id else ""
    last = info.start_block + info.num_blocks - 1
    return (
        f"{info.num_blocks} blocks ({info.start_block} to {last}, {info.state}) by {owner}"
        f"{request} since {info.age_seconds:.1f} s{''.join(map(_lease, info.leases))}"
    )


def _lease(lease: LeaseInfo) -> str:
    holder = lease.holder or f"participant {lease.holder_id.slot} (gone)"
    return f", {lease.kind} under a lease of {holder} since {lease.age_seconds:.1f} s"
