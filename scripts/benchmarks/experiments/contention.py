"""1 to 16 processes on one allocator, and on one queue, beside the bare lock.

The bare lock is an flock, tried as the pool tries it, around as many writes of 8 bytes as the pool
makes stores; twice, since an `alloc` and a `free` are two critical sections.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import tempfile
import time
from contextlib import closing
from functools import partial

from benchmarks.report import Done, Experiment, Turn
from benchmarks.transport import Context, unique_name
from benchmarks.transports.shmblocks_pool import allocate
from benchmarks.workers import Make, Repeated, Workers, fresh_processes
from shmblocks import BlockHandle, BlockPool, Field, HandleQueue, PoolConfig

BLOCK_SIZE = 128
BLOCKS = 4096
TOKENS = 700
# Stores of a commit: the log, its length twice, three changes, and who holds the lock.
STORES = 8
# Attempts before the first sleep, and seconds of sleep, as in the pool's mutex.
SPIN_ATTEMPTS = 8
FIRST_SLEEP = 20e-6
LONGEST_SLEEP = 1e-3


def contention(processes: tuple[int, ...], seconds: float) -> Experiment:
    pool_name, queue_name = unique_name("contention"), unique_name("contention-queue")
    config = PoolConfig(
        total_tokens=BLOCKS * BLOCK_SIZE,
        fields=(Field("byte", (), "int8"),),
        block_size=BLOCK_SIZE,
    )
    rows, numbers = [], {}
    context = fresh_processes()
    with (
        tempfile.NamedTemporaryFile(dir="/dev/shm", prefix=unique_name("lock")) as file,
        BlockPool.create(pool_name, config, prefault="now"),
        closing(HandleQueue.create(queue_name, message_type=BlockHandle)),
    ):
        file.truncate(mmap.PAGESIZE)
        for count in processes:
            lock = _measure(context, partial(bare_lock, file.name), count, seconds)
            alloc = _measure(context, partial(alloc_free, pool_name), count, seconds)
            queue = _measure(context, partial(put_get, queue_name), count, seconds)
            share = per_second(alloc) / per_second(lock)
            numbers[f"share of the bare lock, {count} processes"] = share
            numbers[f"unfairness, {count} processes"] = unfairness(alloc)
            for what, done in (("bare lock", lock), ("alloc + free", alloc), ("put + get", queue)):
                numbers[f"{what}, {count} processes, pairs a second"] = per_second(done)
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
    return Experiment(
        name="contention",
        title="Processes on one pool and one queue",
        note=f"Thousands of pairs a second, all processes together. The lock around {STORES} "
        "writes of 8 bytes. Fairness is the largest share against the smallest; the longest single "
        "pair. On 2 cores, more than 2 take turns.",
        header=[
            "processes", "bare lock", "alloc + free", "max/min", "longest", "put + get", "max/min",
            "longest",
        ],
        rows=rows,
        numbers=numbers,
    )  # fmt: skip


def _measure(context: Context, make: Make, count: int, seconds: float) -> list[Done]:
    roles = [(f"process {number}", make) for number in range(count)]
    with Workers(context, roles) as workers:
        workers.wait_ready()
        return workers.turn(Turn(warm_up=50, seconds=seconds))


def bare_lock(path: str) -> Repeated:
    fd = os.open(path, os.O_RDWR)
    words = memoryview(mmap.mmap(fd, mmap.PAGESIZE)).cast("Q")

    def is_taken() -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def section() -> None:
        attempts, sleep = 0, FIRST_SLEEP
        while not is_taken():
            attempts += 1
            if attempts >= SPIN_ATTEMPTS:
                time.sleep(sleep * (0.5 + random.random()))
                sleep = min(2 * sleep, LONGEST_SLEEP)
        for index in range(STORES):
            words[index] = index
        fcntl.flock(fd, fcntl.LOCK_UN)

    def step() -> None:
        section()
        section()

    return Repeated(step, lambda: os.close(fd))


def alloc_free(name: str) -> Repeated:
    pool = BlockPool.attach(name, prefault="off")
    return Repeated(lambda: pool.free(allocate(pool, TOKENS)), pool.close)


def put_get(name: str) -> Repeated:
    queue = HandleQueue.attach(name, message_type=BlockHandle)
    handle = BlockHandle(8, 6, TOKENS, 77, 1 << 60)

    def step() -> None:
        queue.put(handle)
        queue.get()

    return Repeated(step, queue.close)


def per_second(done: list[Done]) -> float:
    """Steps of all together."""
    return sum(one.steps / (one.ended_ns - one.began_ns) * 1e9 for one in done)


def unfairness(done: list[Done]) -> float:
    """The largest share against the smallest."""
    steps = [one.steps for one in done]
    return max(steps) / max(1, min(steps))


def _thousands(done: list[Done]) -> str:
    return f"{per_second(done) / 1_000:.0f} k"


def _longest(done: list[Done]) -> str:
    return f"{max(one.longest_ns for one in done) / 1e6:.0f} ms"
