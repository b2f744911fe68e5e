"""`alloc_async`: many at once, in turn, cancelled at any moment, and no thread for each."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections.abc import Callable, Coroutine
from typing import TypeVar

import pytest

from shmblocks import BlockHandle, BlockPool, PoolClosedError, PoolTimeoutError
from tests.core import pools
from tests.core.pools import BLOCK_SIZE
from tests.queue.kit import PATIENCE, SOON, Waiting, waiter_threads
from tests.support.children import Channel, fork, wait_until
from tests.support.inside import run_inside
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

T = TypeVar("T")


async def soon(awaitable: asyncio.Future[T] | Coroutine[object, object, T]) -> T:
    return await asyncio.wait_for(awaitable, SOON)


def asks(pool: BlockPool, blocks: int, timeout: float | None = None) -> asyncio.Task[BlockHandle]:
    return asyncio.ensure_future(pool.alloc_async(blocks * BLOCK_SIZE, timeout=timeout))


async def until_in_queue(pool: BlockPool, count: int) -> None:
    while waiting(pool) != count:
        await asyncio.sleep(0)


async def ask_in_turn(pool: BlockPool, *blocks: int) -> list[asyncio.Task[BlockHandle]]:
    tasks = []
    for count in blocks:
        before = waiting(pool)
        tasks.append(asks(pool, count))
        await until_in_queue(pool, before + 1)
    return tasks


def test_where_there_is_room_nobody_waits(pool: BlockPool) -> None:
    async def main() -> None:
        pool.free(await pool.alloc_async(7))
        assert waiter_threads() == []

    asyncio.run(main())


def test_coroutines_are_served_in_the_order_in_which_they_came(
    no_net: None, pool: BlockPool
) -> None:
    async def main() -> None:
        held = reserve(pool, TOTAL)
        tasks = await ask_in_turn(pool, TOTAL, 1, TOTAL, 9, 10)
        pool.free(held)
        for number, task in enumerate(tasks):
            handle = await soon(task)
            assert waiting(pool) == len(tasks) - number - 1
            pool.free(handle)

    asyncio.run(main())


def test_coroutines_and_threads_stand_in_one_queue(no_net: None, pool: BlockPool) -> None:
    async def main() -> None:
        held = reserve(pool, TOTAL)
        (first,) = await ask_in_turn(pool, 9)
        second = waiter(pool, 9, 2)
        (third,) = await ask_in_turn(pool, 9)
        pool.free(held)
        handle = await soon(first)
        assert not second.is_over
        pool.free(handle)
        handle = await asyncio.to_thread(second.result, SOON)
        assert not third.done()
        pool.free(handle)
        pool.free(await soon(third))

    asyncio.run(main())


def test_many_coroutines_wait_on_one_thread_which_ends(no_net: None, pool: BlockPool) -> None:
    before = threading.active_count()

    async def main() -> None:
        held = reserve(pool, TOTAL)
        tasks = [asks(pool, 1) for _ in range(100)]
        await until_in_queue(pool, 100)
        assert threading.active_count() == before + 1
        pool.free(held)
        while tasks:
            done, rest = await asyncio.wait(tasks, timeout=SOON, return_when="FIRST_COMPLETED")
            assert done
            for task in done:
                pool.free(task.result())
            tasks = list(rest)

    asyncio.run(main())
    pool._waiters.close()  # without the net the thread would sleep for a minute
    assert threading.active_count() == before


def test_the_thread_ends_by_itself(pool: BlockPool) -> None:
    async def main() -> None:
        with all_but(pool, 0), pytest.raises(PoolTimeoutError):
            await pool.alloc_async(1, timeout=0.01)

    asyncio.run(main())
    wait_until(lambda: waiter_threads() == [], "the thread has ended")


def test_the_loop_goes_on_while_coroutines_wait(pool: BlockPool) -> None:
    async def main() -> None:
        held = reserve(pool, TOTAL)
        (task,) = await ask_in_turn(pool, 1)
        for _ in range(1000):
            await asyncio.sleep(0)
        assert not task.done()
        pool.free(held)
        pool.free(await soon(task))

    asyncio.run(main())


def test_a_deadline_names_who_is_in_the_way(pool: BlockPool) -> None:
    async def main() -> None:
        start = asyncio.get_running_loop().time()
        with pytest.raises(PoolTimeoutError, match=r"for 2 consecutive(.|\n)*for request somebody"):
            await pool.alloc_async(8, timeout=0.05)
        assert asyncio.get_running_loop().time() - start >= 0.049

    with all_but(pool, 0):
        asyncio.run(main())
    assert waiting(pool) == 0


def test_a_negative_timeout_is_a_value_error_also_with_room(pool: BlockPool) -> None:
    with pytest.raises(ValueError, match="timeout: expected seconds >= 0"):
        asyncio.run(pool.alloc_async(1, timeout=-1))


def test_a_long_wait_says_once_whom_it_waits_for(
    pool: BlockPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Found: only threads said so."""
    polls = count_polls(pool, monkeypatch)
    with all_but(pool, 0), caplog.at_level(logging.WARNING):
        loop = Waiting(lambda: asyncio.run(pool.alloc_async(1)))
        wait_until(lambda: len(polls) > 5, "it has polled several times")
    pool.free(loop.result(SOON))
    (said,) = [record for record in caplog.records if record.name == "shmblocks"]
    assert "held by participant 0" in said.getMessage()


