"""Sleeping on a word of shared memory from asyncio.

A futex cannot be watched by an event loop. One thread per word, for as long as anybody awaits it,
sleeps for all of them and tells their loops (`call_soon_threadsafe`, which writes to the one
descriptor that each loop watches anyway). No thread per waiter, no polling, no descriptor of ours.

The word counts (messages put, messages taken): when it has gone up by n, the n that have waited
longest are told, as a futex would wake them, and the others sleep on.

Contract
- `sleep(seen)` returns when it is time to look again. Cancelling it leaves nothing behind; one that
  was told in the same moment hands that on to the next.
- The thread ends by itself when nobody awaits any more.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import TYPE_CHECKING

from shmblocks.futex import LONGEST_SLEEP, Futex

if TYPE_CHECKING:
    import asyncio

    _Waiter = tuple[asyncio.AbstractEventLoop, "asyncio.Future[None]"]

_MASK = 0xFFFFFFFF


class LoopWaiters:
    """Everyone in this process who awaits one word."""

    def __init__(self, futex: Futex, *, tells_all: bool = False) -> None:
        """`tells_all`: each change concerns everyone, whatever the word goes up by."""
        self._futex = futex
        self._tells_all = tells_all
        self._lock = threading.Lock()
        self._waiters: deque[_Waiter] = deque()
        self._seen = 0
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()

    async def sleep(self, seen: int) -> None:
        """Return when the word may have gone up since it was `seen`."""
        import asyncio  # only for those who use it: it takes longer to import than all of ours

        loop = asyncio.get_running_loop()
        waiter: _Waiter = (loop, loop.create_future())
        with self._lock:
            self._forget_parent()
            self._notice(seen)
            self._waiters.append(waiter)
            self._watch_from_now()
        try:
            await waiter[1]
        except asyncio.CancelledError:
            with self._lock:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
                else:
                    self._tell(1)
            raise

    def close(self) -> None:
        """Tell everyone and end the thread."""
        with self._lock:
            self._tell(len(self._waiters))
            thread = self._thread
        if thread is not None and self._pid == os.getpid():
            self._futex.wake()
            thread.join()

    def _notice(self, value: int) -> None:
        """The word is seen to be `value`: tell as many as it has gone up by."""
        gone_up = (value - self._seen) & _MASK
        if gone_up:
            self._tell(len(self._waiters) if self._tells_all else gone_up)
        self._seen = value & _MASK

    def _tell(self, count: int) -> None:
        for _ in range(min(count, len(self._waiters))):
            loop, future = self._waiters.popleft()
            if not loop.is_closed():
                loop.call_soon_threadsafe(_settle, future)

    def _watch_from_now(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._watch, name="shmblocks-waiter", daemon=True
            )
            self._thread.start()

    def _watch(self) -> None:
        while True:
            with self._lock:
                if not self._waiters:
                    self._thread = None
                    return
                seen = self._seen
            self._futex.wait(seen, LONGEST_SLEEP)
            with self._lock:
                self._notice(self._futex.value)

    def _forget_parent(self) -> None:
        """In a forked child the thread and the waiters stayed in the parent."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._waiters.clear()
            self._thread = None


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
