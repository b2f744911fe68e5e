"""1 to 16 processes on one allocator, and on one queue, beside the bare lock.

The floor is the pool's own lock around memory writes, in two critical sections, as an `alloc` and
a `free` are two. Counted in two ways, since a store may be longer than a word:

- *stores*: as many writes of 8 bytes as the operations make stores, of whatever length;
- *words*: as many writes of 8 bytes as the operations write words of 8 bytes, journal included
  (counted in a run of the operations themselves).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from functools import partial
from multiprocessing.context import ForkServerContext

from benchmarks.links.buffers import unique_name
from benchmarks.results import Study
from benchmarks.studies.crowd import Make, Share, Step, crowd, per_second, unfairness
from shmblocks import BlockHandle, BlockPool, Field, HandleQueue, PoolConfig
from shmblocks._state.journal import Store

BLOCK_SIZE = 128
BLOCKS = 4096
TOKENS = 700
# Stores of a commit: the log, its length twice, three places, and who holds the lock.
STORES = 8
HEAD_WORDS = 2  # of each entry of the journal: where, and how much
LENGTH_WORDS = 2  # its first word is set before a change and cleared after it


def contention(context: ForkServerContext, processes: tuple[int, ...], seconds: float) -> Study:
    pool_name, queue_name = unique_name("contention"), unique_name("contention-queue")
    config = PoolConfig(
        total_tokens=BLOCKS * BLOCK_SIZE,
        fields=(Field("byte", (), "int8"),),
        block_size=BLOCK_SIZE,
    )
    rows, numbers = [], {}
    with (
        BlockPool.create(pool_name, config, prefault="now") as pool,
        closing(HandleQueue.create(queue_name, message_type=BlockHandle)),
    ):
        words = words_of_a_section(pool)
        for count in processes:
            lock = _measure(context, partial(bare_lock, pool_name, STORES), count, seconds)
            by_words = _measure(context, partial(bare_lock, pool_name, words), count, seconds)
            alloc = _measure(context, partial(alloc_free, pool_name), count, seconds)
            queue = _measure(context, partial(put_get, queue_name), count, seconds)
            share = per_second(alloc) / per_second(lock)
            numbers[f"share of the bare lock, {count} processes"] = share
            share_by_words = per_second(alloc) / per_second(by_words)
            numbers[f"share of the bare lock by words, {count} processes"] = share_by_words
            numbers[f"unfairness, {count} processes"] = unfairness(alloc)
            for what, shares in (
                ("bare lock, stores", lock),
                ("bare lock, words", by_words),
                ("alloc + free", alloc),
                ("put + get", queue),
            ):
                numbers[f"{what}, {count} processes, pairs a second"] = per_second(shares)
            rows.append(
                [
                    str(count),
                    _thousands(lock),
                    _thousands(by_words),
                    f"{_thousands(alloc)} ({share:.0%}, {share_by_words:.0%})",
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
        note=f"Thousands of pairs a second, all processes together. The lock around {STORES} "
        f"writes of 8 bytes (the stores of an operation), and around {words} (its words). Fairness "
        "is the largest share against the smallest; the longest single pair. "
        "On 2 cores, more than 2 take turns.",
        header=[
            "processes", "lock, stores", "lock, words", "alloc + free", "max/min", "longest",
            "put + get", "max/min", "longest",
        ],
        rows=rows,
        numbers=numbers,
    )  # fmt: skip


def _measure(context: ForkServerContext, make: Make, count: int, seconds: float) -> list[Share]:
    return crowd(context, [make] * count, seconds)


def words_of_a_section(pool: BlockPool) -> int:
    """Words of 8 bytes that an `alloc` and a `free` write, journal included, halved."""
    journal = pool.state.journal
    commit = journal.commit
    written = 0

    def counted(stores: Iterable[Store]) -> None:
        nonlocal written
        made = list(stores)
        words = sum(len(data) // 8 for _, data in made)
        written += 2 * words + HEAD_WORDS * len(made) + LENGTH_WORDS
        commit(made)

    journal.commit = counted  # type: ignore[method-assign]
    try:
        handle = pool.alloc(TOKENS)
        if handle is None:
            raise RuntimeError(f"no room: {pool.stats()}")
        pool.free(handle)
    finally:
        journal.commit = commit  # type: ignore[method-assign]
    return written // 2


def bare_lock(name: str, writes: int) -> tuple[Step, Callable[[], None]]:
    pool = BlockPool.attach(name, prefault="off")
    words, run = pool.state.segment.words, pool.state.mutex.run
    first = pool.state.layout.aux // 8

    def section() -> None:
        for place in range(first, first + writes):
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
