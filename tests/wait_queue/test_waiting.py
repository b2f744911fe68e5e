"""Waiting for blocks: served when there is room, told at the deadline who is in the way."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest

from shmblocks import (
    BlockHandle,
    BlockPool,
    PoolClosedError,
    PoolTimeoutError,
    ShmBlocksError,
    TooManyWaitersError,
)
from shmblocks._alloc_wait import _Deadline
from shmblocks._state.pool_state import AllocRequest, Poll, stamp
from tests.core import pools
from tests.core.pools import BLOCK_SIZE
from tests.queue.kit import PATIENCE, SOON, Waiting
from tests.support.children import Channel, fork, wait_until
from tests.wait_queue.kit import (
    TOTAL,
    all_but,
    count_polls,
    in_queue,
    reserve,
    wait_for,
    waiter,
    waiting,
)

A_WHILE = 0.05  # seconds


def test_the_first_who_ever_waits_in_a_pool_is_served(no_net: None, pool: BlockPool) -> None:
    """Found: its place was number 0, which says that a slot of the queue is free."""
    with all_but(pool, 0):
        first = waiter(pool, 3, 1)
    pool.free(first.result(SOON))


def test_where_there_is_room_nobody_waits(pool: BlockPool) -> None:
    for timeout in (0.0, 0, 10.0, None):
        handle = pool.alloc(7, timeout=timeout)
        assert handle is not None
        pool.free(handle)


KINDS: dict[str, Callable[[BlockPool], BlockHandle | None]] = {
    "alloc": lambda pool: pool.alloc(3, timeout=PATIENCE),
    "alloc_default": lambda pool: pool.alloc_default(timeout=PATIENCE),
    "alloc_blocks": lambda pool: pool.alloc_blocks(2, 5, timeout=PATIENCE),
    "without end": lambda pool: pool.alloc_blocks(2, 5, timeout=None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_alloc_can_wait(no_net: None, pool: BlockPool, kind: str) -> None:
    with all_but(pool, 0):
        thread = Waiting(lambda: KINDS[kind](pool))
        in_queue(pool, 1)
    handle = thread.result(SOON)
    assert handle is not None
    pool.free(handle)


def test_without_a_timeout_there_is_no_wait(pool: BlockPool) -> None:
    with all_but(pool, 0):
        start = time.monotonic()
        assert pool.alloc(1) is None
        assert pool.alloc(1, timeout=0) is None
        assert pool.alloc_default() is None
        assert pool.alloc_blocks(1, 1) is None
        assert time.monotonic() - start < SOON


def test_a_deadline_is_waited_for_and_not_less(pool: BlockPool) -> None:
    with all_but(pool, 3):
        start = time.monotonic()
        with pytest.raises(PoolTimeoutError):
            wait_for(pool, 4, A_WHILE)
        assert time.monotonic() - start >= A_WHILE
        assert waiting(pool) == 0
        reserve_and_free = reserve(pool, 3)
        pool.free(reserve_and_free)


@pytest.mark.parametrize("wrong", [-1.0, -1e-9, float("nan")])
def test_a_negative_timeout_is_a_value_error_whether_there_is_room_or_not(
    pool: BlockPool, wrong: float
) -> None:
    """Found: with room it was none."""
    for blocks in (0, TOTAL - 1):
        held = reserve(pool, blocks) if blocks else None
        with pytest.raises(ValueError, match="timeout: expected seconds >= 0"):
            pool.alloc(8, timeout=wrong)
        with pytest.raises(ValueError, match="timeout: expected seconds >= 0"):
            pool.alloc_blocks(2, 8, timeout=wrong)
        if held is not None:
            pool.free(held)
    assert pool.available_blocks() == TOTAL


def test_what_can_never_be_served_is_not_waited_for(pool: BlockPool) -> None:
    with pytest.raises(ValueError, match="can never be served"):
        pool.alloc((TOTAL + 1) * BLOCK_SIZE, timeout=None)


def test_a_fake_request_never_waits(pool: BlockPool) -> None:
    with all_but(pool, 0):
        handle = pool.alloc(100, fake=True, timeout=None)
        assert handle is not None
        assert handle.is_fake


# ---- what makes room -------------------------------------------------------------------------


def test_a_freed_reservation_serves_the_one_who_waits(no_net: None, pool: BlockPool) -> None:
    held = reserve(pool, TOTAL)
    with waiter(pool, TOTAL, 1) as thread:
        pool.free(held)
        pool.free(thread.result(SOON))


def test_the_last_lease_that_is_released_serves_the_one_who_waits(
    no_net: None, pool: BlockPool
) -> None:
    published = pool.publish(reserve(pool, TOTAL), readers=2)
    first, second = pool.open(published), pool.open(published)
    with waiter(pool, 2, 1) as thread:
        first.release()
        assert waiting(pool) == 1
        second.release()
        pool.free(thread.result(SOON))


def test_one_who_closes_serves_the_one_who_waits(no_net: None, pool: BlockPool) -> None:
    with pools.attach(pool.name) as other:
        reserve(other, TOTAL)
        with waiter(pool, 2, 1) as thread:
            other.close()
            pool.free(thread.result(SOON))


def test_a_reap_serves_the_one_who_waits(no_net: None, pool: BlockPool) -> None:
    other = pools.attach(pool.name)
    reserve(other, TOTAL)
    with waiter(pool, 2, 1) as thread:
        pools.abandon(other)
        pool.reap()
        pool.free(thread.result(SOON))


def test_one_who_gives_up_makes_way_for_the_next(no_net: None, pool: BlockPool) -> None:
    with all_but(pool, 3), Waiting(lambda: wait_for(pool, 10, 0.3)) as first:
        in_queue(pool, 1)
        with waiter(pool, 3, 2) as second:
            assert isinstance(first.error(SOON), PoolTimeoutError)
            pool.free(second.result(SOON))


def test_the_dead_holders_blocks_come_by_themselves(pool: BlockPool) -> None:
    """Nobody wakes it: the one who waits polls by the clock."""
    other = pools.attach(pool.name)
    reserve(other, TOTAL)
    with waiter(pool, 2, 1) as thread:
        pools.abandon(other)
        start = time.monotonic()
        pool.free(thread.result(SOON))
        assert time.monotonic() - start < 1.0


def test_what_nobody_claims_in_time_comes_by_itself(pool_name: str) -> None:
    with pools.create(pool_name, pools.tiny(unclaimed_timeout=0.1)) as pool:
        published = pool.publish(reserve(pool, TOTAL))
        handle = wait_for(pool, TOTAL)
        with pytest.raises(ShmBlocksError):
            pool.open(published)
        pool.free(handle)


# ---- what is said ----------------------------------------------------------------------------


def hold_there(channel: Channel, pool: BlockPool) -> None:
    published = pool.publish(reserve(pool, 5, req_id="photo-17"), readers=1)
    with pool.open(published):
        reserve(pool, 4, req_id="photo-18")
        channel.say(pool.participant)
        channel.hear("enough")


def test_the_deadline_names_who_holds_what_for_which_request_since_when(pool: BlockPool) -> None:
    with fork(hold_there, pool) as child:
        child.receive()
        them = rf"participant \d+ \(pid {child.pid}, tester\)"
        mine = reserve(pool, 6, req_id="mine")
        other = waiter(pool, 12, 1)
        with pytest.raises(PoolTimeoutError) as caught:
            pool.alloc(BLOCK_SIZE * 3, req_id="late", timeout=A_WHILE)
        pool.free(mine)
        child.say("enough")
    pool.free(other.result())
    us = r"participant 0 \(pid \d+, tester\)"
    expected = [
        rf"pool {pool.name}: waited 0\.[0-9] s for 3 consecutive blocks; 1 of 16 blocks are free",
        rf"  5 blocks from 0 for request photo-17: leased since \d+\.\d s, held by {them}",
        rf"  4 blocks from 5 for request photo-18: reserved since \d+\.\d s, held by {them}",
        rf"  6 blocks from 9 for request mine: reserved since \d+\.\d s, held by {us}",
        rf"  1\. in the wait queue: 12 blocks for {us}",
        rf"  2\. in the wait queue: 3 blocks for {us}",
        r"free some, or create a larger pool",
    ]
    assert re.fullmatch("\n".join(expected), str(caught.value)), str(caught.value)


def test_a_timeout_is_also_the_standard_one(pool: BlockPool) -> None:
    with all_but(pool, 0), pytest.raises(TimeoutError):
        wait_for(pool, 1, 0.001)


def test_a_long_wait_says_once_whom_it_waits_for(
    pool: BlockPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    polls = count_polls(pool, monkeypatch)
    with all_but(pool, 0), caplog.at_level(logging.WARNING):
        thread = Waiting(lambda: wait_for(pool, 2))
        wait_until(lambda: len(polls) > 5, "it has polled several times")
    pool.free(thread.result(SOON))
    (said,) = caplog.records
    assert said.levelno == logging.WARNING
    assert "for 2 consecutive blocks" in said.getMessage()
    assert "held by participant 0" in said.getMessage()


@pytest.fixture
def pool_for_two_waiters(pool_name: str) -> Iterator[BlockPool]:
    config = msgspec.structs.replace(pools.tiny(), max_waiters=2)
    with pools.create(pool_name, config, role="tester") as made:
        yield made
        assert (made.check(), made.available_blocks(), waiting(made)) == ([], TOTAL, 0)


def test_more_than_the_queue_holds_is_an_error_that_says_so(
    pool_for_two_waiters: BlockPool,
) -> None:
    pool = pool_for_two_waiters
    with all_but(pool, 0):
        threads = [waiter(pool, 1, position) for position in (1, 2)]
        with pytest.raises(
            TooManyWaitersError, match=r"2 threads.*PoolConfig\(max_waiters="
        ) as told:
            wait_for(pool, 1)
        assert isinstance(told.value, ShmBlocksError)
        assert waiting(pool) == 2
    for thread in threads:
        pool.free(thread.result(SOON))


def test_the_slots_of_the_dead_in_the_queue_are_used_again(
    pool_for_two_waiters: BlockPool,
) -> None:
    """Found: while one living waiter stood before them, the queue was said to be full."""
    pool = pool_for_two_waiters
    with all_but(pool, 0), pools.attach(pool.name) as third:
        ghost = pools.attach(pool.name)
        mine = AllocRequest(1, 1, b"", stamp())
        assert pool.state.poll_queue(mine).handle is None
        assert ghost.state.poll_queue(AllocRequest(1, 1, b"", stamp())).handle is None
        pools.abandon(ghost)
        with pytest.raises(PoolTimeoutError):
            wait_for(third, 1, 0.001)
        pool.state.take_back(mine.stamp)
        assert waiting(pool) == 0
    ghost.close()


def test_an_inspector_sees_how_many_wait(pool: BlockPool) -> None:
    with all_but(pool, 0):
        first = waiter(pool, 2, 1)
        second = waiter(pool, 5, 2)
        assert pool.stats().waiters == 2
        assert [(info.num_blocks, info.req_id) for info in pool.waiters()] == [(2, ""), (5, "")]
        assert all(info.participant_id == pool.participant for info in pool.waiters())
        assert pool.check() == []
    for thread in (first, second):
        pool.free(thread.result(SOON))


# ---- closing and forking ---------------------------------------------------------------------


def test_close_ends_the_waits_of_other_threads(no_net: None, pool_name: str) -> None:
    with pools.create(pool_name) as keeper, pools.attach(pool_name) as pool:
        with all_but(keeper, 0):
            threads = [waiter(pool, 1, position + 1) for position in range(3)]
            pool.close()
            for thread in threads:
                error = thread.error(SOON)
                assert isinstance(error, ShmBlocksError)
                assert "closed in this process" in str(error)
            assert waiting(keeper) == 0
        pools.take(keeper)


def test_close_at_any_moment_of_a_wait_is_an_error_of_its_own(
    new_pool_name: Callable[[], str],
) -> None:
    """Found: an AttributeError about the mapping, between two polls."""
    for _ in range(20):
        with pools.create(new_pool_name()) as keeper, all_but(keeper, 0):
            pool = pools.attach(keeper.name)
            start = threading.Barrier(4)

            def wait_on_and_on(pool: BlockPool = pool, start: threading.Barrier = start) -> None:
                start.wait()
                while True:
                    try:
                        wait_for(pool, 1, 0.0001)
                    except PoolTimeoutError:
                        continue

            threads = [Waiting(wait_on_and_on) for _ in range(3)]
            start.wait()
            pool.close()
            for thread in threads:
                assert "closed in this process" in str(thread.error(SOON))
            assert waiting(keeper) == 0


def test_close_between_a_poll_and_the_sleep_after_it_is_that_error_too(
    pool_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found: a ValueError about released memory."""
    pool = pools.create(pool_name)
    before = _Deadline.seconds_to_sleep

    def close_and_go_on(self: _Deadline, poll: Poll) -> float:
        pool.close()
        return before(self, poll)

    with pools.attach(pool_name) as keeper, all_but(keeper, 0):
        monkeypatch.setattr(_Deadline, "seconds_to_sleep", close_and_go_on)
        with pytest.raises(PoolClosedError, match="closed in this process"):
            wait_for(pool, 1)


