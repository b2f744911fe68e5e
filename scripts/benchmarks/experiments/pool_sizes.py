"""What must not depend on the size of a pool: alloc + free by its blocks, attaching by its bytes.

One pair is `alloc` of 8 blocks and `free` of them; the cursor of next fit moves on with each, so a
turn walks through the pool and, in the small ones, wraps.
"""

from __future__ import annotations

import os
import statistics
import time

from benchmarks.report import Experiment
from benchmarks.table import duration
from benchmarks.transport import unique_name
from benchmarks.transports.shmblocks_pool import allocate
from shmblocks import BlockPool, Field, PoolConfig, multimodal_fields

PAIR_BLOCKS = 8
TURNS = 10
HIDDEN = 3584
TIMES = 9
GIB = 1 << 30


def pool_sizes(blocks: tuple[int, ...], pairs: int, sizes: tuple[int, ...]) -> Experiment:
    """`sizes`: of whole pools, in bytes."""
    costs = _pairs(blocks, pairs)
    numbers = {f"pair in a pool of {count} blocks": cost for count, cost in costs.items()}
    rows = [[f"alloc + free, {count:,} blocks", duration(cost)] for count, cost in costs.items()]
    for size in sizes:
        free = os.statvfs("/dev/shm")
        label = f"{size / GIB:g} GiB"
        if free.f_bavail * free.f_frsize < size * 1.1:
            rows.append([f"attach, {label}", "no room"])
            continue
        created, attached = _attach(size)
        rows += [[f"create, {label}", duration(created)], [f"attach, {label}", duration(attached)]]
        numbers |= {f"create, {label}": created, f"attach, {label}": attached}
    return Experiment(
        name="pool_sizes",
        title="What depends on the size of a pool",
        note=f"alloc and free of {PAIR_BLOCKS} blocks: medians of {TURNS * pairs} pairs, the pools "
        "in turn. Creating, before prefaulting, allocates every page (posix_fallocate), so that a "
        f"small /dev/shm is told at once. Attaching, before prefaulting: the median of {TIMES}.",
        header=["", "took"],
        rows=rows,
        numbers=numbers,
    )


def tiny_pool(blocks: int) -> BlockPool:
    """Blocks of one token with one byte each: only the allocator's own state grows with it."""
    config = PoolConfig(total_tokens=blocks, fields=(Field("byte", (), "int8"),), block_size=1)
    return BlockPool.create(unique_name(f"tiny-{blocks}"), config, prefault="now")


def _pairs(blocks: tuple[int, ...], pairs: int) -> dict[int, float]:
    """Microseconds of one pair in each pool."""
    took: dict[int, list[int]] = {count: [] for count in blocks}
    pools = {count: tiny_pool(count) for count in blocks}
    try:
        for _ in range(TURNS):
            for count, pool in pools.items():
                _walk(pool, pairs // 10)
                took[count] += _walk(pool, pairs)
    finally:
        for pool in pools.values():
            pool.close()
    return {count: statistics.median(times) / 1_000 for count, times in took.items()}


def _walk(pool: BlockPool, pairs: int) -> list[int]:
    now = time.perf_counter_ns
    took = []
    for _ in range(pairs):
        start = now()
        pool.free(allocate(pool, PAIR_BLOCKS))
        took.append(now() - start)
    return took


def _attach(size: int) -> tuple[float, float]:
    """Microseconds to create, and to attach."""
    fields = multimodal_fields(hidden_size=HIDDEN)
    per_token = sum(field.token_bytes for field in fields)
    block = 128
    config = PoolConfig(total_tokens=size // per_token // block * block, fields=fields)
    name = unique_name("attach")
    start = time.perf_counter_ns()
    with BlockPool.create(name, config, prefault="off"):
        created = (time.perf_counter_ns() - start) / 1_000
        took = []
        for _ in range(TIMES):
            start = time.perf_counter_ns()
            pool = BlockPool.attach(name, prefault="off")
            took.append((time.perf_counter_ns() - start) / 1_000)
            pool.close()
    return created, statistics.median(took)
