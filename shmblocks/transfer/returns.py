"""Giving blocks back, also when that is not possible at once.

A room that ends must not keep blocks, whatever happens while it ends. What was already freed (the
other side took it, or the pool was closed) is not there to be given back. And when the pool's lock
cannot be had in time (its holder is stopped), the blocks are kept in mind and freed later.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from shmblocks.errors import PoolClosedError, PoolTimeoutError, StaleHandleError

if TYPE_CHECKING:
    from shmblocks.handle import BlockHandle
    from shmblocks.pool import BlockPool
    from shmblocks.transfer.pools import Pools


def free_if_there(pool: BlockPool, handle: BlockHandle) -> None:
    """Free the blocks, unless they are free already."""
    try:
        pool.free(handle)
    except (StaleHandleError, PoolClosedError):
        return


class Returns:
    """The blocks of one endpoint that are on their way back. For any thread: results are released
    in whatever thread their user likes."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools
        self._owed: deque[BlockHandle] = deque()

    def free(self, handle: BlockHandle) -> None:
        """Free the blocks now, or at a later `retry`."""
        self._owed.append(handle)
        self.retry()

    def retry(self) -> None:
        """Free what could not be freed before."""
        for _ in range(len(self._owed)):
            try:
                handle = self._owed.popleft()
            except IndexError:
                return  # another thread took it
            try:
                free_if_there(self._pools.of(handle), handle)
            except PoolTimeoutError:
                self._owed.append(handle)
