"""Waiting for a word of shared memory to change: spin briefly, then sleep, until a deadline.

    seen = word                       1 the value when the waiter found nothing to do
    spin while word == seen           2 both processes awake: under 1 us after the change
    register as asleep, under lock    3 whoever changes the word next knows that it must wake
    futex wait(seen)                  4 returns at once if the word changed between 3 and 4

No wake-up is lost. A change after step 3 sees the registration and wakes. A change before step 3
is seen by step 3, which checks again under the lock. Between 3 and 4 the kernel compares. A waker
that dies between its change and its wake-up costs the sleeper at most `futex.LONGEST_SLEEP`.

Spinning reads the word without the lock. That is right on every processor: the value is only a
hint to check again under the lock, whose system calls order the memory.

What it does not do: keep an order among waiters, or know what they wait for.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import time
from collections.abc import Callable

from shmblocks._os.futex import Futex
from shmblocks._os.futex_asyncio import LoopWaiters
from shmblocks.errors import PoolClosedError

# Seconds to spin at most. Smaller: a partner that answers within that time finds us asleep, which
# costs both a system call and a wake-up of some 50 us (measured on two processors, a message 200 us
# after the last: there after 39 us instead of 9, and the put takes 15 us instead of 4). Larger: a
# processor is kept busy for nothing.
LONGEST_SPIN = 500e-6
# Seconds to which the budget falls while messages are too rare for spinning.
SHORTEST_SPIN = 5e-6
# Reads of the word between two moments at which the interpreter's lock is offered to other threads,
# and the processor to other processes. Smaller: more system calls in a spin. Larger: the others
# wait longer.
READS = 64

# Called through a CDLL, which gives up the interpreter's lock. Not `time.sleep(0)`: CPython calls
# clock_nanosleep(2), which sleeps for the timer slack of 50 us (measured: 70 us, against 0.5 us),
# much longer than most waits.
_sched_yield = ctypes.CDLL(None).sched_yield


class Spinner:
    """Spins for as long as that would have paid lately; never on a machine of one processor.

    A process that is pinned to one processor does spin: its partners run elsewhere, or get the
    processor at each `sched_yield`.
    """

    def __init__(self, longest: float = LONGEST_SPIN) -> None:
        """`longest` in seconds; 0 never spins."""
        self._longest_ns = 0 if os.cpu_count() == 1 else max(0, int(longest * 1e9))
        self._budget_ns = self._longest_ns

    def until_changed(self, futex: Futex, seen: int, seconds: float = math.inf) -> bool:
        """True: the word differs from `seen`. False: the budget, or `seconds`, ran out first.

        After False, call `slept` or `gave_up` with what came of the wait.
        """
        budget_ns = min(self._budget_ns, seconds * 1e9)
        return budget_ns > 0 and self._spin(futex, seen, budget_ns)

    def budget_ns(self, seconds: float = math.inf) -> int:
        """How long to spin now, for those who do it themselves; at most `seconds`."""
        return int(min(self._budget_ns, max(0.0, seconds) * 1e9))

    def slept(self, since_ns: int) -> None:
        """Call after a wake-up: if the whole wait was shorter than the longest spin, the budget
        is restored, since spinning on would have paid.

        `since_ns`: when the wait began, spin included, on the monotonic clock.
        """
        if time.monotonic_ns() - since_ns <= self._longest_ns:
            self._budget_ns = self._longest_ns
        else:
            self.gave_up()

    def gave_up(self) -> None:
        """Nothing came: halve the budget."""
        shortest = min(int(SHORTEST_SPIN * 1e9), self._longest_ns)
        self._budget_ns = max(self._budget_ns // 2, shortest)

    def _spin(self, futex: Futex, seen: int, budget_ns: float) -> bool:
        end = time.monotonic_ns() + budget_ns
        while True:
            for _ in range(READS):
                if futex.value != seen:
                    return True
            if time.monotonic_ns() >= end:
                return False
            _sched_yield()


class Sleeper:
    """Waits for one thing (a message, free capacity) in one process, from threads and from asyncio.

    Any number of threads and coroutines may wait at once. The owner of the word gives three
    operations; the first two take the segment's lock themselves:

        register() -> seen    count one more sleeper, and return the word's value; -1: no need to
                              sleep
        give_up(seen)         take that back; True: an attempt would succeed, so wake another
        is_there()            True if an attempt would probably succeed, or if waiting is
                              pointless (closed); takes no lock, never raises

    A wait that ends without being woken (deadline, interrupt, cancelled) passes on a wake-up that
    may have been meant for it.
    """

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

    def budget_ns(self, deadline: float | None) -> int:
        """How long to spin now, for the compiled core, which does it while it tries."""
        return self._spinner.budget_ns(seconds_left(deadline))

    def until_changed(self, deadline: float | None, has_spun_ns: int = 0) -> bool:
        """True when it is time to try again; False when the deadline has passed.

        `has_spun_ns`: the caller has spun for so long already, just now.
        """
        futex, spinner = self._futex, self._spinner
        # Read the word first: an item that arrived earlier is seen by is_there(), one that arrives
        # later changes the word.
        seen = futex.value
        if self._is_there():
            return True
        began = time.monotonic_ns() - has_spun_ns
        if not has_spun_ns and spinner.until_changed(futex, seen, seconds_left(deadline)):
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
        """`until_changed` for asyncio. It does not spin."""
        left = seconds_left(deadline)
        if left <= 0:
            return False
        seen = self._register()
        if seen < 0:
            return True
        changed = False
        process = os.getpid()
        try:
            changed = await self._loops.sleep(seen, None if deadline is None else left)
        finally:
            # (A forked child that drops its parent's coroutines gives up nothing.)
            # Closed meanwhile: there is nothing to give up, and what ends the wait must not be
            # replaced by that error.
            with contextlib.suppress(PoolClosedError):
                if not changed and process == os.getpid() and self._give_up(seen):
                    self._futex.wake(1)
        return changed

    def close(self) -> None:
        """End every wait of this process. Call once the segment is closed: what is tried then
        raises."""
        self._futex.drop()
        self._loops.close()


def seconds_left(deadline: float | None) -> float:
    """Seconds until a moment of the monotonic clock (None: for ever)."""
    return math.inf if deadline is None else deadline - time.monotonic()


def deadline_of(timeout: float | None) -> float | None:
    """The moment `timeout` seconds from now; ValueError for a negative timeout, as in `queue`."""
    if timeout is None:
        return None
    if not timeout >= 0:
        raise ValueError(f"timeout: expected seconds >= 0, got {timeout}")
    return time.monotonic() + timeout
