"""Mutated segments: header, config and every table, opened by an inspector and by a participant.

Right is: an error of ours, or a normal answer. A wrong allocation cannot be told from a right one
where the damaged words are themselves plausible; a crash, a hang, a foreign exception or a view
outside of the pool can.
"""

from __future__ import annotations

import contextlib
import os
import random

from fuzzing.mutate import words_mutated
from shmblocks import (
    BlockPool,
    Field,
    PoolConfig,
    ShmBlocksError,
    open_inspector,
)
from shmblocks.filelock import PLACE_BYTE, FileLocks
from shmblocks.layout import Layout


def fuzz_segments(name: str, inputs: int, chooser: random.Random) -> dict[str, int]:
    """Counts of what came out. Anything but an error of ours is raised."""
    config = PoolConfig(
        total_tokens=32 * 4,
        fields=(Field("stamp", (), "int64"),),
        block_size=4,
        max_leases=8,
        max_participants=4,
        lock_timeout=2.0,
    )
    with BlockPool.create(name, config, prefault="off") as pool:
        image = _image(pool)
    counts = {"refused": 0, "opened": 0}
    for _ in range(inputs):
        data = bytearray(image)
        words_mutated(data, chooser, Layout(config).ledger_bytes)
        if chooser.random() < 0.05:
            del data[chooser.randrange(len(data)) :]
        counts["opened" if _open(name, bytes(data)) else "refused"] += 1
    return counts


def _image(pool: BlockPool) -> bytes:
    """The bytes of a pool with allocations in every state."""
    handles = [pool.alloc(6) for _ in range(5)]
    kept = [handle for handle in handles if handle is not None]
    for handle in kept[1:]:
        pool.publish(handle, readers=2)
    leases = [pool.open(handle) for handle in kept[2:4]]
    pool.free(kept[3])
    image = bytes(pool._ledger.segment.memory)
    for lease in leases:
        lease.release()
    return image


def _open(name: str, data: bytes) -> bool:
    """Whether anybody got in; every operation is tried on those who did."""
    path = f"/dev/shm/{name}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    locks = FileLocks(fd)
    try:
        os.write(fd, data)
        # Somebody lives in it, or nobody could join.
        locks.try_lock(PLACE_BYTE + 3)
        return _inspect(name) | _join(name)
    finally:
        locks.close()
        os.close(fd)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _inspect(name: str) -> bool:
    try:
        with open_inspector(name) as pool:
            for look in (pool.stats, pool.allocations, pool.participants, pool.check, pool.reap):
                with contextlib.suppress(ShmBlocksError):
                    look()
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
            pool.view(handle)["stamp"].fill_(1)
            with pool.open(pool.publish(handle)) as lease:
                lease["stamp"].sum()
    for block in range(min(pool.config.total_blocks, 32)):
        with contextlib.suppress(ShmBlocksError, ValueError):
            handle = pool.handle_at(block)
            with contextlib.suppress(ShmBlocksError), pool.open(handle) as lease:
                stamps = lease["stamp"]
                if stamps.shape[0] != handle.num_tokens:
                    raise AssertionError(f"a view of {stamps.shape} for {handle}")
            pool.free(handle)