def test_the_mapping_goes_with_close_after_a_wait(pool_name: str) -> None:
    pool = pools.create(pool_name)
    with all_but(pool, 0), pytest.raises(PoolTimeoutError):
        wait_for(pool, 1, 0.001)
    pool.close()
    with open("/proc/self/maps") as maps:
        assert pool_name not in maps.read()


def wait_in_the_child(channel: Channel, pool: BlockPool) -> object:
    channel.say("here")
    handle = wait_for(pool, 2)
    wake = pool._waiters._wake
    assert wake is not None
    assert pool.participant is not None
    assert wake.slot == pool.participant.slot
    pool.free(handle)
    return pool.participant.slot


def test_a_forked_child_waits_at_its_own_wake_word(no_net: None, pool: BlockPool) -> None:
    """The parent has waited before, so that there is a wake word to inherit."""
    with all_but(pool, 0), pytest.raises(PoolTimeoutError):
        wait_for(pool, 1, 0.001)
    assert pool.participant is not None
    held = reserve(pool, TOTAL)
    with fork(wait_in_the_child, pool) as child:
        child.hear("here")
        in_queue(pool, 1)
        pool.free(held)
        assert child.result(SOON) != pool.participant.slot


def test_a_child_forked_in_the_middle_of_a_wait_is_not_in_the_queue(
    no_net: None, pool: BlockPool
) -> None:
    held = reserve(pool, TOTAL)
    with waiter(pool, 2, 1) as thread, fork(wait_in_the_child, pool) as child:
        child.hear("here")
        in_queue(pool, 2)
        pool.free(held)
        pool.free(thread.result(SOON))
        child.result(SOON)
