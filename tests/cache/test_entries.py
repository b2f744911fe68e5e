"""Entries: published under a key, looked up, leased, dropped."""

from __future__ import annotations

import threading

import pytest

from shmblocks import (
    UNBOUNDED,
    BlockPool,
    InvalidStateError,
    KeyExistsError,
    PoolClosedError,
    ShmBlocksError,
    StaleHandleError,
    State,
    TooManyLeasesError,
)
from tests.cache import kit
from tests.support.children import run_in_child, run_in_fork


def attach(name: str) -> BlockPool:
    return BlockPool.attach(name, prefault="off")


# ---- publishing ----------------------------------------------------------------------------------


def test_what_is_published_under_a_key_is_found_by_it(pool: BlockPool) -> None:
    handle = kit.put(pool, "a", 2)
    found = pool.find(kit.key("a"))
    assert found is not None
    assert found == (handle, True)
    assert pool.find(kit.key("b")) is None


def test_another_process_finds_it(pool: BlockPool) -> None:
    handle = kit.put(pool, "a")
    assert run_in_child(_find_elsewhere, pool.name, kit.key("a")) == handle


def _find_elsewhere(name: str, key: bytes) -> object:
    with attach(name) as pool:
        found = pool.find(key)
        return found and found.handle


def test_of_two_publishers_of_a_key_one_wins_and_the_others_blocks_are_free(
    pool: BlockPool,
) -> None:
    winner = kit.put(pool, "a")
    loser = kit.reserve(pool, 3)
    free = pool.available_blocks()
    with pytest.raises(KeyExistsError, match="another process was faster") as told:
        pool.publish(loser, readers=UNBOUNDED, key=kit.key("a"))
    assert told.value.handle == winner
    assert pool.available_blocks() == free + 3
    with pytest.raises(StaleHandleError):
        pool.free(loser)
    assert pool.cache_stats().duplicates == 1


def test_a_reservation_that_lost_is_over_and_not_freed_twice(pool: BlockPool) -> None:
    kit.put(pool, "a")
    with pool.reserve(4) as reservation, pytest.raises(KeyExistsError):
        reservation.publish(readers=UNBOUNDED, key=kit.key("a"))
    assert pool.available_blocks() == 31


def test_a_shorter_length_is_published_with_the_entry(pool: BlockPool) -> None:
    handle = pool.publish(kit.reserve(pool), readers=UNBOUNDED, num_tokens=3, key=kit.key("a"))
    assert handle.num_tokens == 3
    found = pool.find(kit.key("a"))
    assert found is not None
    assert found.handle == handle


def test_without_unbounded_readers_the_last_announced_one_ends_the_entry(pool: BlockPool) -> None:
    handle = kit.put(pool, "a", readers=2)
    (first,) = pool.get(kit.key("a")) or []
    second = pool.open(handle)
    first.release()
    assert kit.is_there(pool, "a")
    second.release()
    assert not kit.is_there(pool, "a")
    assert pool.available_blocks() == 32


def test_an_entry_whose_readers_have_all_come_is_a_miss(pool: BlockPool) -> None:
    kit.put(pool, "a", readers=1)
    (only,) = pool.get(kit.key("a")) or []
    assert pool.get(kit.key("a")) is None
    only.release()


def test_more_leases_than_readers_are_announced_is_a_miss_and_takes_none(pool: BlockPool) -> None:
    kit.put(pool, "a", readers=2)
    assert pool.get(kit.key("a"), leases=3) is None
    assert pool.stats().leases == 0
    for lease in pool.get(kit.key("a"), leases=2) or []:
        lease.release()


def test_an_entry_with_an_open_writer_cannot_be_published(pool: BlockPool) -> None:
    handle = kit.reserve(pool)
    with pool.open_for_write(handle):
        with pytest.raises(InvalidStateError, match="writer's lease"):
            pool.publish(handle, readers=UNBOUNDED, key=kit.key("a"))
        assert not kit.is_there(pool, "a")
    pool.free(handle)


