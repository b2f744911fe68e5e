"""Everything in the benchmark that rests on what is private in shmblocks."""

from __future__ import annotations

import fcntl
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from shmblocks._state.bitmap import find_zeros
from shmblocks._state.journal import Journal, Store

__all__ = ["find_zeros", "lock_holds", "without_journal"]


@contextmanager
def without_journal() -> Iterator[None]:
    """Make the stores of each change at once, instead of through the journal."""
    commit = Journal.commit

    def at_once(journal: Journal, stores: list[Store]) -> None:
        memory = journal._memory
        for offset, data in stores:
            memory[offset : offset + len(data)] = data

    Journal.commit = at_once  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        Journal.commit = commit  # type: ignore[method-assign]


@contextmanager
def lock_holds() -> Iterator[list[int]]:
    """Nanoseconds of each time that this process holds a pool's lock, as they come to be.

    The lock is an flock. While this is open, a timed one stands under every name that shmblocks
    has for it.
    """
    flock = fcntl.flock
    holds: list[int] = []
    entered = 0

    def timed(file: int | IO[bytes], operation: int) -> None:
        nonlocal entered
        if operation & fcntl.LOCK_UN:
            holds.append(time.perf_counter_ns() - entered)
        flock(file, operation)
        entered = time.perf_counter_ns()

    modules = [
        module
        for name, module in list(sys.modules.items())
        if module is fcntl or name.partition(".")[0] == "shmblocks"
    ]
    names = [
        (module, name)
        for module in modules
        for name, value in list(vars(module).items())
        if value is flock
    ]
    for module, name in names:
        setattr(module, name, timed)
    try:
        yield holds
    finally:
        for module, name in names:
            setattr(module, name, flock)
