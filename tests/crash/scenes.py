"""The stage of the crash tests: a small pool, a survivor, and what must come through unharmed.

The survivor is the process that runs the test. It has published one allocation (`kept`) and holds a
reservation of its own (`mine`), both filled with bytes that nobody may change.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from shmblocks import (
    BlockHandle,
    BlockPool,
    Field,
    Lease,
    PoolConfig,
    PoolNotFoundError,
    remove_pool,
)
from shmblocks._state import lifetime
from shmblocks.lease import Reservation
from shmblocks.testing import Remembered, abandon, field_bytes, remember
from tests.support.naming import new_pool_name

# 16 blocks: few lines in every loop over them.
CONFIG = PoolConfig(
    total_tokens=64,
    fields=(Field("x", (2,), "int32"), Field("ids", (), "int32")),
    block_size=4,
    default_num_blocks=2,
    max_participants=5,
    max_leases=4,
    lock_timeout=2.0,
    max_waiters=4,
    channels=1,
    channel_slots=64,
    max_claims=4,
)
# 80 blocks: more than one word of the bitmap.
LARGE = msgspec.structs.replace(CONFIG, total_tokens=320)


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
    """A pool and what is in it. `handle` is what an operation works on.

    `witness` is a participant of its own, on locks of its own, in the survivor's process.
    """

    def __init__(
        self, name: str, pool: BlockPool | None = None, witness: BlockPool | None = None
    ) -> None:
        self.name = name
        self._pool = pool
        self._witness = witness
        self.kept: list[Remembered] = []
        self.mine: list[Remembered] = []
        # Open leases and reservations of an operation: kept, since what is dropped is given back.
        self.leases: list[Lease] = []
        self.reservations: list[Reservation] = []
        # Tensors that own what they look at.
        self.kept_alive: list[object] = []
        self.handle: BlockHandle | None = None

    @property
    def pool(self) -> BlockPool:
        assert self._pool is not None, "this scene has no survivor"
        return self._pool

    @property
    def witness(self) -> BlockPool:
        assert self._witness is not None, "this scene has no survivor"
        return self._witness

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
    for name in ("aux", *(field.name for field in pool.config.fields)):
        memory = field_bytes(pool, handle, name)
        pattern = f"{name} of {handle.generation}. ".encode()
        memory[:] = (pattern * (len(memory) // len(pattern) + 1))[: len(memory)]


def publish(pool: BlockPool, num_tokens: int, readers: int = 1) -> BlockHandle:
    return pool.publish(reserve(pool, num_tokens), readers=readers)


def forget_what_was_left() -> None:
    """A process remembers some hundred segments that it has left, and forgets the oldest beyond:
    then leaving has a line more than it had before."""
    lifetime._left.clear()


@contextlib.contextmanager
def pool_of_two(config: PoolConfig) -> Iterator[Scene]:
    """A pool with its creator and a witness."""
    forget_what_was_left()
    name = new_pool_name()
    with (
        BlockPool.create(name, config, role="survivor", prefault="off") as pool,
        BlockPool.attach(name, role="witness", prefault="off") as witness,
    ):
        yield Scene(pool.name, pool, witness)


@contextlib.contextmanager
def survivor(config: PoolConfig = CONFIG) -> Iterator[Scene]:
    """A pool whose creator survives."""
    with pool_of_two(config) as scene:
        pool = scene.pool
        scene.kept.append(remember(pool, publish(pool, 10, readers=3)))
        scene.mine.append(remember(pool, reserve(pool, 6)))
        yield scene
    assert not os.path.exists(f"/dev/shm{scene.name}"), "the last one out left the segment"


@contextlib.contextmanager
def nobody() -> Iterator[Scene]:
    """A name and no pool."""
    scene = Scene("/" + new_pool_name())
    yield scene
    with contextlib.suppress(PoolNotFoundError):
        remove_pool(scene.name)


@contextlib.contextmanager
def leftover() -> Iterator[Scene]:
    """A name that a dead pool holds."""
    with nobody() as scene:
        pool = BlockPool.create(scene.name, CONFIG, prefault="off")
        reserve(pool, 20)
        abandon(pool)
        yield scene
