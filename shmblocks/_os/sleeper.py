"""Waiting for a word of a segment as `waiting.py` draws it, from a thread or from asyncio.

One `Sleeper` stands for one thing to wait for (a message, room) in one process. What is particular
to it are three operations, of which the first two take the segment's lock:

    register() -> seen    count one more asleep and give the word's value; -1: no need to sleep
    give_up(seen)         take that back; True: what is waited for is there, wake another
    is_there()            whether there seems to be what is waited for, or it is no use to wait

A wait that ends otherwise than by being woken (deadline, interrupt, cancelled) hands a wake-up that
may have been its own to the next.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable

from shmblocks._os.futex import Futex
from shmblocks._os.futex_asyncio import LoopWaiters
from shmblocks._os.wait import Spinner, seconds_left
from shmblocks.errors import ShmBlocksError


class Sleeper:
    """Waits for one word; any number of threads and coroutines may wait at once."""

    def __init__(
        self,
        futex: Futex,
        register: Callable[[], int],
        give_up: Callable[[int], bool],
        is_there: Callable[[], bool],
        spin: float,
    ) -> None:
        """`spin`: seconds to spin before sleeping."""
        self._futex = futex
        self._register = register
        self._give_up = give_up
        self._is_there = is_there
        self._spinner = Spinner(spin)
        self._loops = LoopWaiters(futex, is_there=is_there)

    def until_changed(self, deadline: float | None) -> bool:
        """True when it is time to look again; False when the deadline has passed."""
        futex, spinner = self._futex, self._spinner
        seen = futex.value
        # In this order: what comes before the word is read is there, what comes after changes it.
        if self._is_there():
            return True
        began = time.monotonic_ns()
        if spinner.until_changed(futex, seen, seconds_left(deadline)):
            return True
        if seconds_left(deadline) > 0:
            seen = self._register()
            if seen < 0 or self._sleep(seen, deadline):
                spinner.slept(began)
                return True
        spinner.gave_up()
        return False

    def _sleep(self, seen: int, deadline: float | None) -> bool:
        changed = False
        try:
            while not changed:
                left = seconds_left(deadline)
                if left <= 0:
                    return False
                self._futex.wait(seen, left)
                changed = self._futex.value != seen & 0xFFFFFFFF
        finally:
            if not changed and self._give_up(seen):
                self._futex.wake(1)
        return True

    async def until_changed_async(self, deadline: float | None = None) -> bool:
        """As `until_changed`, from asyncio; it never spins."""
        left = seconds_left(deadline)
        if left <= 0:
            return False
        seen = self._register()
        if seen < 0:
            return True
        changed = False
        process = os.getpid()
        try:
            await self._loops.sleep(seen, None if deadline is None else left)
            changed = self._futex.value != seen & 0xFFFFFFFF
        finally:
            # Cancelled, or nothing came in time. (A forked child that drops its parent's
            # coroutines gives up nothing.) When the queue was closed meanwhile there is nothing to
            # give up, and what ends the wait must not be replaced by that.
            if not changed and process == os.getpid():
                with contextlib.suppress(ShmBlocksError):
                    self._give_up(seen)
        return True

    def close(self) -> None:
        """End the waits of this process's event loops, once nobody can begin another."""
        self._loops.close()