@pytest.mark.parametrize("hold", [-1.0, float("nan"), float("inf")])
def test_a_hold_that_is_no_duration_is_refused(pool: BlockPool, hold: float) -> None:
    handle = kit.reserve(pool)
    with pytest.raises(ValueError, match="hold: expected seconds"):
        pool.publish(handle, readers=UNBOUNDED, key=kit.key("a"), hold=hold)
    pool.free(handle)
    with pytest.raises(ValueError, match="hold"):
        pool.touch(kit.key("a"), hold=hold)


def test_entries_outlive_their_producer(pool: BlockPool) -> None:
    run_in_child(_put_and_leave, pool.name)
    assert kit.is_there(pool, "a")
    pool.reap()
    assert kit.is_there(pool, "a")


def _put_and_leave(name: str) -> None:
    with attach(name) as pool:
        kit.put(pool, "a")


# ---- looking up ----------------------------------------------------------------------------------


def test_get_gives_leases_that_keep_the_entry(pool: BlockPool) -> None:
    handle = kit.put(pool, "a", 2)
    leases = pool.get(kit.key("a"), leases=3)
    assert leases is not None
    assert [lease.handle for lease in leases] == [handle] * 3
    assert pool.stats().leases == 3
    for lease in leases:
        lease.release()
    assert kit.is_there(pool, "a")
    assert pool.stats().leases == 0


def test_a_key_without_an_entry_is_a_miss(pool: BlockPool) -> None:
    assert pool.get(kit.key("a")) is None
    assert not pool.touch(kit.key("a"))
    assert not pool.drop(kit.key("a"))


def test_another_number_of_tokens_is_a_miss_and_counted(pool: BlockPool) -> None:
    kit.put(pool, "a", 2)
    assert pool.get(kit.key("a"), num_tokens=7) is None
    assert pool.stats().leases == 0
    for lease in pool.get(kit.key("a"), num_tokens=8) or []:
        lease.release()
    stats = pool.cache_stats()
    assert (stats.lookups, stats.hits, stats.misses, stats.mismatches) == (2, 1, 0, 1)


@pytest.mark.parametrize("leases", [0, -1])
def test_no_lease_at_all_cannot_be_asked_for(pool: BlockPool, leases: int) -> None:
    with pytest.raises(ValueError, match="leases: expected a whole number"):
        pool.get(kit.key("a"), leases=leases)


def test_when_not_all_leases_are_to_be_had_none_is_taken(pool: BlockPool) -> None:
    kit.put(pool, "a")
    with pytest.raises(TooManyLeasesError):
        pool.get(kit.key("a"), leases=65)
    assert pool.stats().leases == 0
    leases = pool.get(kit.key("a"), leases=64)
    assert leases is not None
    for lease in leases:
        lease.release()


def test_find_touches_and_counts_nothing(pool: BlockPool) -> None:
    kit.put(pool, "old")
    kit.put(pool, "young")
    before = pool.cache_stats()
    pool.find(kit.key("old"))
    assert pool.cache_stats() == before
    assert next(entry.key for entry in pool.entries()).startswith(kit.key("old"))


def test_touch_and_get_make_an_entry_young(pool: BlockPool) -> None:
    for name in "abc":
        kit.put(pool, name)
    assert pool.touch(kit.key("a"))
    for lease in pool.get(kit.key("b")) or []:
        lease.release()
    order = [entry.key[:16] for entry in pool.entries()]
    assert order == [kit.key(name) for name in "cab"]
    assert [entry.hits for entry in pool.entries()] == [0, 0, 1]


def test_find_in_a_closed_pool_says_so(pool: BlockPool) -> None:
    kit.put(pool, "a")
    pool.close()
    with pytest.raises(PoolClosedError):
        pool.find(kit.key("a"))
    with pytest.raises(PoolClosedError):
        pool.get(kit.key("a"))


def test_find_is_right_while_others_change_the_index(pool: BlockPool) -> None:
    """An entry that stays is always found; a record in the middle of a change is not damage."""
    keys = kit.same_bucket(4, 32)
    kit.put(pool, keys[0])
    problems: list[object] = []
    is_over = threading.Event()

    def look() -> None:
        with attach(pool.name) as other:
            while not is_over.is_set():
                try:
                    if other.find(keys[0]) is None:
                        problems.append("not found")
                    for each in keys[1:]:
                        other.find(each)
                except ShmBlocksError as error:
                    problems.append(error)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(600):
        each = keys[1 + number % 3]
        handle = kit.put(pool, each, 1 + number % 3)
        if number % 2:
            pool.drop(each)
        else:
            pool.free(handle)
    is_over.set()
    for thread in threads:
        thread.join()
    assert problems == []


