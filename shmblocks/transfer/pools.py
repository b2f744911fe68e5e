"""The pools of one endpoint: its own, and one in host memory that it spills to.

    pool    where everything goes while it has enough free blocks
    spill   where it goes when `pool` is full: a pool in host memory with the same fields, which
            both sides are attached to; None: it waits instead

The `pool_id` of a handle says which of the two it belongs to, so the messages are the same for
both. What arrives in the spill pool while `pool` lies on a GPU is copied to that GPU: a user gets
the same tensors on the same device either way.

A room that ends must not keep blocks, whatever happens meanwhile. Blocks that are free already (the
other side took them, or the pool was closed) need nothing. When the pool's lock cannot be had in
time (its holder is stopped), they are remembered and freed later.

What it does not do: choose the size of chunks, or wait.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from shmblocks.errors import PoolClosedError, PoolTimeoutError, StaleHandleError

if TYPE_CHECKING:
    import torch

    from shmblocks.handle import BlockHandle
    from shmblocks.pool import BlockPool


class Pools:
    """Borrows both pools. Any thread may call `free`."""

    def __init__(self, pool: BlockPool, spill: BlockPool | None) -> None:
        """Raises ValueError if `pool` cannot spill to `spill`."""
        if spill is not None:
            _check_spill(pool, spill)
        self.own = pool
        self.spill = spill
        # In the order in which they are asked for blocks.
        self.all = (pool,) if spill is None else (pool, spill)
        self.spill_id = 0 if spill is None else spill.pool_id
        self._to_free: deque[BlockHandle] = deque()

    def of(self, handle: BlockHandle) -> BlockPool:
        """The pool a handle belongs to; for a foreign handle our own pool, which raises."""
        return self.spill if self.has_spilled(handle) and self.spill is not None else self.own

    def has_spilled(self, handle: BlockHandle) -> bool:
        """Whether the handle belongs to the spill pool."""
        return self.spill is not None and handle.pool_id == self.spill_id

    def must_move(self, handle: BlockHandle) -> bool:
        """Whether the blocks must be copied to the device of our own pool."""
        return self.own.config.is_on_gpu and self.has_spilled(handle)

    def alloc(self, num_tokens: int, req_id: str) -> BlockHandle | None:
        """Reserve blocks in the first pool that can serve it now; None: neither can."""
        for pool in self.all:
            if num_tokens <= pool.config.total_tokens:
                handle = pool.alloc(num_tokens, req_id=req_id)
                if handle is not None:
                    return handle
        return None

    def free(self, handle: BlockHandle) -> None:
        """Free the blocks now, or in a later `retry_free`."""
        self._to_free.append(handle)
        self.retry_free()

    def retry_free(self) -> None:
        """Free the blocks that could not be freed before."""
        for _ in range(len(self._to_free)):
            try:
                handle = self._to_free.popleft()
            except IndexError:
                return  # another thread took it
            try:
                self.of(handle).free(handle)
            except (StaleHandleError, PoolClosedError):
                continue  # they are free already
            except PoolTimeoutError:
                self._to_free.append(handle)

    def who_holds(self) -> str:
        """Who holds how many blocks of each pool, for which request, since when."""
        return "\n".join(f"pool {pool.name}: {pool.state.who_holds()}" for pool in self.all)

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
            f"spill: expected the fields and the block_size of {pool.name}, {spill.name} has "
            "others: create it with msgspec.structs.replace(pool.config, device='cpu', "
            "total_tokens=...)"
        )
