"""1 to 16 processes on one allocator, and on one queue, beside the bare lock.

The floor is the pool's own lock around as many stores of 8 bytes as an `alloc` and a `free` make,
twice, as they are two critical sections.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial
from multiprocessing.context import ForkServerContext

from benchmarks.links.buffers import unique_name
from benchmarks.results import Study
from benchmarks.studies.crowd import Make, Share, Step, crowd, per_second, unfairness
from shmblocks import BlockHandle, BlockPool, Field, HandleQueue, PoolConfig

BLOCK_SIZE = 128
BLOCKS = 4096
TOKENS = 700
# Stores of a commit: the log, its length twice, three places, and who holds the lock.
STORES = 8


def contention(context: ForkServerContext, processes: tuple[int, ...], seconds: float) -> Study:
    pool_name, queue_name = unique_name("contention"), unique_name("contention-queue")
    config = PoolConfig(
        total_tokens=BLOCKS * BLOCK_SIZE,
        fields=(Field("byte", (), "int8"),),
        block_size=BLOCK_SIZE,
    )
    rows, numbers = [], {}
    with (
        BlockPool.create(pool_name, config, prefault="now"),
        closing(HandleQueue.create(queue_name, message_type=BlockHandle)),
    ):
        for count in processes:
            lock = _measure(context, partial(bare_lock, pool_name), count, seconds)
            alloc = _measure(context, partial(alloc_free, pool_name), count, seconds)
            queue = _measure(context, partial(put_get, queue_name), count, seconds)
            share = per_second(alloc) / per_second(lock)
            numbers[f"share of the bare lock, {count} processes"] = share
            numbers[f"unfairness, {count} processes"] = unfairness(alloc)
            for what, shares in (
                ("bare lock", lock),
                ("alloc + free", alloc),
                ("put + get", queue),
            ):
                numbers[f"{what}, {count} processes, pairs a second"] = per_second(shares)
            rows.append(
                [
                    str(count),
                    _thousands(lock),
                    f"{_thousands(alloc)} ({share:.0%})",
                    f"{unfairness(alloc):.2f}",
                    _longest(alloc),
                    _thousands(queue),
                    f"{unfairness(queue):.2f}",
                    _longest(queue),
                ]
            )
    return Study(
        name="contention",
        title="Processes on one pool and one queue",
        note="Thousands of pairs a second, all processes together; fairness is the largest share "
        "against the smallest; the longest single pair. On 2 cores, more than 2 take turns.",
        header=[
            "processes", "bare lock", "alloc + free", "max/min", "longest",
            "put + get", "max/min", "longest",
        ],
        rows=rows,
        numbers=numbers,
    )  # fmt: skip


def _measure(context: ForkServerContext, make: Make, count: int, seconds: float) -> list[Share]:
    return crowd(context, [make] * count, seconds)


def bare_lock(name: str) -> tuple[Step, Callable[[], None]]:
    pool = BlockPool.attach(name, prefault="off")
    words, run = pool._ledger.segment.words, pool._ledger.mutex.run
    first = pool._ledger.layout.aux // 8

    def section() -> None:
        for place in range(first, first + STORES):
            words[place] = place

    def step() -> None:
        run(section)
        run(section)

    return step, pool.close


def alloc_free(name: str) -> tuple[Step, Callable[[], None]]:
    pool = BlockPool.attach(name, prefault="off")

    def step() -> None:
        handle = pool.alloc(TOKENS)
        if handle is None:
            raise RuntimeError(f"no room: {pool.stats()}")
        pool.free(handle)

    return step, pool.close


def put_get(name: str) -> tuple[Step, Callable[[], None]]:
    queue = HandleQueue.attach(name, message_type=BlockHandle)
    handle = BlockHandle(8, 6, TOKENS, 77, 1 << 60)

    def step() -> None:
        queue.put(handle)
        queue.get()

    return step, queue.close


def _thousands(shares: list[Share]) -> str:
    return f"{per_second(shares) / 1000:.0f} k"


def _longest(shares: list[Share]) -> str:
    return f"{max(share.longest for share in shares) * 1000:.0f} ms"