# ---- dropping ------------------------------------------------------------------------------------


def test_drop_frees_an_entry_at_once(pool: BlockPool) -> None:
    kit.put(pool, "a", 2)
    assert pool.drop(kit.key("a"))
    assert not kit.is_there(pool, "a")
    assert pool.available_blocks() == 32


def test_a_dropped_entry_with_open_leases_is_unreachable_and_its_content_stays(
    pool: BlockPool,
) -> None:
    kit.put(pool, "a", 2)
    (lease,) = pool.get(kit.key("a")) or []
    assert pool.drop(kit.key("a"))
    assert not kit.is_there(pool, "a")
    assert pool.get(kit.key("a")) is None
    assert pool.available_blocks() == 30
    new = kit.put(pool, "a", 2)
    assert new.start_block != lease.handle.start_block
    lease.release()
    assert pool.available_blocks() == 30
    assert kit.is_there(pool, "a")


def test_free_by_handle_takes_the_key_out(pool: BlockPool) -> None:
    pool.free(kit.put(pool, "a"))
    assert not kit.is_there(pool, "a")


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_any_link_of_a_chain_can_go(pool: BlockPool, victim: int) -> None:
    keys = kit.same_bucket(3, 32)
    for key in keys:
        kit.put(pool, key)
    assert pool.drop(keys[victim])
    assert [kit.is_there(pool, key) for key in keys] == [at != victim for at in range(3)]
    assert pool.check() == []


def test_drop_all_frees_every_entry_and_nothing_else(pool: BlockPool) -> None:
    for number in range(20):
        kit.put(pool, number)
    (lease,) = pool.get(kit.key(7)) or []
    reservation = kit.reserve(pool, 2)
    plain = pool.publish(kit.reserve(pool, 2))
    assert pool.drop_all() == 20
    assert pool.entries() == []
    states = sorted(info.state for info in pool.allocations())
    assert states == sorted([State.DRAINING, State.RESERVED, State.PUBLISHED])
    lease.release()
    pool.free(reservation)
    pool.free(plain)
    assert pool.drop_all() == 0


def test_a_full_index_and_an_empty_one(pool: BlockPool) -> None:
    for number in range(32):
        kit.put(pool, number)
    assert all(kit.is_there(pool, number) for number in range(32))
    assert pool.check() == []
    for number in range(32):
        assert pool.drop(kit.key(number))
    assert pool.check() == []
    assert pool.cache_stats().entries == 0


# ---- after a fork --------------------------------------------------------------------------------


def test_a_forked_child_uses_the_cache_as_a_participant_of_its_own(pool: BlockPool) -> None:
    kit.put(pool, "a")
    (lease,) = pool.get(kit.key("a")) or []

    def child() -> bool:
        (own,) = pool.get(kit.key("a")) or []
        kit.put(pool, "b")
        own.release()
        return True

    assert run_in_fork(child)
    assert kit.is_there(pool, "b")
    assert pool.stats().leases == 1
    lease.release()


# ---- counting ------------------------------------------------------------------------------------


def test_counters_survive_those_who_counted(pool: BlockPool) -> None:
    run_in_child(_put_and_leave, pool.name)
    run_in_child(_look_twice, pool.name)
    stats = pool.cache_stats()
    assert (stats.puts, stats.lookups, stats.hits, stats.misses) == (1, 2, 1, 1)
    assert (stats.entries, stats.bytes_in_entries) == (1, 0)


def _look_twice(name: str) -> None:
    with attach(name) as pool:
        for lease in pool.get(kit.key("a")) or []:
            lease.release()
        pool.get(kit.key("b"))


def test_entries_say_how_long_they_are_held(pool: BlockPool) -> None:
    kit.put(pool, "a", hold=100.0)
    kit.put(pool, "b")
    held = {entry.key[:16]: entry.hold_seconds for entry in pool.entries()}
    assert 90.0 < held[kit.key("a")] <= 100.0
    assert held[kit.key("b")] == 0.0
    assert pool.cache_stats().held_entries == 1
