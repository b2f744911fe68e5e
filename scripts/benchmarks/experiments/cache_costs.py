"""What the content cache costs by its number of entries: find, get and release, put, eviction.

Everything in one process, through the public calls. Entries are of one block, in a pool that has
as many blocks as entries and a tenth more, so that nothing is evicted but in the last column. The
operations of all sizes are done in turns, so that a noisy moment of the machine meets all.
"""

from __future__ import annotations

import contextlib
import secrets
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

from benchmarks.report import Experiment
from shmblocks import UNBOUNDED, BlockPool, PoolConfig, content_key

# Operations of one size before the next one has its turn.
TURN = 20


class _Subject:
    """A pool of so many entries, and what is measured on it."""

    def __init__(self, entries: int) -> None:
        blocks = entries + entries // 10 + 16
        config = PoolConfig(total_tokens=blocks, block_size=1, default_num_blocks=1)
        self.pool = BlockPool.create(f"bench-{secrets.token_hex(4)}", config, prefault="off")
        self.entries = entries
        self.keys = [content_key(b"bench", str(number)) for number in range(entries)]
        for key in self.keys:
            self._publish(key)
        self._next = 0
        self._fresh = 0
        self._others: list[bytes] = []

    def _publish(self, key: bytes) -> None:
        with self.pool.reserve(1) as reservation:
            reservation.publish(readers=UNBOUNDED, key=key)

    def _key(self) -> bytes:
        self._next = (self._next + 7919) % self.entries
        return self.keys[self._next]

    def find(self) -> None:
        self.pool.find(self._key())

    def miss(self) -> None:
        self.pool.get(b"not there".ljust(16))

    def get(self, leases: int) -> None:
        for lease in self.pool.get(self._key(), leases=leases) or ():
            lease.release()

    def put_and_drop(self) -> None:
        self._publish(b"new".ljust(16))
        self.pool.drop(b"new".ljust(16))

    def fill(self) -> None:
        """From now on each put evicts."""
        while self.pool.available_blocks():
            self.put_fresh()

    def put_fresh(self) -> None:
        self._fresh += 1
        self._publish(self._fresh.to_bytes(16, "little"))


@contextlib.contextmanager
def _subjects(sizes: Sequence[int]) -> Iterator[list[_Subject]]:
    with contextlib.ExitStack() as stack:
        made = [_Subject(entries) for entries in sizes]
        for subject in made:
            stack.enter_context(subject.pool)
        yield made


OPERATIONS: dict[str, Callable[[_Subject], None]] = {
    "find": _Subject.find,
    "miss": _Subject.miss,
    "get + release": lambda subject: subject.get(1),
    "get 8 + release": lambda subject: subject.get(8),
    "put + drop": _Subject.put_and_drop,
    "put that evicts": _Subject.put_fresh,
}


def _medians(
    subjects: list[_Subject], operation: Callable[[_Subject], None], rounds: int
) -> list[float]:
    """Microseconds of one operation, for each subject."""
    times: list[list[float]] = [[] for _ in subjects]
    for _ in range(max(1, rounds // TURN)):
        for subject, taken in zip(subjects, times, strict=True):
            for _ in range(TURN):
                started = time.perf_counter_ns()
                operation(subject)
                taken.append((time.perf_counter_ns() - started) / 1e3)
    return [statistics.median(taken) for taken in times]


def cache_costs(sizes: Sequence[int], rounds: int) -> Experiment:
    rows: list[list[str]] = []
    numbers: dict[str, float] = {}
    with _subjects(sizes) as subjects:
        for name, operation in OPERATIONS.items():
            if operation is _Subject.put_fresh:
                for subject in subjects:
                    subject.fill()
            medians = _medians(subjects, operation, rounds)
            growth = medians[-1] / medians[0]
            rows.append([name, *(f"{median:.1f}" for median in medians), f"{growth:.2f}"])
            numbers.update(
                (f"{name} us, {entries} entries", median)
                for entries, median in zip(sizes, medians, strict=True)
            )
    return Experiment(
        name="cache_costs",
        title="What the content cache costs, in microseconds, by number of entries",
        note=f"Medians of {rounds:,} operations, all sizes in turns, one process, no contention. "
        "A put reserves and publishes one block and copies nothing.",
        header=["", *(f"{entries:,}" for entries in sizes), "growth"],
        rows=rows,
        numbers=numbers,
    )
