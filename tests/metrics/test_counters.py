"""What is counted, by whom, and that it outlives those who did it."""

from __future__ import annotations

import math
import struct
import threading

import pytest

from shmblocks import BlockPool, PoolInspector, PoolTimeoutError
from shmblocks._state.counters import BUCKETS
from shmblocks._state.info import CounterValues, HistogramValues
from shmblocks._state.layout import H_CURSOR, UNBOUNDED, WORD
from shmblocks._state.shared_segment import TIMED_OF
from tests.core.pools import BLOCK_SIZE, attach, create, take, tiny
from tests.support.children import Channel, fork, wait_until

BLOCKS = 16
ALL = BLOCKS * BLOCK_SIZE


def counted(pool: BlockPool) -> CounterValues:
    return pool.stats().counters


def test_a_new_pool_has_counted_nothing(pool_name: str) -> None:
    with create(pool_name) as pool:
        values = counted(pool)
        assert (values.allocations, values.publishes, values.opens, values.releases) == (0, 0, 0, 0)
        assert values.alloc_wait == HistogramValues(count=0, sum_seconds=0.0, buckets=[0] * BUCKETS)


def test_each_step_of_a_handoff_is_counted(pool_name: str) -> None:
    with create(pool_name) as pool:
        handle = pool.publish(take(pool), readers=2)
        for _ in range(2):
            pool.open(handle).release()
        values = counted(pool)
        assert (values.allocations, values.publishes, values.opens, values.releases) == (1, 1, 2, 2)
        assert values.publish_to_open.count == 2
        assert values.publish_to_open.sum_seconds > 0


def test_what_the_dead_have_done_stays_counted(pool_name: str) -> None:
    with create(pool_name) as pool:
        with fork(publish_and_wait, pool_name) as child:
            child.hear("published")
            child.kill()
        pool.reap()
        values = counted(pool)
        assert (values.allocations, values.publishes) == (2, 1)
        assert values.reaped_blocks == 1, "its reservation; what it published is awaited"


def publish_and_wait(channel: Channel, name: str) -> None:
    pool = attach(name)
    pool.publish(take(pool))
    take(pool)
    channel.say("published")
    channel.receive(timeout=600.0)


def test_a_wait_for_blocks_is_counted_when_it_is_served(pool_name: str) -> None:
    with create(pool_name) as pool:
        handle = take(pool, ALL)
        waiter = threading.Thread(target=pool.alloc, args=(1,), kwargs={"timeout": 60.0})
        waiter.start()
        wait_until(pool.waiters, "it waits")
        assert counted(pool).alloc_wait.count == 0
        pool.free(handle)
        waiter.join()
        values = counted(pool)
        assert values.alloc_wait.count == 1
        assert values.alloc_timeouts == 0


def test_an_allocation_that_need_not_wait_is_no_wait(pool_name: str) -> None:
    with create(pool_name) as pool:
        assert pool.alloc(1, timeout=60.0)
        assert counted(pool).alloc_wait.count == 0


def test_a_wait_that_ends_without_blocks_is_a_timeout(pool_name: str) -> None:
    with create(pool_name) as pool:
        take(pool, ALL)
        with pytest.raises(PoolTimeoutError):
            pool.alloc(1, timeout=0.001)
        assert pool.alloc(1) is None, "not to wait is no timeout"
        values = counted(pool)
        assert (values.alloc_timeouts, values.alloc_wait.count) == (1, 0)


def test_a_change_that_was_left_half_made_is_counted_by_who_completes_it(pool_name: str) -> None:
    with create(pool_name) as pool:
        commit_without_storing(pool)
        with PoolInspector(pool_name) as inspector:
            assert inspector.stats().counters.lock_takeovers == 1
        assert counted(pool).lock_takeovers == 1, "once"


def commit_without_storing(pool: BlockPool) -> None:
    """What a process leaves that is killed between the two halves of a commit."""
    journal, segment = pool.state.journal, pool.state.segment
    offset = H_CURSOR * WORD
    log = struct.pack("=QQ", offset, WORD) + bytes(segment.memory[offset : offset + WORD])
    start = journal.head * WORD + WORD
    segment.memory[start : start + len(log)] = log
    segment.words[journal.head] = len(log)


def test_one_section_in_64_is_timed(pool_name: str) -> None:
    with create(pool_name) as pool:
        before = counted(pool).lock_held.count
        for _ in range(5 * TIMED_OF):
            pool.reap_if_due()
        assert counted(pool).lock_held.count == before + 5


def test_a_closed_pool_is_no_error_of_a_timed_section(pool_name: str) -> None:
    for _ in range(2 * TIMED_OF):
        create(pool_name).close()


def test_entries_are_counted_and_pinned_while_they_are_leased_or_held(pool_name: str) -> None:
    with create(pool_name, tiny(BLOCKS)) as pool:
        for number, hold in enumerate((0.0, 0.0, 600.0)):
            handle = take(pool, 2 * BLOCK_SIZE)
            pool.publish(handle, readers=UNBOUNDED, key=bytes([number]) * 16, hold=hold)
        leases = pool.get(b"\0" * 16)
        assert leases is not None
        stats = pool.stats()
        assert (stats.entries, stats.entry_blocks, stats.pinned_entry_blocks) == (3, 6, 4)
        leases[0].release()
        assert pool.stats().pinned_entry_blocks == 2
        values = stats.counters
        assert (values.lookups, values.hits, values.misses, values.puts) == (1, 1, 0, 3)


def test_the_largest_free_run_lies_between_or_behind_allocations(pool_name: str) -> None:
    with create(pool_name, tiny(BLOCKS)) as pool:
        assert pool.stats().largest_free_run == BLOCKS
        handles = [take(pool, 4 * BLOCK_SIZE) for _ in range(4)]
        assert pool.stats().largest_free_run == 0
        pool.free(handles[0])
        pool.free(handles[2])
        assert pool.stats().largest_free_run == 4
        pool.free(handles[3])
        assert pool.stats().largest_free_run == 8


def test_a_snapshot_and_an_inspector_carry_the_counters(pool_name: str) -> None:
    with create(pool_name) as pool:
        take(pool)
        with PoolInspector(pool_name) as inspector:
            assert inspector.snapshot().stats.counters.allocations == 1
            assert inspector.cache_stats() == pool.cache_stats()
            assert inspector.entries() == []


def test_a_share_of_a_histogram_lies_below_a_bound() -> None:
    buckets = [0] * BUCKETS
    buckets[3], buckets[10], buckets[-1] = 90, 9, 1
    histogram = HistogramValues(count=100, sum_seconds=1.0, buckets=buckets)
    assert histogram.bound(0.5) == 8e-6
    assert histogram.bound(0.99) == 1024e-6
    assert histogram.bound(1.0) == math.inf
