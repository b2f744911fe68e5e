"""Bytes that something else wrote: an error that says so, or a right answer; never more.

Every segment here is a copy of a real pool's, damaged, and put in the real one's place. The doors
that read it are `attach`, the inspector, the listing and `create`.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmblocks import (
    BlockHandle,
    BlockPool,
    DamagedPoolError,
    IncompatiblePoolError,
    Lease,
    PoolExistsError,
    PoolInspector,
    PoolTimeoutError,
    ShmBlocksError,
    list_pools,
)
from shmblocks._os.filelock import PLACE_BYTE
from shmblocks._os.segment import path_of
from shmblocks._state.layout import (
    CONFIG_BYTES,
    HEADER_BYTES,
    LAYOUT_VERSION,
    LEASE_WORDS,
    RECORD_WORDS,
    Layout,
)
from shmblocks.channel import Channel
from shmblocks.inspector import _summary
from tests.core import pools
from tests.core.conftest import require_right
from tests.support import naming

CONFIG = msgspec.structs.replace(
    pools.tiny(8, max_participants=2, max_leases=2, lock_timeout=0.5),
    max_waiters=2,
    max_claims=2,
    channels=2,
    channel_slots=40,
    # The image is made when the module is imported, and read minutes later.
    unclaimed_timeout=86_400.0,
)
KEY = b"k" * 16


# A lease whose release found damage is still open when it is dropped.
pytestmark = pytest.mark.filterwarnings("ignore:.*lease was not released:ResourceWarning")


def image_of(name: str) -> bytes:
    """The bytes of a small pool in which something is reserved, published, leased, found by a key,
    claimed, and on its way through a channel."""
    with pools.create(name, CONFIG) as pool, pools.attach(name) as other:
        pools.take(pool, 5)
        pool.publish(pools.take(pool))
        pool.publish(pools.take(pool), key=KEY)
        assert pool.claim(b"c" * 16).state == "mine"
        pool.channel("c", 2).send(pools.take(pool), message=b"m")
        lease = other.open(pool.publish(pools.take(pool), readers=2))
        image = Path(path_of(name)).read_bytes()
        lease.release()
    return image


IMAGE = image_of(naming.new_pool_name())


@contextlib.contextmanager
def segment(image: bytes, *, is_alive: bool = True) -> Iterator[str]:
    """A segment of these bytes; somebody who only holds a slot keeps it alive."""
    name = naming.new_pool_name()
    path = Path(path_of(name))
    path.write_bytes(image)
    keeper = pools.locks_of(name)
    if is_alive:
        assert keeper.try_lock(PLACE_BYTE + 999)
    try:
        yield name
    finally:
        keeper.close()
        path.unlink(missing_ok=True)


def with_word(image: bytes, index: int, value: int) -> bytes:
    return image[: index * 8] + value.to_bytes(8, "little") + image[index * 8 + 8 :]


def test_the_undamaged_copy_is_a_pool_like_any_other() -> None:
    # Or everything below would prove nothing.
    with segment(IMAGE) as name, pools.attach(name) as pool:
        # Its two participants are dead, so that joining took the slot, and all blocks, of one.
        require_right(pool)
        pool.reap()
        stats = pool.stats()
        assert (stats.participants, stats.dead_participants) == (1, 0)
        assert (stats.reserved_blocks, stats.published_blocks) == (0, 4)
        pools.take(pool)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 39, 40, 4095, 4096, 20479, len(IMAGE) - 1])
def test_a_truncated_pool_is_told(size: int) -> None:
    with segment(IMAGE[:size]) as name:
        with pytest.raises(
            (DamagedPoolError, IncompatiblePoolError), match=r"truncated|not a pool"
        ):
            pools.attach(name)
        assert {"incompatible"} >= {each.state for each in list_pools() if each.name[1:] == name}


def test_a_pool_that_is_longer_than_it_says_is_told() -> None:
    with (
        segment(IMAGE + bytes(4096)) as name,
        pytest.raises(DamagedPoolError, match=rf"of {len(IMAGE)} bytes, got \d+"),
    ):
        pools.attach(name)


@pytest.mark.parametrize(
    ("index", "value", "error", "said"),
    [
        (0, 0, IncompatiblePoolError, "not a pool"),
        (0, int.from_bytes(b"SHMBLKZ\0", "little"), IncompatiblePoolError, "not a pool"),
        (1, 0, IncompatiblePoolError, f"expected layout version {LAYOUT_VERSION}, got 0"),
        (1, 999, IncompatiblePoolError, "got 999: use the shmblocks version that created it"),
        (3, 0, DamagedPoolError, "expected a segment of 0 bytes"),
        (3, 2**64 - 1, DamagedPoolError, "truncated"),
        (HEADER_BYTES // 8, 2**64 - 1, DamagedPoolError, "config is damaged"),
        (HEADER_BYTES // 8, CONFIG_BYTES, DamagedPoolError, "config is damaged"),
        (HEADER_BYTES // 8, 0, DamagedPoolError, "config is damaged"),
        (HEADER_BYTES // 8, 20, DamagedPoolError, "config is damaged"),
        (HEADER_BYTES // 8 + 1, 0, DamagedPoolError, "config is damaged"),
    ],
)
def test_a_damaged_header_is_told(
    index: int, value: int, error: type[ShmBlocksError], said: str
) -> None:
    with segment(with_word(IMAGE, index, value)) as name:
        with pytest.raises(error, match=said):
            pools.attach(name)
        with pytest.raises(error, match=said):
            PoolInspector(name)


def test_a_config_that_needs_another_size_than_the_segment_has_is_told() -> None:
    wrong = IMAGE.replace(b"\xaamax_leases\x02", b"\xaamax_leases\x7f")
    assert wrong != IMAGE
    with (
        segment(wrong) as name,
        pytest.raises(DamagedPoolError, match=r"header is damaged"),
    ):
        pools.attach(name)


# --- anything anywhere ------------------------------------------------------------------------

LAYOUT = Layout(CONFIG)


def use_in_every_way(name: str) -> None:
    """All doors, then every operation; whatever is raised must be one of the library's errors."""
    # Not `list_pools`: it looks at the pools of everybody else on this machine too.
    with contextlib.suppress(ShmBlocksError):
        _summary(f"/{name}")
    with contextlib.suppress(ShmBlocksError):
        inspect(name)
    try:
        pool = pools.attach(name)
    except ShmBlocksError:
        pass
    else:
        for operation in operations(pool):
            with contextlib.suppress(ShmBlocksError):
                operation()
        close_or_abandon(pool)
    with contextlib.suppress(PoolExistsError):
        pools.create(name, CONFIG).close()