def test_the_dead_holders_blocks_come_by_themselves(pool: BlockPool) -> None:
    async def main() -> None:
        other = pools.attach(pool.name)
        reserve(other, TOTAL)
        (task,) = await ask_in_turn(pool, 2)
        pools.abandon(other)
        pool.free(await soon(task))

    asyncio.run(main())


# ---- cancelling ------------------------------------------------------------------------------


def test_cancelling_leaves_the_queue_and_makes_way(no_net: None, pool: BlockPool) -> None:
    async def main() -> None:
        with all_but(pool, 4):
            first, second = await ask_in_turn(pool, TOTAL, 4)
            first.cancel()
            pool.free(await soon(second))
            assert first.cancelled()
            assert waiting(pool) == 0

    asyncio.run(main())


@pytest.mark.parametrize("steps", range(8))
def test_cancelled_any_number_of_steps_after_its_wake_up_it_ends(
    no_net: None, pool: BlockPool, steps: int
) -> None:
    """Found: `asyncio.wait_for` of Python 3.11 and before may swallow it, and the wait went on."""

    async def main() -> None:
        with all_but(pool, 4):
            (task,) = await ask_in_turn(pool, TOTAL)
            wake = pool._waiters._wake
            assert wake is not None
            wait_until(lambda: wake.loops._waiters, "it waits")
            run_inside(pool, pool.state.wake_head)  # though there is no room for it
            wait_until(lambda: not wake.loops._waiters, "it was told")  # the loop stands still
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task}, timeout=SOON)
            assert task.cancelled()
            assert waiting(pool) == 0

    asyncio.run(main())


@pytest.mark.parametrize("steps", range(6))
def test_cancelled_any_number_of_steps_after_the_room_came_nothing_is_lost(
    no_net: None, pool: BlockPool, steps: int
) -> None:
    async def main() -> None:
        held = reserve(pool, TOTAL)
        first, second = await ask_in_turn(pool, TOTAL, TOTAL)
        pool.free(held)
        for _ in range(steps):
            await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait({first}, timeout=SOON)
        if not first.cancelled():
            pool.free(first.result())
        pool.free(await soon(second))

    asyncio.run(main())


