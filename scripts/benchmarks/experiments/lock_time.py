"""How long each operation holds the lock, by the size of the pool and what lives in it.

Everybody else waits meanwhile. What is timed is the locked section alone, from after the lock was
taken until before it is given back. An operation that takes the lock several times counts with its
longest hold.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

from benchmarks.experiments.internals import lock_holds
from benchmarks.experiments.pool_sizes import tiny_pool
from benchmarks.report import Experiment
from benchmarks.table import duration
from benchmarks.transports.shmblocks_pool import allocate
from shmblocks import BlockPool

OPERATIONS = ("stats", "reap", "allocations", "participants", "check", "alloc + free")


def lock_time(pools: tuple[int, ...], live: tuple[int, ...], times: int) -> Experiment:
    """`pools`: in blocks. `live`: allocations, every other one published; as many as fit."""
    rows: list[list[str]] = []
    numbers: dict[str, float] = {}
    for blocks in pools:
        with tiny_pool(blocks) as pool:
            pool.state.core = (
                None  # the sections of the Python are timed, which are the longer ones
            )
            there = 0
            for count in live:
                wanted = min(count, blocks // 2)
                _live(pool, there, wanted)
                there = wanted
                holds = {name: _hold(call, times) for name, call in operations(pool).items()}
                for name, hold in holds.items():
                    numbers[f"hold of {name}, {blocks} blocks, {wanted} live"] = hold
                rows.append([f"{blocks:,}", f"{wanted:,}", *map(duration, holds.values())])
    numbers["longest hold but check"] = max(
        hold for name, hold in numbers.items() if not name.startswith("hold of check")
    )
    return Experiment(
        name="lock_time",
        title="How long an operation holds the pool's lock",
        note=f"The longest single hold of each call; the median of {times} calls.",
        header=["blocks", "live", *OPERATIONS],
        rows=rows,
        numbers=numbers,
    )


def _live(pool: BlockPool, there: int, wanted: int) -> None:
    """Add allocations until so many live."""
    for number in range(there, wanted):
        handle = allocate(pool, 1)
        if number % 2:
            pool.publish(handle)


def operations(pool: BlockPool) -> dict[str, Callable[[], object]]:
    calls = (
        pool.stats,
        pool.reap,
        pool.allocations,
        pool.participants,
        pool.check,
        lambda: pool.free(allocate(pool, 1)),
    )
    return dict(zip(OPERATIONS, calls, strict=True))


def _hold(call: Callable[[], object], times: int) -> float:
    """Microseconds."""
    longest = []
    for _ in range(times):
        with lock_holds() as holds:
            call()
        if not holds:
            raise RuntimeError("expected the operation to take the lock with flock; it did not")
        longest.append(max(holds) / 1_000)
    return statistics.median(longest)
