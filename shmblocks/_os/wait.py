"""Waiting for a word of shared memory to change: spin briefly, then sleep.

    seen = word                       1 what the waiter looked at when it found nothing
    spin while word == seen           2 both sides awake: under a microsecond after the change
    register as asleep, under lock    3 the next who changes the word will know that it must wake
    futex wait(seen)                  4 returns at once when the word changed between 1 and 4

No wake-up is lost: whoever changes the word after 3 sees the registration and wakes; whoever
changed it before 3 is seen by 3 itself, which looks again under the lock; between 3 and 4 the
kernel compares. A waker that dies between its change and its wake-up costs the sleeper at most
`futex.LONGEST_SLEEP`.

Spinning reads the word without the lock. That is right on every processor: what is read is only a
hint to go and look under the lock, whose system calls order the memory.
"""

from __future__ import annotations

import ctypes
import math
import os
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

T = TypeVar("T")

# Seconds to spin at most. Smaller: a partner that answers within that time finds us asleep, which
# costs both a system call and a wake-up of some 50 us (measured on two processors, a message 200 us
# after the last: there after 39 us instead of 9, and the put takes 15 us instead of 4). Larger: a
# processor is kept busy for nothing.
LONGEST_SPIN = 500e-6
# The budget falls to this while messages come too seldom for spinning.
SHORTEST_SPIN = 5e-6
# Looks between two moments at which the interpreter's lock is offered to other threads, and the
# processor to other processes.
LOOKS = 64

# Called through a CDLL, so that it gives up the interpreter's lock. Not `time.sleep(0)`: that is
# clock_nanosleep(2) in CPython, which sleeps for the timer slack of 50 us (seen: 70 us for the one,
# 0.5 us for the other), in which what is waited for has long come.
_sched_yield = ctypes.CDLL(None).sched_yield


class Run(Protocol):
    """Runs an operation under the segment's lock."""

    def __call__(self, body: Callable[..., T], *args: object) -> T: ...


class Word(Protocol):
    """Something whose value can be looked at."""

    @property
    def value(self) -> int: ...


class Spinner:
    """Spins for as long as that would have paid lately; never where there is one processor.

    A process that is pinned to one processor does spin: its partners are elsewhere, or get the
    processor at each `sched_yield`.
    """

    def __init__(self, longest: float = LONGEST_SPIN) -> None:
        """`longest` in seconds; 0 never spins."""
        self._longest_ns = 0 if os.cpu_count() == 1 else max(0, int(longest * 1e9))
        self._budget_ns = self._longest_ns

    def until_changed(self, word: Word, seen: int, seconds: float = math.inf) -> bool:
        """Whether the word came to differ from `seen` before the budget, or `seconds`, ran out.

        When it did not, tell what came of it: `slept`, `gave_up`.
        """
        budget_ns = min(self._budget_ns, seconds * 1e9)
        return budget_ns > 0 and self._spin(word, seen, budget_ns)

    def slept(self, since_ns: int) -> None:
        """Woken after a wait that began then, with its spin: would spinning on have paid?"""
        if time.monotonic_ns() - since_ns <= self._longest_ns:
            self._budget_ns = self._longest_ns
        else:
            self.gave_up()

    def gave_up(self) -> None:
        """Nothing came: spin half as long the next time."""
        shortest = min(int(SHORTEST_SPIN * 1e9), self._longest_ns)
        self._budget_ns = max(self._budget_ns // 2, shortest)

    def _spin(self, word: Word, seen: int, budget_ns: float) -> bool:
        end = time.monotonic_ns() + budget_ns
        while True:
            for _ in range(LOOKS):
                if word.value != seen:
                    return True
            if time.monotonic_ns() >= end:
                return False
            _sched_yield()


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