def test_cancelling_at_random_loses_no_block(
    no_net: None, pool: BlockPool, rng: random.Random
) -> None:
    async def use(blocks: int) -> None:
        handle = await pool.alloc_async(blocks * BLOCK_SIZE)
        try:
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
        finally:
            pool.free(handle)

    async def main() -> None:
        tasks: list[asyncio.Task[None]] = []
        for _ in range(100):
            tasks.append(asyncio.ensure_future(use(rng.randrange(1, TOTAL + 1))))
            if rng.random() < 0.4:
                rng.choice(tasks).cancel()
            for _ in range(rng.randrange(3)):
                await asyncio.sleep(0)
        results = await soon(asyncio.gather(*tasks, return_exceptions=True))
        assert any(result is None for result in results)
        for result in results:
            assert result is None or isinstance(result, asyncio.CancelledError)
        assert pool.check() == []

    asyncio.run(main())


def test_a_coroutine_that_is_dropped_in_its_wait_leaves_the_queue(
    no_net: None, pool: BlockPool
) -> None:
    async def main() -> None:
        held = reserve(pool, TOTAL)
        dropped = pool.alloc_async(1)
        dropped.send(None)
        (task,) = await ask_in_turn(pool, TOTAL)
        dropped.close()
        assert waiting(pool) == 1
        pool.free(held)
        pool.free(await soon(task))

    asyncio.run(main())


def drop_what_was_inherited(
    _: Channel, coroutine: Coroutine[object, object, BlockHandle], pool: BlockPool
) -> int:
    coroutine.close()
    return waiting(pool)


def test_a_forked_child_does_not_leave_its_parents_place_in_the_queue(
    no_net: None, pool: BlockPool
) -> None:
    """Found: collecting the inherited coroutine took the parent out of the queue, for ever."""

    async def main() -> None:
        held = reserve(pool, TOTAL)
        inherited = pool.alloc_async(1)
        future = inherited.send(None)
        with fork(drop_what_was_inherited, inherited, pool) as child:
            assert child.result() == 1
        assert waiting(pool) == 1
        pool.free(held)
        await soon(future)
        with pytest.raises(StopIteration) as served:
            inherited.send(None)
        pool.free(served.value.value)

    asyncio.run(main())


# ---- closing, several loops ------------------------------------------------------------------


def test_close_in_the_same_loop_ends_every_wait(no_net: None, pool_name: str) -> None:
    with pools.create(pool_name) as keeper, all_but(keeper, 0):
        pool = pools.attach(pool_name)

        async def main() -> None:
            tasks = await ask_in_turn(pool, 1, 2, 3)
            pool.close()
            for result in await soon(asyncio.gather(*tasks, return_exceptions=True)):
                assert isinstance(result, PoolClosedError)

        asyncio.run(main())
        assert waiter_threads() == []
        assert waiting(keeper) == 0


def test_close_in_another_thread_ends_every_wait_and_returns(
    no_net: None, new_pool_name: Callable[[], str]
) -> None:
    async def many(pool: BlockPool) -> list[object]:
        return await asyncio.gather(*(asks(pool, 1) for _ in range(20)), return_exceptions=True)

    for _ in range(5):
        with pools.create(new_pool_name()) as keeper, all_but(keeper, 0):
            pool = pools.attach(keeper.name)
            with Waiting(lambda p=pool: asyncio.run(many(p))) as loop:  # type: ignore[misc]
                in_queue(keeper, 20)
                with Waiting(pool.close) as closer:
                    closer.result(SOON)
                for result in loop.result(SOON):
                    assert isinstance(result, PoolClosedError)
            assert waiting(keeper) == 0
    assert waiter_threads() == []


def test_one_pool_serves_the_loops_of_two_threads(no_net: None, pool: BlockPool) -> None:
    async def use(blocks: int) -> None:
        pool.free(await pool.alloc_async(blocks * BLOCK_SIZE))

    def in_a_loop() -> None:
        async def main() -> None:
            await asyncio.gather(*(use(1 + number % TOTAL) for number in range(50)))

        asyncio.run(asyncio.wait_for(main(), PATIENCE))

    with all_but(pool, 0):
        loops = [Waiting(in_a_loop) for _ in range(2)]
        in_queue(pool, 100)
    for loop in loops:
        loop.result()
    pool.free(wait_for(pool, TOTAL))
