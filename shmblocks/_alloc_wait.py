"""Waiting for blocks: in the wait queue of the pool, from a thread or from asyncio.

    wait          poll; asleep in between, until this process's wake word changes or it is time
    wait_async    the same from asyncio, one thread for all coroutines of the process

Contract
- First come, first served over all processes and threads; see `_state/wait_queue.py`.
- A wait that ends otherwise than by being served (deadline, cancelled, interrupted) leaves the
  queue and gives back what it may have been served in the same moment.
- A wait that ends without blocks raises `PoolTimeoutError`, which says who holds how many blocks
  for which request since when. One that lasts logs the same, once, as a warning.
"""

from __future__ import annotations

import logging
import time
from typing import NamedTuple

from shmblocks._os.futex import Futex
from shmblocks._os.futex_asyncio import LoopWaiters
from shmblocks._os.wait import seconds_left
from shmblocks._state.counters import Counter
from shmblocks._state.pool_state import AllocRequest, Poll, PoolState
from shmblocks._state.wait_queue import Place
from shmblocks.errors import PoolTimeoutError
from shmblocks.handle import BlockHandle

# Seconds after which a wait says, once, whom it waits for.
SAYS_SO_AFTER = 10.0

_log = logging.getLogger("shmblocks")


class _Wake(NamedTuple):
    """The word that waiters of this process sleep on."""

    slot: int
    futex: Futex
    loops: LoopWaiters


class _Deadline:
    """How long one wait lasts."""

    def __init__(self, state: PoolState, request: AllocRequest, deadline: float | None) -> None:
        self._state = state
        self._request = request
        self._deadline = deadline
        self._started = time.monotonic()
        self._has_said = False

    def seconds_to_sleep(self, poll: Poll) -> float:
        """Seconds to sleep before polling again (a dead process cannot wake us).

        Raises PoolTimeoutError once the deadline has passed. Says once whom a long wait waits for.
        """
        left = seconds_left(self._deadline)
        if left <= 0:
            self._state.count(Counter.ALLOC_TIMEOUTS)
            raise PoolTimeoutError(f"{self._says()}\nfree some, or create a larger pool")
        if not self._has_said and time.monotonic() - self._started > SAYS_SO_AFTER:
            self._has_said = True
            _log.warning("%s", self._says())
        return min(left, poll.longest_sleep)

    def _says(self) -> str:
        return (
            f"{self._state.what}: waited {time.monotonic() - self._started:.1f} s for "
            f"{self._request.num_blocks} consecutive blocks; {self._state.who_holds()}"
        )


class AllocWaiters:
    """The threads and coroutines of this process that wait for blocks; borrows the state."""

    def __init__(self, state: PoolState) -> None:
        self._state = state
        self._wake: _Wake | None = None

    def wait(self, request: AllocRequest, deadline: float | None) -> BlockHandle:
        """Reserve as soon as it is this request's turn and there are blocks."""
        until = _Deadline(self._state, request, deadline)
        place: Place | None = None
        try:
            while True:
                poll = self._state.poll_queue(request, place)
                place = poll.place
                if poll.handle is not None:
                    return poll.handle
                self._wake_of(poll.slot).futex.wait(poll.seen, until.seconds_to_sleep(poll))
        except BaseException:
            self._state.take_back(request.stamp)
            raise

    async def wait_async(self, request: AllocRequest, deadline: float | None) -> BlockHandle:
        """As `wait`, from asyncio."""
        until = _Deadline(self._state, request, deadline)
        try:
            handle = self._state.reserve(request)
            if handle is not None:
                return handle
            place: Place | None = None
            while True:
                poll = self._state.poll_queue(request, place)
                place = poll.place
                if poll.handle is not None:
                    return poll.handle
                seconds = until.seconds_to_sleep(poll)
                await self._wake_of(poll.slot).loops.sleep(poll.seen, seconds)
        except BaseException:
            self._state.take_back(request.stamp)
            raise

    def _wake_of(self, slot: int) -> _Wake:
        """Our wake word; another one after a fork."""
        wake = self._wake
        if wake is None or wake.slot != slot:
            futex = self._state.wake_futex(slot)
            wake = self._wake = _Wake(slot, futex, LoopWaiters(futex, notifies_all=True))
        return wake

    def close(self) -> None:
        """After the state was left: end the waits of this process, let go of the mapping."""
        wake, self._wake = self._wake, None
        if wake is not None:
            wake.futex.drop()
            wake.loops.close()
