"""Small pools for the tests of the cache, without fields: torch is not needed."""

from __future__ import annotations

from shmblocks import UNBOUNDED, BlockHandle, BlockPool, PoolConfig, content_key

BLOCK_SIZE = 4


def config(
    blocks: int = 32,
    *,
    max_claims: int = 8,
    max_leases: int = 64,
    max_participants: int = 16,
    lock_timeout: float = 20.0,
) -> PoolConfig:
    return PoolConfig(
        total_tokens=blocks * BLOCK_SIZE,
        block_size=BLOCK_SIZE,
        default_num_blocks=1,
        max_claims=max_claims,
        max_leases=max_leases,
        max_participants=max_participants,
        max_waiters=16,
        channels=1,
        channel_slots=16,
        lock_timeout=lock_timeout,
    )


def key(name: object) -> bytes:
    """A key for a test, of 16 bytes."""
    return content_key(b"tests", str(name))


def same_bucket(count: int, blocks: int) -> list[bytes]:
    """So many keys that share one chain of a pool of `blocks` blocks."""
    return [(3 + blocks * number).to_bytes(8, "little") + bytes(8) for number in range(count)]


def reserve(pool: BlockPool, blocks: int = 1) -> BlockHandle:
    handle = pool.alloc(blocks * BLOCK_SIZE)
    assert handle is not None, f"no room for {blocks} blocks in {pool}"
    return handle


def put(
    pool: BlockPool,
    name: object,
    blocks: int = 1,
    *,
    readers: int = UNBOUNDED,
    hold: float = 0.0,
) -> BlockHandle:
    """An entry under a key, which is made of `name` unless it is bytes."""
    its_key = name if isinstance(name, bytes) else key(name)
    return pool.publish(reserve(pool, blocks), readers=readers, key=its_key, hold=hold)


def is_there(pool: BlockPool, name: object) -> bool:
    return pool.find(name if isinstance(name, bytes) else key(name)) is not None
