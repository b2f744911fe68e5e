"""What the processes of a soak share outside of the pool: counters, and a flag that it is over.

They lie in memory that is shared by fork, one 8-byte word per counter and worker: a worker that is
killed loses none. Violations are written to a file per worker.
"""

from __future__ import annotations

import enum
import mmap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Count(enum.IntEnum):
    """What is counted."""

    OPERATIONS = 0
    PAYLOADS = 1
    TRANSFERS = 2
    RESUMED = 3
    PEER_DEATHS = 4
    STALE = 5
    NO_FREE_BLOCKS = 6
    TIMEOUTS = 7
    REATTACHED = 8
    WORST_WAIT = 9  # ns, without the time in which a worker was stopped
    WORST_NOTICE = 10  # ns from the kill of a peer to the failure of its room
    VIOLATIONS = 11
    CACHE_HITS = 12


_PRIVATE = 16  # words per worker
# Words of the whole soak, after those of the workers.
_OVER, _STOPS, _STOPPED_NOW, _KILLED_AT = range(4)


class Counters:
    """The counters of all workers."""

    def __init__(self, workers: int, folder: Path) -> None:
        self._workers = workers
        self._folder = folder
        self._memory = mmap.mmap(-1, (workers * _PRIVATE + 8 + workers) * 8)
        self._words = memoryview(self._memory).cast("q")
        self._common = workers * _PRIVATE

    def add(self, worker: int, count: Count, amount: int = 1) -> None:
        """Count something."""
        self._words[worker * _PRIVATE + count] += amount

    def raise_to(self, worker: int, count: Count, value: int) -> None:
        """Keep the larger."""
        index = worker * _PRIVATE + count
        self._words[index] = max(self._words[index], value)

    def total(self, count: Count) -> int:
        """Over all workers: the sum, or the largest of what is kept as such."""
        values = [self._words[worker * _PRIVATE + count] for worker in range(self._workers)]
        return max(values) if count in (Count.WORST_WAIT, Count.WORST_NOTICE) else sum(values)

    def violation(self, worker: int, text: str) -> None:
        """Something that must never be."""
        self.add(worker, Count.VIOLATIONS)
        with open(self._folder / f"violations-{worker}", "a") as file:
            file.write(text.replace("\n", "\n    ") + "\n")

    def violations(self) -> list[str]:
        """All that were written."""
        return [
            line
            for path in sorted(self._folder.glob("violations-*"))
            for line in path.read_text().splitlines()
        ]

    @property
    def is_over(self) -> bool:
        """Whether workers are to finish."""
        return bool(self._words[self._common + _OVER])

    def finish(self) -> None:
        """Ask the workers to finish."""
        self._words[self._common + _OVER] = 1

    @contextmanager
    def worker_stopped(self) -> Iterator[None]:
        """While this is open, waits do not count: the stopped worker may hold the lock."""
        self._words[self._common + _STOPS] += 1
        self._words[self._common + _STOPPED_NOW] = 1
        try:
            yield
        finally:
            self._words[self._common + _STOPPED_NOW] = 0
            self._words[self._common + _STOPS] += 1

    @contextmanager
    def timed(self, worker: int) -> Iterator[None]:
        """An operation that must not take long, whichever worker dies meanwhile."""
        stops = self._words[self._common + _STOPS]
        stopped = self._words[self._common + _STOPPED_NOW]
        started = time.monotonic_ns()
        yield
        took = time.monotonic_ns() - started
        self.add(worker, Count.OPERATIONS)
        if not stopped and stops == self._words[self._common + _STOPS]:
            self.raise_to(worker, Count.WORST_WAIT, took)

    def note_kill(self, worker: int) -> None:
        """Worker is about to be killed."""
        self._words[self._common + 8 + worker] = time.monotonic_ns()

    def killed_at(self, worker: int) -> int:
        """When the worker was last killed, monotonic ns; 0: never."""
        return self._words[self._common + 8 + worker]
