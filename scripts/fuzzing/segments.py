"""Mutated segments: header, config and every table, opened by an inspector and by a participant.

Right is: an error of ours, or a normal answer. A wrong allocation cannot be told from a right one
where the damaged words are themselves plausible; a crash, a hang, a foreign exception or a view
outside of the pool can.
"""

from __future__ import annotations

import contextlib
import os
import random

from fuzzing.mutate import plausible_word, words_mutated
from shmblocks import (
    BlockHandle,
    BlockPool,
    BlockView,
    Field,
    Lease,
    PoolConfig,
    PoolInspector,
    ShmBlocksError,
)
from shmblocks._os.filelock import PLACE_BYTE, FileLocks
from shmblocks._state.layout import (
    CHANNEL_BYTES,
    CLAIM,
    LEASE,
    MESSAGE_BYTES,
    PARTICIPANT,
    RECORD,
    WAITER,
    WORD,
    Layout,
)
from shmblocks.testing import abandon

CONFIG = PoolConfig(
    total_tokens=32 * 4,
    fields=(Field("stamp", (), "int64"),),
    block_size=4,
    max_leases=8,
    max_participants=4,
    max_waiters=4,
    max_claims=4,
    channels=2,
    channel_slots=4,
    lock_timeout=2.0,
    # A damaged word can say that a stream has yet to get there; it is waited for so long.
    unclaimed_timeout=0.05,
    stream_timeout=0.05,
)