def inspect(name: str) -> None:
    with PoolInspector(name) as inspector:
        for look in (
            inspector.stats, inspector.allocations, inspector.participants, inspector.waiters,
            inspector.check, inspector.snapshot,
        ):  # fmt: skip
            with contextlib.suppress(ShmBlocksError):
                look()


def release_all(leases: list[Lease]) -> None:
    for lease in leases:
        lease.release()


def operations(pool: BlockPool) -> Iterator[Callable[[], object]]:
    """Every operation, on everything that the pool says it has, and on what it does not have."""
    yield pool.stats
    yield pool.check
    yield pool.allocations
    yield pool.participants
    yield lambda: pool.alloc(1)
    handles = []
    for block in range(CONFIG.total_blocks):
        with contextlib.suppress(ShmBlocksError):
            handles.append(pool.handle_at(block))
    handles.append(BlockHandle(9, 9, 9, 9, pool.pool_id))
    for handle in handles:
        yield lambda handle=handle: pool.grow(handle, handle.num_tokens + 1)  # type: ignore[misc]
        yield lambda handle=handle: pool.publish(handle)  # type: ignore[misc]
        yield lambda handle=handle: pool.open(handle).release()  # type: ignore[misc]
        yield lambda handle=handle: pool.open_for_write(handle).release()  # type: ignore[misc]
        yield lambda handle=handle: pool.forgo(handle)  # type: ignore[misc]
    yield pool.entries
    yield pool.cache_stats
    yield lambda: pool.find(KEY)
    yield lambda: pool.touch(KEY)
    yield lambda: release_all(pool.get(KEY) or [])
    yield lambda: pool.claim(b"c" * 16)
    yield lambda: pool.end_claim(b"c" * 16)
    yield lambda: release_all(channel(pool, "c").receive_many(2, timeout=0))
    yield lambda: channel(pool, "d").send(pools.take(pool), message=b"m", timeout=0)
    yield lambda: pool.publish(pools.take(pool), key=b"n" * 16)
    yield lambda: pool.drop(KEY)
    yield pool.reap
    for handle in handles:
        yield lambda handle=handle: pool.free(handle)  # type: ignore[misc]
    yield pool.available_blocks
    yield lambda: pool.alloc_blocks(CONFIG.total_blocks, 1)
    yield pool.reap
    yield pool.check


