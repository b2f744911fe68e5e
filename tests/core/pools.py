"""Small pools, and deaths without processes, for the tests of the core.

- Without fields unless asked: torch costs two seconds per process, and only views need it.
- `abandon(pool)` is what death is to everyone else: the process's locks fall and nothing is given
  back. It does *not* unmap, as a real death does; the tests that need that kill a child.
"""

from __future__ import annotations

from shmblocks import BlockHandle, BlockPool, Field, PoolConfig
from shmblocks._os.filelock import FileLocks
from shmblocks._os.segment import open_existing
from shmblocks._state.counters import BUCKETS, Histogram
from shmblocks._state.layout import WORD

BLOCK_SIZE = 4


def tiny(
    blocks: int = 16,
    *,
    fields: tuple[Field, ...] = (),
    block_size: int = BLOCK_SIZE,
    default_num_blocks: int = 2,
    max_participants: int = 8,
    max_leases: int = 16,
    unclaimed_timeout: float = 300.0,
    lock_timeout: float = 20.0,
    group: str | None = None,
) -> PoolConfig:
    """A config of a few KiB."""
    return PoolConfig(
        total_tokens=blocks * block_size,
        fields=fields,
        block_size=block_size,
        default_num_blocks=default_num_blocks,
        max_participants=max_participants,
        max_leases=max_leases,
        unclaimed_timeout=unclaimed_timeout,
        lock_timeout=lock_timeout,
        group=group,
    )


def create(name: str, config: PoolConfig | None = None, *, role: str = "") -> BlockPool:
    """A pool without the thread that prefaults: nothing here is worth one."""
    return BlockPool.create(name, config or tiny(), role=role, prefault="off")


def attach(name: str, *, timeout: float = 0.0, role: str = "") -> BlockPool:
    return BlockPool.attach(name, timeout=timeout, role=role, prefault="off")


def take(pool: BlockPool, num_tokens: int = 1, req_id: str | None = None) -> BlockHandle:
    """A reservation that there must be room for."""
    handle = pool.alloc(num_tokens, req_id)
    assert handle is not None, f"no room for {num_tokens} tokens in {pool}"
    return handle


def abandon(pool: BlockPool) -> None:
    """Die, as everyone else sees it."""
    pool._finalizer.detach()
    pool.state.close()


def word(pool: BlockPool, index: int) -> int:
    """One word of the segment."""
    value: int = pool.state.segment.words[index]
    return value


def set_word(pool: BlockPool, index: int, value: int) -> None:
    """Write into the segment behind the pool's back."""
    pool.state.segment.words[index] = value


def state_of(pool: BlockPool) -> bytes:
    """Everything that is under the lock, but for the words that every entry writes: of any process,
    as one that lists all pools of the machine."""
    state = pool.state
    held = state.layout.counters + Histogram.LOCK_HELD * WORD
    parts = (
        (16 * WORD, 21 * WORD),
        (4096, held),
        (held + (1 + BUCKETS) * WORD, state.layout.state_bytes),
    )
    return b"".join(bytes(state.segment.memory[start:end]) for start, end in parts)


def is_entered(stranger: FileLocks) -> bool:
    """Whether somebody is inside of the segment that these locks are on."""
    if stranger.try_enter():
        stranger.leave()
        return False
    return True


def locks_of(name: str) -> FileLocks:
    """File locks of a stranger on the segment of that name; close them."""
    with open_existing(name) as file:
        return FileLocks(file.fileno())
