"""The stage of the crash tests: a small pool, a survivor, and what must come through unharmed.

The survivor is the process that runs the test. It has published one allocation (`kept`) and holds a
reservation of its own (`mine`), both filled with bytes that nobody may change.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

from shmblocks import BlockHandle, BlockPool, Field, Lease, PoolConfig
from shmblocks.testing import Remembered, abandon, field_bytes, remember
from tests.support.naming import new_pool_name

# 80 blocks: more than one word of the bitmap.
CONFIG = PoolConfig(
    total_tokens=320,
    fields=(Field("x", (2,), "int32"), Field("ids", (), "int32")),
    block_size=4,
    default_num_blocks=2,
    max_participants=5,
    max_leases=6,
    lock_timeout=2.0,
)


class Allocation(NamedTuple):
    """What an inspector sees of one allocation, but for its age and its people."""

    start_block: int
    num_blocks: int
    num_tokens: int
    generation: int
    state: str
    readers_left: int
    leases: int


class Scene:
    """A pool and what is in it. `handle` is what an operation works on."""

    def __init__(self, name: str, pool: BlockPool | None) -> None:
        self.name = name
        self._pool = pool
        self.kept: list[Remembered] = []
        self.mine: list[Remembered] = []
        # Open leases that an operation needs: kept, since one that is dropped is given back.
        self.leases: list[Lease] = []
        self.handle: BlockHandle | None = None

    @property
    def pool(self) -> BlockPool:
        assert self._pool is not None, "this scene has no survivor"
        return self._pool

    @property
    def the_handle(self) -> BlockHandle:
        assert self.handle is not None
        return self.handle

    @property
    def has_survivor(self) -> bool:
        return self._pool is not None


def picture(pool: BlockPool) -> list[Allocation]:
    """All allocations, as values that can be compared."""
    return [
        Allocation(
            info.start_block,
            info.num_blocks,
            info.num_tokens,
            info.generation,
            str(info.state),
            info.readers_left,
            len(info.leases),
        )
        for info in pool.allocations()
    ]


def reserve(pool: BlockPool, num_tokens: int) -> BlockHandle:
    """Reserve and fill; the bytes are the generation's own."""
    handle = pool.alloc(num_tokens, req_id=f"request of {os.getpid()}")
    assert handle is not None
    fill(pool, handle)
    return handle


def fill(pool: BlockPool, handle: BlockHandle) -> None:
    for name in ("x", "ids", "aux"):
        memory = field_bytes(pool, handle, name)
        pattern = f"{name} of {handle.generation}. ".encode()
        memory[:] = (pattern * (len(memory) // len(pattern) + 1))[: len(memory)]


def publish(pool: BlockPool, num_tokens: int, readers: int = 1) -> BlockHandle:
    return pool.publish(reserve(pool, num_tokens), readers=readers)


@contextlib.contextmanager
def survivor(config: PoolConfig = CONFIG) -> Iterator[Scene]:
    """A pool whose creator survives."""
    with BlockPool.create(new_pool_name(), config, role="survivor", prefault="off") as pool:
        scene = Scene(pool.name, pool)
        scene.kept.append(remember(pool, publish(pool, 10, readers=3)))
        scene.mine.append(remember(pool, reserve(pool, 6)))
        yield scene
    assert not os.path.exists(f"/dev/shm{scene.name}"), "the last one out left the segment"


@contextlib.contextmanager
def nobody() -> Iterator[Scene]:
    """A name and no pool."""
    yield Scene("/" + new_pool_name(), None)


@contextlib.contextmanager
def leftover() -> Iterator[Scene]:
    """A name that a dead pool holds."""
    with nobody() as scene:
        pool = BlockPool.create(scene.name, CONFIG, prefault="off")
        reserve(pool, 20)
        abandon(pool)
        yield scene
