"""Sleeping on a word of shared memory from asyncio.

A futex cannot be watched by an event loop. One thread per word, for as long as anybody awaits it,
sleeps for all of them and tells their loops (`call_soon_threadsafe`, which writes to the one
descriptor that each loop watches anyway). No thread per waiter, no polling, no descriptor of ours.

The word counts (messages put, messages taken): when it has gone up by n, the n that have waited
longest are told, as a futex would wake them, and the others sleep on.

Contract
- `sleep(seen)` returns when it is time to look again. Ended in any other way (cancelled, closed) it
  leaves nothing behind; one that was told in the same moment hands that on, to the next here or to
  a sleeper elsewhere.
- What was told to one that does not come (its loop stands still, or was closed) is told to the next
  within `futex.LONGEST_SLEEP`, for as long as `is_there` says that there is something to come for.
- A wake-up that finds nobody here any more is handed to a sleeper elsewhere.
- The thread ends by itself when nobody awaits any more. A forked child starts with nobody.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from shmblocks._os.futex import LONGEST_SLEEP, Futex

if TYPE_CHECKING:
    import asyncio

_MASK = 0xFFFFFFFF
# A word that seems to have gone up by more than this has been read before one that was read later.
_HALF = 1 << 31


class _Waiter:
    """One coroutine that waits, and whether it was told to look."""

    __slots__ = ("future", "is_told", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.future: asyncio.Future[None] = loop.create_future()
        self.is_told = False

    def tell(self) -> bool:
        """Called under the lock. False: its loop was closed, nobody will come."""
        self.is_told = True
        try:
            self.loop.call_soon_threadsafe(_settle, self.future)
        except RuntimeError:
            return False
        return True


def _nothing() -> bool:
    return False


class LoopWaiters:
    """Everyone in this process who awaits one word."""

    def __init__(
        self, futex: Futex, *, tells_all: bool = False, is_there: Callable[[], bool] = _nothing
    ) -> None:
        """`tells_all`: each change concerns everyone, whatever the word goes up by.

        `is_there`: whether there seems to be what is waited for; never raises.
        """
        self._futex = futex
        self._tells_all = tells_all
        self._is_there = is_there
        self._start_anew()
        _living.add(self)

    def _start_anew(self) -> None:
        """Nobody waits; in a forked child the thread stayed in the parent, maybe with the lock."""
        # Taken again by the same thread when the collector closes a coroutine in the middle of it.
        self._lock = threading.RLock()
        self._waiters: deque[_Waiter] = deque()
        self._thread: threading.Thread | None = None
        # The word as it was when the last of the waiters were told.
        self._seen = 0

    async def sleep(self, seen: int, timeout: float | None = None) -> None:
        """Return when the word may have gone up since it was `seen`, or after `timeout` seconds."""
        import asyncio  # only for those who use it: it takes longer to import than all of ours

        loop = asyncio.get_running_loop()
        waiter = _Waiter(loop)
        timer = None if timeout is None else loop.call_later(timeout, _settle, waiter.future)
        came = False
        try:
            self._add(waiter, seen)
            await waiter.future
            came = True
        finally:
            self._remove(waiter, came)
            if timer is not None:
                timer.cancel()

    def close(self) -> None:
        """Tell everyone and end the thread."""
        with self._lock:
            self._tell(len(self._waiters))
            thread = self._thread
        if thread is not None:
            self._futex.wake()
            thread.join()

    # ---- who waits ---------------------------------------------------------------------------

    def _add(self, waiter: _Waiter, seen: int) -> None:
        with self._lock:
            if self._thread is not None and 0 < (self._seen - seen) & _MASK < _HALF:
                # Others have looked since it looked, and were told all that had come by then.
                waiter.tell()
                return
            self._notice(seen)
            self._waiters.append(waiter)
            if self._thread is None:
                thread = threading.Thread(target=self._watch, name="shmblocks-waiter", daemon=True)
                thread.start()
                self._thread = thread  # interrupted before: it serves, and ends, all the same

    def _remove(self, waiter: _Waiter, came: bool) -> None:
        with self._lock:
            if not waiter.is_told:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
            elif not came and not self._tell(1):
                self._futex.wake(1)

    # ---- telling -----------------------------------------------------------------------------

    def _notice(self, value: int) -> int:
        """The word is seen to be `value`: tell as many as it has gone up by; how many were told."""
        gone_up = (value - self._seen) & _MASK
        self._seen = value & _MASK
        return self._tell(len(self._waiters) if self._tells_all else gone_up) if gone_up else 0

    def _tell(self, count: int) -> int:
        told = 0
        while told < count and self._waiters:
            told += self._waiters.popleft().tell()
        return told

    def _watch(self) -> None:
        while True:
            with self._lock:
                if not self._waiters:
                    if self._thread is threading.current_thread():
                        self._thread = None
                    return
                seen = self._seen
            self._futex.wait(seen, LONGEST_SLEEP)
            with self._lock:
                self._look()

    def _look(self) -> None:
        value = self._futex.value
        if value < 0:
            self._tell(len(self._waiters))  # dropped: nothing will come any more
        elif value != self._seen:
            if not self._notice(value):
                self._futex.wake(1)
        elif self._is_there():
            self._tell(1)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


# For the fork handler.
_living: weakref.WeakSet[LoopWaiters] = weakref.WeakSet()


def _start_all_anew() -> None:
    for waiters in list(_living):
        waiters._start_anew()


os.register_at_fork(after_in_child=_start_all_anew)
