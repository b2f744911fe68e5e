"""What the tests of the wait queue share.

- `Waiting` threads (tests/queue/kit.py) ask for blocks; `in_queue(pool, n)` waits until n are
  in it.
- `all_but(pool, free)` is somebody else who has the pool: nobody can be served before it is left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from shmblocks import BlockHandle, BlockPool
from shmblocks import _alloc_wait as waits_module
from shmblocks._state.pool_state import AllocRequest, Poll
from shmblocks._state.wait_queue import Place
from tests.core.pools import BLOCK_SIZE
from tests.queue.kit import PATIENCE, Waiting
from tests.support.children import Channel, Child, fork, wait_until

if TYPE_CHECKING:
    import pytest

TOTAL = 16


def in_queue(pool: BlockPool, count: int) -> None:
    """Wait until so many are in the queue."""
    wait_until(lambda: waiting(pool) == count, f"{count} are in the queue", PATIENCE)


def waiting(pool: BlockPool) -> int:
    return pool.stats().waiters


def reserve(pool: BlockPool, blocks: int, req_id: str | None = None) -> BlockHandle:
    """A reservation that there must be room for."""
    handle = pool.alloc_blocks(blocks, blocks * BLOCK_SIZE, req_id)
    assert handle is not None, f"no room for {blocks} blocks: {pool.stats()}"
    return handle


def wait_for(
    pool: BlockPool, blocks: int, timeout: float | None = PATIENCE, req_id: str | None = None
) -> BlockHandle:
    handle = pool.alloc_blocks(blocks, blocks * BLOCK_SIZE, req_id, timeout=timeout)
    assert handle is not None
    assert handle.num_blocks == blocks
    return handle


@contextlib.contextmanager
def all_but(pool: BlockPool, free: int) -> Iterator[BlockHandle]:
    """Somebody has everything but the last `free` blocks."""
    held = reserve(pool, TOTAL - free, req_id="somebody else")
    try:
        yield held
    finally:
        pool.free(held)


def waiter(pool: BlockPool, blocks: int, position: int) -> Waiting[BlockHandle]:
    """A thread that waits for blocks, and is the `position`-th in the queue."""
    thread = Waiting(lambda: wait_for(pool, blocks))
    in_queue(pool, position)
    return thread


def count_polls(pool: BlockPool, monkeypatch: pytest.MonkeyPatch) -> list[Poll]:
    """Waits poll every few milliseconds, and say at once whom they wait for.

    Gives a list that grows with every poll in vain.
    """
    monkeypatch.setattr(waits_module, "SAYS_SO_AFTER", 0.0)
    polls: list[Poll] = []
    poll_queue = pool.state.poll_queue

    def counted(request: AllocRequest, place: Place | None = None) -> Poll:
        poll = poll_queue(request, place)._replace(longest_sleep=0.002)
        if poll.handle is None:
            polls.append(poll)
        return poll

    monkeypatch.setattr(pool.state, "poll_queue", counted)
    return polls


def wait_there(channel: Channel, pool: BlockPool, blocks: int, keeps: bool) -> int:
    """In a child: wait, say so when served, and give back when told (or never)."""
    channel.say("waiting")
    handle = wait_for(pool, blocks, 3 * PATIENCE, req_id="over there")
    channel.say("served")
    if not keeps:
        channel.hear("give back")
        pool.free(handle)
    return handle.num_blocks


def child_waiter(pool: BlockPool, blocks: int, position: int, *, keeps: bool = False) -> Child:
    """A process that waits for blocks, and is the `position`-th in the queue."""
    child = fork(wait_there, pool, blocks, keeps)
    child.hear("waiting")
    in_queue(pool, position)
    return child
