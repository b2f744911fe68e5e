"""Sleeping on a word of shared memory from asyncio.

An event loop cannot watch a futex. One thread per word, for as long as a coroutine awaits it,
sleeps for all of them and notifies their loops (`call_soon_threadsafe`, which writes to the one
descriptor that each loop watches anyway). No thread per waiter, no polling, no descriptor of ours.

The word counts (messages put, messages taken). When it goes up by n, the n coroutines that have
waited longest are notified, as a futex would wake them, and the others sleep on.

Contract
- `sleep(seen)` returns when it is time to try again. Ended in any other way (cancelled, closed) it
  leaves nothing behind. If it was notified in the same moment, it passes that on: to the next
  coroutine here, or to a sleeper of another process.
- If a notified coroutine does not run (its loop is blocked or closed), the next one is notified
  within `futex.LONGEST_SLEEP`, for as long as `is_there` says that an attempt would succeed.
- A wake-up that finds no coroutine here any more is passed on to a sleeper of another process.
- The thread ends by itself when no coroutine awaits any more. A forked child starts with none.
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
# Modulo 2**32: a difference above half the range means that the values were read out of order.
_HALF = 1 << 31


class _Waiter:
    """One coroutine that waits, and whether it was notified."""

    __slots__ = ("future", "is_notified", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.future: asyncio.Future[None] = loop.create_future()
        self.is_notified = False

    def notify(self) -> bool:
        """Called under the lock. False: its loop was closed, it will not run."""
        self.is_notified = True
        try:
            self.loop.call_soon_threadsafe(_wake_up, self.future)
        except RuntimeError:
            return False
        return True


def _nothing() -> bool:
    return False


class LoopWaiters:
    """The coroutines of this process that await one word."""

    def __init__(
        self, futex: Futex, *, notifies_all: bool = False, is_there: Callable[[], bool] = _nothing
    ) -> None:
        """`notifies_all`: each change concerns every coroutine, whatever the word goes up by.

        `is_there`: whether an attempt would probably succeed; never raises.
        """
        self._futex = futex
        self._notifies_all = notifies_all
        self._is_there = is_there
        self._reset()
        _living.add(self)

    def _reset(self) -> None:
        """No coroutine waits. In a forked child: the thread stayed in the parent, maybe with the
        lock."""
        # Re-entrant: the collector may close a coroutine while its thread holds the lock.
        self._lock = threading.RLock()
        self._waiters: deque[_Waiter] = deque()
        self._thread: threading.Thread | None = None
        # The word when waiters were last notified.
        self._seen = 0

    async def sleep(self, seen: int, timeout: float | None = None) -> bool:
        """True: the word may have gone up since it was `seen`. False: `timeout` seconds passed."""
        import asyncio  # only for those who use it: it takes longer to import than all of ours

        loop = asyncio.get_running_loop()
        waiter = _Waiter(loop)
        timer = None if timeout is None else loop.call_later(timeout, _wake_up, waiter.future)
        came = False
        try:
            self._add(waiter, seen)
            await waiter.future
            came = True
        finally:
            self._remove(waiter, came)
            if timer is not None:
                timer.cancel()
        # Read after the removal: from then on it is not notified any more.
        return waiter.is_notified

    def close(self) -> None:
        """Notify every coroutine, and end the thread."""
        with self._lock:
            self._notify(len(self._waiters))
            thread = self._thread
        if thread is not None:
            self._futex.wake()
            thread.join()

    # ---- who waits ---------------------------------------------------------------------------

    def _add(self, waiter: _Waiter, seen: int) -> None:
        with self._lock:
            if self._thread is not None and 0 < (self._seen - seen) & _MASK < _HALF:
                # Others have read the word since, and were notified of all that had come by then.
                waiter.notify()
                return
            self._notice(seen)
            self._waiters.append(waiter)
            if self._thread is None:
                thread = threading.Thread(target=self._watch, name="shmblocks-waiter", daemon=True)
                thread.start()
                self._thread = thread  # if interrupted before, it serves and ends all the same

    def _remove(self, waiter: _Waiter, came: bool) -> None:
        with self._lock:
            if not waiter.is_notified:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
            elif not came and not self._notify(1):
                self._futex.wake(1)

    # ---- notifying ---------------------------------------------------------------------------

    def _notice(self, value: int) -> int:
        """The word is `value`: notify as many as it has gone up by. Returns how many."""
        gone_up = (value - self._seen) & _MASK
        self._seen = value & _MASK
        return self._notify(len(self._waiters) if self._notifies_all else gone_up) if gone_up else 0

    def _notify(self, count: int) -> int:
        notified = 0
        while notified < count and self._waiters:
            notified += self._waiters.popleft().notify()
        return notified

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
                self._check()

    def _check(self) -> None:
        value = self._futex.value
        if value < 0:
            self._notify(len(self._waiters))  # dropped: the word will not change any more
        elif value != self._seen:
            if not self._notice(value):
                self._futex.wake(1)
        elif self._is_there():
            self._notify(1)


def _wake_up(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


# For the fork handler.
_living: weakref.WeakSet[LoopWaiters] = weakref.WeakSet()


def _reset_all() -> None:
    for waiters in list(_living):
        waiters._reset()


os.register_at_fork(after_in_child=_reset_all)
