"""shmblocks: `alloc` and `free` in one process, for pools of very different numbers of blocks.

Blocks of one token with one byte each, so that only the allocator's own state grows with the
pool. One pair is `alloc` of 8 blocks and `free` of them; the cursor of next fit moves on with
each, so a turn walks through the pool and, in the small ones, wraps.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from benchmarks.links.buffers import unique_name
from benchmarks.links.pool import allocate
from benchmarks.pingpong import now
from benchmarks.results import Sample
from benchmarks.settings import Settings
from shmblocks import BlockPool, Field, PoolConfig

PAIR_BLOCKS = 8
# Untimed pairs before a turn, for each rehearsal of a message: the process has slept since its
# last turn, and a pair is so short that only many of them wake it up.
REHEARSALS_PER = 10


class AllocFree:
    def __init__(self, settings: Settings) -> None:
        self._rehearsals = REHEARSALS_PER * settings.rehearsals
        with ExitStack() as undo:
            self._pools = {
                blocks: undo.enter_context(tiny_pool(blocks)) for blocks in settings.alloc_blocks
            }
            self._resources = undo.pop_all()

    def measure(self, size: int, count: int) -> list[Sample]:
        pool = self._pools[size]
        for _ in range(self._rehearsals):
            pair(pool)
        return [pair(pool) for _ in range(count)]

    def close(self) -> None:
        self._resources.close()


def pair(pool: BlockPool) -> Sample:
    start = now()
    pool.free(allocate(pool, PAIR_BLOCKS))
    return Sample(now() - start)


def tiny_pool(blocks: int) -> BlockPool:
    config = PoolConfig(total_tokens=blocks, fields=(Field("byte", (), "int8"),), block_size=1)
    return BlockPool.create(unique_name(f"alloc-{blocks}"), config, prefault="now")


def prepare(settings: Settings) -> Callable[[], AllocFree]:
    return partial(AllocFree, settings)


def sizes(settings: Settings) -> tuple[int, ...]:
    return settings.alloc_blocks


def count(settings: Settings, size: int) -> int:
    return settings.alloc_pairs
