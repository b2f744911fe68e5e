"""Eviction: which entries go when an allocation finds no free run, and what is never touched."""

from __future__ import annotations

import random
import threading
import time

import msgspec
import pytest

from shmblocks import UNBOUNDED, BlockHandle, BlockPool, PoolTimeoutError, State
from shmblocks._state import pool_state
from shmblocks.config import Allocation
from tests.cache import kit
from tests.support.children import wait_until

BLOCKS = 32


def fill(pool: BlockPool, blocks: int = 1) -> list[int]:
    """Entries 0, 1, 2 ... in the order of their blocks, the first one the oldest."""
    names = list(range(BLOCKS // blocks))
    for name in names:
        kit.put(pool, name, blocks)
    return names


def there(pool: BlockPool, names: list[int]) -> list[int]:
    return [name for name in names if kit.is_there(pool, name)]


def test_the_oldest_entry_goes(pool: BlockPool) -> None:
    names = fill(pool)
    pool.free(kit.reserve(pool))
    assert there(pool, names) == names[1:]


def test_an_entry_that_was_used_stays_and_the_next_one_goes(pool: BlockPool) -> None:
    names = fill(pool)
    pool.touch(kit.key(0))
    for lease in pool.get(kit.key(1)) or []:
        lease.release()
    pool.free(kit.reserve(pool))
    assert there(pool, names) == [0, 1, *names[3:]]


def test_the_window_whose_youngest_entry_is_the_oldest_goes(pool: BlockPool) -> None:
    """0 is the oldest entry, but its neighbour was just used: two blocks are taken elsewhere."""
    names = fill(pool)
    pool.touch(kit.key(1))
    handle = kit.reserve(pool, 2)
    assert handle.start_block == 2
    assert there(pool, names) == [0, 1, *names[4:]]
    pool.free(handle)


def test_free_blocks_are_part_of_a_window(pool: BlockPool) -> None:
    names = fill(pool)
    pool.drop(kit.key(20))
    handle = kit.reserve(pool, 2)
    # Beside the free block, 19 is older than 21; 0 and 1 together are older still.
    assert handle.start_block == 0
    pool.free(handle)
    for name in range(2, 19):
        pool.touch(kit.key(name))
    handle = kit.reserve(pool, 3)
    assert (handle.start_block, there(pool, [19, 21, 22])) == (19, [22])
    pool.free(handle)
    assert len(there(pool, names)) == 32 - 2 - 1 - 2


def test_as_few_entries_as_possible_go(pool: BlockPool) -> None:
    names = fill(pool, 4)
    handle = kit.reserve(pool, 4)
    assert there(pool, names) == names[1:]
    pool.free(handle)
    before = pool.cache_stats()
    assert (before.evictions, before.skipped) == (1, 0)


def test_an_entry_of_the_whole_pool_may_evict_everything(pool: BlockPool) -> None:
    fill(pool)
    kit.put(pool, "whole", BLOCKS)
    assert [entry.key[:16] for entry in pool.entries()] == [kit.key("whole")]
    assert pool.cache_stats().evictions == 32
    kit.put(pool, "small")
    assert [entry.key[:16] for entry in pool.entries()] == [kit.key("small")]


def test_a_leased_entry_is_never_evicted(pool: BlockPool) -> None:
    names = fill(pool)
    (lease,) = pool.get(kit.key(0)) or []
    for name in names[1:]:
        pool.touch(kit.key(name))
    kept = [kit.reserve(pool) for _ in range(31)]
    assert there(pool, names) == [0]
    assert pool.alloc(1) is None
    lease.release()
    kept.append(kit.reserve(pool))
    assert there(pool, names) == []
    for handle in kept:
        pool.free(handle)


def test_a_lease_that_travels_keeps_its_entry(pool: BlockPool) -> None:
    kit.put(pool, "a", BLOCKS)
    (lease,) = pool.get(kit.key("a")) or []
    ticket = lease.ticket()
    assert pool.alloc(1) is None
    assert pool.revoke(ticket)
    pool.free(kit.reserve(pool))


def test_a_held_entry_is_not_evicted_before_its_time(
    pool: BlockPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit.put(pool, "a", BLOCKS // 2, hold=1000.0)
    kit.put(pool, "b", BLOCKS // 2)
    pool.touch(kit.key("b"), hold=2000.0)
    assert pool.alloc(1) is None
    assert len(pool.entries()) == 2
    real = time.monotonic_ns
    monkeypatch.setattr(time, "monotonic_ns", lambda: real() + int(1500e9))
    handle = pool.alloc(1)
    monkeypatch.undo()
    assert handle is not None
    pool.free(handle)
    assert [entry.key[:16] for entry in pool.entries()] == [kit.key("b")]


def test_a_shorter_hold_does_not_shorten_a_longer_one(pool: BlockPool) -> None:
    kit.put(pool, "a", hold=1000.0)
    pool.touch(kit.key("a"), hold=1.0)
    assert pool.entries()[0].hold_seconds > 900.0


def test_an_entry_with_announced_readers_is_not_evicted(pool: BlockPool) -> None:
    handle = kit.put(pool, "a", BLOCKS, readers=1)
    assert pool.alloc(1) is None
    with pool.open(handle):
        assert pool.alloc(1) is None


def test_what_has_no_key_is_not_evicted(pool: BlockPool) -> None:
    first = pool.publish(kit.reserve(pool, BLOCKS // 2), readers=UNBOUNDED)
    second = kit.reserve(pool, BLOCKS // 2)
    assert pool.alloc(1) is None
    pool.free(first)
    pool.free(second)


def test_when_no_window_is_large_enough_nothing_is_evicted(pool: BlockPool) -> None:
    names = fill(pool)
    leases = [lease for name in (10, 21) for lease in pool.get(kit.key(name)) or []]
    assert pool.alloc(11 * kit.BLOCK_SIZE) is None
    assert there(pool, names) == names
    handle = kit.reserve(pool, 10)
    assert there(pool, names) == names[10:]
    pool.free(handle)
    for lease in leases:
        lease.release()


def test_who_waits_comes_first_and_is_served_by_eviction(pool: BlockPool) -> None:
    fill(pool, BLOCKS)
    (lease,) = pool.get(kit.key(0)) or []
    got: list[BlockHandle | None] = []
    waiter = threading.Thread(target=lambda: got.append(pool.alloc(1, timeout=60.0)))
    waiter.start()
    wait_until(lambda: bool(pool.waiters()), "one waits")
    assert pool.alloc(1) is None
    lease.release()
    waiter.join()
    assert got[0] is not None
    pool.free(got[0])
    assert pool.entries() == []


def test_who_waits_is_woken_when_a_reservation_becomes_an_entry(pool: BlockPool) -> None:
    handle = kit.reserve(pool, BLOCKS)
    got: list[BlockHandle | None] = []
    waiter = threading.Thread(target=lambda: got.append(pool.alloc(1, timeout=60.0)))
    waiter.start()
    wait_until(lambda: bool(pool.waiters()), "one waits")
    pool.publish(handle, readers=UNBOUNDED, key=kit.key("a"))
    waiter.join()
    assert got[0] is not None
    pool.free(got[0])


def test_who_waits_in_vain_is_told_who_holds_the_blocks(pool: BlockPool) -> None:
    fill(pool, BLOCKS)
    leases = pool.get(kit.key(0)) or []
    with pytest.raises(PoolTimeoutError, match="held by"):
        pool.alloc(1, timeout=0.01)
    for lease in leases:
        lease.release()


def test_evicted_blocks_and_entries_are_counted(pool: BlockPool) -> None:
    fill(pool, 4)
    kit.put(pool, "large", 10)
    stats = pool.cache_stats()
    assert (stats.evictions, stats.entries) == (3, 6)


# ---- more entries than are looked at -------------------------------------------------------------


def test_of_many_entries_those_behind_the_cursor_go_first(
    pool: BlockPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_state, "MOST_ITEMS", 8)
    names = fill(pool)
    for name in range(8):
        pool.touch(kit.key(name))
    # The cursor is at 0: 8 is the oldest, but 0 to 7 are looked at.
    handle = kit.reserve(pool)
    assert handle.start_block == 0
    pool.free(handle)
    assert there(pool, names) == names[1:]


def test_of_many_entries_all_are_looked_at_before_an_allocation_fails(
    pool: BlockPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_state, "MOST_ITEMS", 8)
    names = fill(pool)
    leases = [lease for name in range(20) for lease in pool.get(kit.key(name)) or []]
    handle = kit.reserve(pool, 12)
    assert there(pool, names) == names[:20]
    pool.free(handle)
    for lease in leases:
        lease.release()


def test_a_window_of_more_entries_than_are_looked_at_is_found(
    pool: BlockPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_state, "MOST_ITEMS", 8)
    fill(pool)
    pool.free(kit.reserve(pool, 24))
    assert len(pool.entries()) == 8


@pytest.mark.parametrize("cursor", range(0, BLOCKS, 5))
def test_wherever_the_cursor_is_room_is_found(
    pool: BlockPool, monkeypatch: pytest.MonkeyPatch, cursor: int
) -> None:
    monkeypatch.setattr(pool_state, "MOST_ITEMS", 8)
    if cursor:
        pool.free(kit.reserve(pool, cursor))
    fill(pool)
    for size in (1, 2, 3, 7, 8, 9):
        pool.free(kit.reserve(pool, size))
    assert pool.check() == []


@pytest.mark.parametrize("allocation", ["next fit", "first fit"])
def test_after_whatever_came_and_went_room_is_found_if_there_is_any(
    pool_name: str, monkeypatch: pytest.MonkeyPatch, allocation: Allocation
) -> None:
    """The cursor is always where an allocation or a free block begins, so that a walk can begin."""
    chooser = random.Random(3)
    monkeypatch.setattr(pool_state, "MOST_ITEMS", 2)
    config = msgspec.structs.replace(kit.config(), allocation=allocation)
    with BlockPool.create(pool_name, config, prefault="off") as pool:
        held: list[BlockHandle] = []
        for number in range(600):
            size = chooser.choice((1, 1, 2, 3, 5, 9))
            handle = pool.alloc(size * kit.BLOCK_SIZE)
            largest = _largest_run(pool)
            if handle is None:
                assert largest < size
            elif chooser.random() < 0.3:
                held.append(handle)
            else:
                pool.publish(handle, readers=UNBOUNDED, key=kit.key(number))
            if held and chooser.random() < 0.4:
                grown = held.pop(chooser.randrange(len(held)))
                pool.free(pool.grow(grown, grown.num_tokens + kit.BLOCK_SIZE) or grown)
            if chooser.random() < 0.2:
                pool.drop(kit.key(chooser.randrange(number + 1)))
        assert pool.check() == []


def _largest_run(pool: BlockPool) -> int:
    """Consecutive blocks that are free or evictable."""
    walls = {
        block
        for info in pool.allocations()
        if info.state is not State.PUBLISHED
        for block in range(info.start_block, info.start_block + info.num_blocks)
    }
    text = "".join("x" if block in walls else "." for block in range(BLOCKS))
    return max(map(len, text.split("x")))