def channel(pool: BlockPool, name: str) -> Channel:
    """Numbers of a channel that were damaged may leave no room for it: that is an answer too."""
    try:
        return pool.channel(name, 2)
    except ValueError as error:
        raise PoolTimeoutError(str(error)) from error


def close_or_abandon(pool: BlockPool) -> None:
    try:
        pool.close()
    except ShmBlocksError:
        pools.abandon(pool)


INTERESTING = [0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 2**16, 2**31, 2**32, 2**48, 2**63, 2**64 - 1]
# Where what counts stands: identity and control words, the journal's head and first entry,
# participants, waiters,
# leases, claims, channels, records, the lists of allocations and keys, bitmap.
TARGETS = [
    *range(40),
    *range(LAYOUT.journal // 8, LAYOUT.journal // 8 + 12),
    *range(LAYOUT.participants // 8, LAYOUT.participants // 8 + 32),
    *range(LAYOUT.waiters // 8, LAYOUT.waiters // 8 + 16),
    *range(LAYOUT.leases // 8, LAYOUT.leases // 8 + 2 * LEASE_WORDS),
    *range(LAYOUT.claims // 8, LAYOUT.claims // 8 + 16),
    *range(LAYOUT.channels // 8, LAYOUT.channels // 8 + 32),
    *range(LAYOUT.messages // 8, LAYOUT.messages // 8 + 12),
    *range(LAYOUT.records // 8, LAYOUT.records // 8 + 8 * RECORD_WORDS),
    *range(LAYOUT.live // 8, LAYOUT.live // 8 + 8),
    *range(LAYOUT.buckets // 8, LAYOUT.buckets // 8 + 8),
    LAYOUT.bitmap // 8,
]


@settings(max_examples=120)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(TARGETS),
            st.sampled_from(INTERESTING) | st.integers(0, 2**64 - 1),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_damaged_words_give_an_error_or_an_answer(words: list[tuple[int, int]]) -> None:
    image = IMAGE
    for index, value in words:
        image = with_word(image, index, value)
    with segment(image) as name:
        use_in_every_way(name)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(HEADER_BYTES, HEADER_BYTES + 250), st.integers(0, 255)),
        min_size=1,
        max_size=6,
    )
)
def test_a_config_of_damaged_bytes_gives_an_error_or_an_answer(
    damage: list[tuple[int, int]],
) -> None:
    image = bytearray(IMAGE)
    for offset, value in damage:
        image[offset] = value
    with segment(bytes(image)) as name:
        use_in_every_way(name)


def test_random_bytes_all_over_the_state_give_an_error_or_an_answer(rng: random.Random) -> None:
    for _ in range(40):
        image = bytearray(IMAGE)
        for _ in range(rng.choice((1, 8, 64, 1024))):
            image[rng.randrange(20480, LAYOUT.state_bytes)] = rng.randrange(256)
        with segment(bytes(image)) as name:
            use_in_every_way(name)


def test_a_pool_whose_journal_was_damaged_can_still_be_closed(pool_name: str) -> None:
    pool = pools.create(pool_name)
    pools.set_word(pool, pool.state.layout.journal // 8, 2**64 - 1)
    with pytest.raises(DamagedPoolError, match="journal is damaged"):
        pool.alloc(1)
    with pytest.raises(DamagedPoolError, match="journal is damaged"):
        pool.close()
    # It cannot give back what it held; but it is out, so that the name can be used again.
    assert pool.is_closed
    with pools.create(pool_name) as new:
        require_right(new)
