"""Those who are in the queue and do not come: dead, stopped, forgotten. The others go on."""

from __future__ import annotations

import time

import pytest

from shmblocks import BlockPool, Violation
from shmblocks._state.check import SLOW_NS
from shmblocks._state.layout import H_WAITERS, W_POLLED
from shmblocks._state.wait_queue import PATIENCE_NS, WaitQueue
from tests.core import pools
from tests.queue.kit import SOON
from tests.support.inside import run_inside
from tests.wait_queue.kit import (
    TOTAL,
    all_but,
    child_waiter,
    in_queue,
    reserve,
    wait_for,
    waiter,
    waiting,
)

A_SECOND = 1.0
# Until a stopped one is passed over: its patience, and the next poll of who comes after it.
ABOUT_A_SECOND = PATIENCE_NS / 1e9 + 0.25 + 0.5


# ---- dead ------------------------------------------------------------------------------------


def test_a_dead_first_one_is_passed_over_within_a_second(pool: BlockPool) -> None:
    with (
        all_but(pool, 4),
        child_waiter(pool, TOTAL, 1) as child,
        waiter(pool, 4, 2) as next_one,
    ):
        child.kill()
        start = time.monotonic()
        pool.free(next_one.result(SOON))
        assert time.monotonic() - start < A_SECOND
    assert waiting(pool) == 0


def test_several_dead_ones_are_passed_over_within_a_second(pool: BlockPool) -> None:
    with all_but(pool, 4):
        children = [child_waiter(pool, TOTAL, position + 1) for position in range(4)]
        with waiter(pool, 4, 5) as next_one:
            for child in children:
                child.kill()
                child.close()
            start = time.monotonic()
            pool.free(next_one.result(SOON))
            assert time.monotonic() - start < A_SECOND
    assert waiting(pool) == 0


def test_one_who_does_not_wait_is_served_at_once_when_only_the_dead_do(pool: BlockPool) -> None:
    with all_but(pool, 4):
        with child_waiter(pool, TOTAL, 1) as child:
            assert pool.alloc(1) is None
            child.kill()
            handle = pool.alloc(1)
            assert handle is not None
            pool.free(handle)
        assert waiting(pool) == 0, "the dead one is still in the queue"


def test_one_who_dies_when_it_is_its_turn_gives_back_what_it_got(pool: BlockPool) -> None:
    held = reserve(pool, TOTAL)
    with child_waiter(pool, TOTAL, 1, keeps=True) as child, waiter(pool, 2, 2) as next_one:
        pool.free(held)
        child.kill()
        start = time.monotonic()
        pool.free(next_one.result(SOON))
        assert time.monotonic() - start < A_SECOND


def test_the_queue_is_in_order_after_a_death_in_its_middle(pool: BlockPool) -> None:
    held = reserve(pool, TOTAL)
    first = waiter(pool, 9, 1)
    with child_waiter(pool, 1, 2) as child:
        last = waiter(pool, 9, 3)
        child.kill()
        assert pool.check() == []
        pool.free(held)
        pool.free(first.result(SOON))
        pool.free(last.result(SOON))


# ---- stopped ---------------------------------------------------------------------------------


def test_a_stopped_first_one_is_passed_over_after_a_second_and_served_when_it_goes_on(
    pool: BlockPool,
) -> None:
    held = reserve(pool, TOTAL)
    with child_waiter(pool, TOTAL, 1) as stopped:
        stopped.stop()
        with waiter(pool, 4, 2) as next_one:
            pool.free(held)
            start = time.monotonic()
            handle = next_one.result(SOON)
            assert time.monotonic() - start < ABOUT_A_SECOND
        stopped.resume()
        pool.free(handle)
        stopped.hear("served", SOON)
        stopped.say("give back")


def test_one_who_was_stopped_before_anything_was_offered_holds_up_nobody_for_ever(
    pool: BlockPool,
) -> None:
    """Found: only one to whom blocks had been offered was passed over; here none ever are."""
    with all_but(pool, 4), child_waiter(pool, TOTAL, 1) as stopped:
        stopped.stop()
        start = time.monotonic()
        handle = wait_for(pool, 4, SOON)
        assert time.monotonic() - start < ABOUT_A_SECOND
        again = pool.alloc(1)
        pool.free(handle)
        assert again is None
        alone = pool.alloc(1)
        assert alone is not None, "one who does not wait is held up by a stopped one"
        pool.free(alone)
        stopped.kill()


def test_a_stopped_one_keeps_its_position(pool: BlockPool) -> None:
    held = reserve(pool, TOTAL)
    with child_waiter(pool, 10, 1) as stopped:
        last = waiter(pool, 10, 2)
        stopped.stop()
        stopped.resume()
        in_queue(pool, 2)
        pool.free(held)
        stopped.hear("served", SOON)
        assert not last.is_over
        stopped.say("give back")
        pool.free(last.result(SOON))


def test_one_in_the_middle_that_is_stopped_delays_nobody_before_it(
    no_net: None, pool: BlockPool
) -> None:
    held = reserve(pool, TOTAL)
    first = waiter(pool, 9, 1)
    with child_waiter(pool, 9, 2) as stopped:
        stopped.stop()
        pool.free(held)
        handle = first.result(SOON)
        stopped.resume()
        pool.free(handle)
        stopped.hear("served", SOON)
        stopped.say("give back")


# ---- what an inspector says ------------------------------------------------------------------


def queue_of(pool: BlockPool) -> WaitQueue:
    return pool.state.queue


def test_who_waits_beside_blocks_that_are_there_is_a_violation(pool: BlockPool) -> None:
    """One that joined and never polls, as if its thread were gone and its entry were not."""
    me = pool.participant
    assert me is not None
    long_ago = time.monotonic_ns() - 2 * SLOW_NS
    place = run_inside(pool, queue_of(pool).join, me.word, 3, b"forgotten", long_ago)
    (violation,) = pool.check()
    assert violation.invariant == 5
    assert "waits for 3 blocks, 16 are there" in violation.message
    assert "participant 0 (pid" in violation.message
    with all_but(pool, 2):
        assert pool.check() == []
    handle = pool.alloc(1)
    assert handle is not None, "it holds up others"
    pool.free(handle)
    run_inside(pool, queue_of(pool).leave, place)
    assert pool.check() == []


@pytest.mark.parametrize("wrong", [1, 5, 2**64 - 1])
def test_a_count_that_is_wrong_is_a_violation(pool: BlockPool, wrong: int) -> None:
    pools.set_word(pool, H_WAITERS, wrong)
    assert pool.check() == [Violation(5, f"0 wait, the count says {wrong}")]
    handle = pool.alloc(1)
    assert handle is not None
    pool.free(handle)
    pools.set_word(pool, H_WAITERS, 0)


def test_a_wait_that_is_in_order_is_none(pool: BlockPool) -> None:
    with all_but(pool, 2):
        threads = [waiter(pool, 3, 1), waiter(pool, 1, 2)]
        assert pool.check() == []
    for thread in threads:
        pool.free(thread.result(SOON))


def test_a_poll_in_the_future_is_none(pool: BlockPool) -> None:
    """Written by something else, it would hold up the queue for ever."""
    me = pool.participant
    assert me is not None
    place = run_inside(pool, queue_of(pool).join, me.word, 1, b"", time.monotonic_ns())
    slot = pool.state.layout.waiter_word(place.slot)
    pools.set_word(pool, slot + W_POLLED, 2**63)
    handle = pool.alloc(1)
    assert handle is not None
    pool.free(handle)
    run_inside(pool, queue_of(pool).leave, place)
