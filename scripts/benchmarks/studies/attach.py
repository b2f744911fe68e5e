"""How long it takes to create a pool and to attach to it, by its size, before prefaulting."""

from __future__ import annotations

import os
import statistics
import time

from benchmarks.links.buffers import unique_name
from benchmarks.results import Study
from benchmarks.table import duration
from shmblocks import BlockPool, PoolConfig, multimodal_fields

HIDDEN = 3584
TIMES = 9
GIB = 1 << 30


def attaching(sizes: tuple[int, ...]) -> Study:
    """Pools of about so many bytes each; left out are those that /dev/shm has no room for."""
    rows, numbers = [], {}
    for size in sizes:
        free = os.statvfs("/dev/shm")
        label = f"{size / GIB:g} GiB"
        if free.f_bavail * free.f_frsize < size * 1.1:
            rows.append([label, "no room", ""])
            continue
        created, attached = _measure(size)
        numbers[f"attach, {label}"] = attached
        rows.append([label, duration(created), duration(attached)])
    return Study(
        name="attach",
        title="Creating a pool and attaching to it",
        note=f"Before prefaulting; attaching: the median of {TIMES}. Creating allocates every page "
        "(posix_fallocate), so that a small /dev/shm is told at once.",
        header=["size", "create", "attach"],
        rows=rows,
        numbers=numbers,
    )


def _measure(size: int) -> tuple[float, float]:
    """Microseconds to create, and to attach."""
    fields = multimodal_fields(hidden_size=HIDDEN)
    per_token = sum(field.token_bytes for field in fields)
    block = 128
    config = PoolConfig(total_tokens=size // per_token // block * block, fields=fields)
    name = unique_name("attach")
    start = time.perf_counter_ns()
    with BlockPool.create(name, config, prefault="off"):
        created = (time.perf_counter_ns() - start) / 1000
        took = []
        for _ in range(TIMES):
            start = time.perf_counter_ns()
            pool = BlockPool.attach(name, prefault="off")
            took.append((time.perf_counter_ns() - start) / 1000)
            pool.close()
    return created, statistics.median(took)