def fuzz_segments(name: str, inputs: int, chooser: random.Random) -> dict[str, int]:
    """Counts of what came out. Anything but an error of ours is raised."""
    with BlockPool.create(name, CONFIG, prefault="off") as pool:
        image = _image(pool)
    layout = Layout(CONFIG)
    telling = _telling_words(image, layout)
    counts = {"refused": 0, "opened": 0}
    for _ in range(inputs):
        data = bytearray(image)
        if chooser.random() < 0.15:
            _plant_journal(data, layout, telling, chooser)
        words_mutated(data, chooser, telling if chooser.random() < 0.95 else range(len(data) // 8))
        if chooser.random() < 0.05:
            del data[chooser.randrange(len(data)) :]
        counts["opened" if _open(name, bytes(data)) else "refused"] += 1
    return counts


def fuzz_living(name: str, inputs: int, chooser: random.Random) -> dict[str, int]:
    """The same damage to a pool that is in use, between two operations of its participant."""
    layout = Layout(CONFIG)
    counts = {"survived": 0}
    for _ in range(inputs):
        pool = BlockPool.create(name, CONFIG, prefault="off")
        handles = [handle for handle in (pool.alloc(6) for _ in range(4)) if handle is not None]
        for handle in handles[1:]:
            pool.publish(handle, readers=2)
        leases = [pool.open(handle) for handle in handles[2:]]
        _damage(pool, layout, chooser)
        try:
            _use(pool)
            _use_again(pool, handles, leases)
        finally:
            abandon(pool)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"/dev/shm/{name}")
        counts["survived"] += 1
    return counts


def _damage(pool: BlockPool, layout: Layout, chooser: random.Random) -> None:
    memory = pool.state.segment.memory
    data = bytearray(memory[: layout.state_bytes])
    identity = bytes(data[:64])
    telling = _telling_words(bytes(data), layout)
    if chooser.random() < 0.15:
        _plant_journal(data, layout, telling, chooser)
    words_mutated(data, chooser, telling)
    # Read once, when it was attached.
    data[:64] = identity
    memory[: layout.state_bytes] = bytes(data)


def _use_again(pool: BlockPool, handles: list[BlockHandle], leases: list[Lease]) -> None:
    """What the participant held before the damage."""
    for number, lease in enumerate(leases):
        with contextlib.suppress(ShmBlocksError):
            (lease.give_back if number % 2 else lease.release)()
    for handle in handles:
        for operation in (pool.free, pool.view, pool.open, pool.open_for_write, pool.publish):
            with contextlib.suppress(ShmBlocksError):
                operation(handle)
        with contextlib.suppress(ShmBlocksError):
            pool.forgo(handle)
    with contextlib.suppress(ShmBlocksError):
        pool.alloc(3, timeout=1e-6)
    with contextlib.suppress(ShmBlocksError), pool.reserve(3, timeout=1e-6) as reservation:
        reservation.grow(9)
    with contextlib.suppress(ShmBlocksError):
        pool.close()


def _telling_words(image: bytes, layout: Layout) -> list[int]:
    """Indices of the words that mean something; most of a segment is padding.

    The header comes more often, every word that is not 0 does, and the first few of each table.
    """
    header = list(range(32))
    filled = [
        index
        for index in range(layout.state_bytes // WORD)
        if any(image[index * WORD : index * WORD + WORD])
    ]
    tables = [
        (layout.journal, 200),
        (layout.participants, 4 * PARTICIPANT.size),
        (layout.waiters, 3 * WAITER.size),
        (layout.leases, 8 * LEASE.size),
        (layout.claims, 4 * CLAIM.size),
        (layout.channels, 2 * CHANNEL_BYTES),
        (layout.messages, 4 * MESSAGE_BYTES),
        (layout.records, 32 * RECORD.size),
        (layout.live, 32 * WORD),
        (layout.buckets, 32 * WORD),
        (layout.bitmap, layout.bitmap_bytes),
    ]
    words = [
        index
        for start, size in tables
        for index in range(start // WORD, min(start + size, layout.state_bytes) // WORD)
    ]
    return 3 * header + 2 * filled + words + 10 * [layout.journal // WORD]


def _plant_journal(
    data: bytearray, layout: Layout, telling: list[int], chooser: random.Random
) -> None:
    """Entries that a dead holder of the lock could have left, and entries that none could."""
    entries = bytearray()
    for _ in range(chooser.choice((1, 1, 2, 3))):
        edge = chooser.choice((0, layout.state_bytes - 8, layout.state_bytes, 1 << 40))
        offset = edge if chooser.random() < 0.3 else chooser.choice(telling) * WORD
        length = chooser.choice((0, 8, 8, 16, 24, 72, 3, 1 << 30))
        entries += offset.to_bytes(WORD, "little") + length.to_bytes(WORD, "little")
        for _ in range(min(length, 200) // WORD):
            entries += plausible_word(0, chooser).to_bytes(WORD, "little")
    claimed = max(1, len(entries) + chooser.choice((0, 0, 0, 8, -8)))
    head = layout.journal
    data[head : head + WORD] = claimed.to_bytes(WORD, "little")
    data[head + WORD : head + WORD + len(entries)] = entries


def _image(pool: BlockPool) -> bytes:
    """The bytes of a pool with allocations in every state."""
    handles = [pool.alloc(6) for _ in range(5)]
    kept = [handle for handle in handles if handle is not None]
    for handle in kept[1:]:
        pool.publish(handle, readers=2)
    leases = [pool.open(handle) for handle in kept[2:4]]
    pool.free(kept[3])
    image = bytes(pool.state.segment.memory)
    for lease in leases:
        lease.release()
    return image


def _open(name: str, data: bytes) -> bool:
    """Whether an inspector or a participant could open it; then every operation is tried."""
    path = f"/dev/shm/{name}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    locks = FileLocks(fd)
    try:
        os.write(fd, data)
        # A living participant, or no process could join.
        locks.try_lock(PLACE_BYTE + 3)
        return _inspect(name) | _join(name)
    finally:
        locks.close()
        os.close(fd)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _inspect(name: str) -> bool:
    try:
        with PoolInspector(name) as pool:
            for read in (pool.stats, pool.allocations, pool.participants, pool.check, pool.reap):
                with contextlib.suppress(ShmBlocksError):
                    read()
    except ShmBlocksError:
        return False
    return True


def _join(name: str) -> bool:
    try:
        pool = BlockPool.attach(name, prefault="off")
    except ShmBlocksError:
        return False
    try:
        _use(pool)
    finally:
        with contextlib.suppress(ShmBlocksError):
            pool.close()
    return True


def _use(pool: BlockPool) -> None:
    with contextlib.suppress(ShmBlocksError, ValueError):
        handle = pool.alloc(9)
        if handle is not None:
            _touch(pool, pool.view(handle))
            with pool.open(pool.publish(handle)) as lease:
                _touch(pool, lease.view)
    for block in range(min(pool.config.total_blocks, 40)):
        with contextlib.suppress(ShmBlocksError, ValueError):
            handle = pool.handle_at(block)
            with contextlib.suppress(ShmBlocksError), pool.open(handle) as lease:
                _touch(pool, lease.view)
            with contextlib.suppress(ShmBlocksError):
                pool.grow(handle, handle.num_tokens + 3)
            pool.free(handle)
    for read in (pool.check, pool.stats, pool.allocations, pool.participants, pool.reap):
        with contextlib.suppress(ShmBlocksError):
            read()


def _touch(pool: BlockPool, view: BlockView) -> None:
    """Every row of it can be read, and there are as many as the handle says."""
    for field in pool.config.fields:
        tensor = view[field.name]
        if tensor.shape[1 if field.transposed else 0] != view.num_tokens:
            raise AssertionError(f"{field}: a view of {tuple(tensor.shape)} for {view.handle}")
        tensor.clone()
    view.aux.clone()
