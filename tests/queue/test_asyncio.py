"""`get_async` and `put_async`: many at once, cancelled at any moment, and no thread for each."""

from __future__ import annotations

import asyncio
import os
import queue as standard
import random
import signal
import threading
from collections.abc import Coroutine, Iterator
from types import FrameType
from typing import TypeVar

import pytest

import shmblocks
from shmblocks import HandleQueue, MalformedMessageError, PoolClosedError
from tests.queue.kit import (
    PATIENCE,
    SOON,
    Numbered,
    Waiting,
    asleep,
    drain,
    fill,
    start_counting_at,
    waiter_threads,
)
from tests.support.children import Channel, fork, run_in_fork, wait_until

T = TypeVar("T")

PACKAGE = os.path.dirname(shmblocks.__file__) + os.sep


async def soon(awaitable: asyncio.Future[T] | Coroutine[object, object, T]) -> T:
    return await asyncio.wait_for(awaitable, SOON)


async def until_asleep(queue: HandleQueue[T], getters: int, putters: int = 0) -> None:
    while asleep(queue) != (getters, putters):
        await asyncio.sleep(0)


@pytest.fixture
def big(pool_name: str) -> Iterator[HandleQueue[Numbered]]:
    with HandleQueue.create(pool_name, 512, message_type=Numbered) as made:
        yield made


def test_a_message_that_is_there_is_had_without_waiting(queue: HandleQueue[bytes]) -> None:
    async def main() -> None:
        await queue.put_async(b"x")
        assert await queue.get_async() == b"x"
        assert waiter_threads() == []

    asyncio.run(main())


def test_a_waiting_coroutine_is_told(no_net: None, queue: HandleQueue[bytes]) -> None:
    async def main() -> None:
        task = asyncio.ensure_future(queue.get_async())
        await until_asleep(queue, 1)
        await queue.put_async(b"x")
        assert await soon(task) == b"x"

    asyncio.run(main())


def test_a_full_queue_is_waited_for(no_net: None, queue: HandleQueue[bytes]) -> None:
    fill(queue)

    async def main() -> None:
        tasks = [asyncio.ensure_future(queue.put_async(b"more")) for _ in range(3)]
        await until_asleep(queue, 0, 3)
        assert queue.get() == b"0"
        assert queue.get_many(2) == [b"1", b"2"]
        await soon(asyncio.gather(*tasks))

    asyncio.run(main())
    assert drain(queue) == [b"3", b"more", b"more", b"more"]
    assert asleep(queue) == (0, 0)


def test_many_coroutines_wait_on_one_thread_and_each_gets_its_own(
    no_net: None, big: HandleQueue[Numbered]
) -> None:
    before = threading.active_count()

    async def main() -> None:
        tasks = [asyncio.ensure_future(big.get_async()) for _ in range(300)]
        await until_asleep(big, 300)
        assert threading.active_count() == before + 1
        for number in range(300):
            big.put(Numbered(0, number))
        got = await soon(asyncio.gather(*tasks))
        assert sorted(message.number for message in got) == list(range(300))

    asyncio.run(main())
    wait_until(lambda: threading.active_count() == before, "the thread has ended")
    assert asleep(big) == (0, 0)


def test_coroutines_are_served_in_the_order_in_which_they_came(
    no_net: None, queue: HandleQueue[bytes]
) -> None:
    async def main() -> None:
        tasks = []
        for number in range(4):
            tasks.append(asyncio.ensure_future(queue.get_async()))
            await until_asleep(queue, number + 1)
        for number in range(4):
            queue.put(b"%d" % number)
        assert await soon(asyncio.gather(*tasks)) == [b"0", b"1", b"2", b"3"]

    asyncio.run(main())


def put_numbers(_: Channel, queue: HandleQueue[Numbered], count: int) -> None:
    for number in range(count):
        queue.put(Numbered(1, number), timeout=PATIENCE)


def test_messages_of_another_process_wake_the_loop(big: HandleQueue[Numbered]) -> None:
    async def main() -> list[int]:
        return [(await soon(big.get_async())).number for _ in range(200)]

    with fork(put_numbers, big, 200):
        assert asyncio.run(main()) == list(range(200))


def test_the_loop_goes_on_while_coroutines_wait(queue: HandleQueue[bytes]) -> None:
    async def main() -> None:
        task = asyncio.ensure_future(queue.get_async())
        for _ in range(1000):
            await asyncio.sleep(0)
        assert not task.done()
        queue.put(b"x")
        await soon(task)

    asyncio.run(main())


# ---- cancelling ------------------------------------------------------------------------------


def test_cancelling_takes_no_message_and_leaves_no_count(
    no_net: None, queue: HandleQueue[bytes]
) -> None:
    async def main() -> None:
        task = asyncio.ensure_future(queue.get_async())
        await until_asleep(queue, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asleep(queue) == (0, 0)
        queue.put(b"x")

    asyncio.run(main())
    assert queue.get_nowait() == b"x"


def test_a_get_within_a_time_may_be_in_vain(queue: HandleQueue[bytes]) -> None:
    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(queue.get_async(), 0.01)

    asyncio.run(main())
    assert asleep(queue) == (0, 0)


def test_one_cancelled_at_the_very_moment_leaves_the_message_to_the_next(
    no_net: None, queue: HandleQueue[bytes]
) -> None:
    async def main() -> None:
        first, second = (asyncio.ensure_future(queue.get_async()) for _ in range(2))
        await until_asleep(queue, 2)
        queue.put(b"x")
        waiters = queue._getting._loops._waiters
        wait_until(lambda: len(waiters) == 1, "the first was told")  # the loop stands still
        first.cancel()
        assert await soon(second) == b"x"
        with pytest.raises(asyncio.CancelledError):
            await first

    asyncio.run(main())
    assert asleep(queue) == (0, 0)


def test_one_cancelled_at_the_very_moment_leaves_the_message_to_a_thread(
    no_net: None, queue: HandleQueue[bytes]
) -> None:
    async def main() -> None:
        first = asyncio.ensure_future(queue.get_async())
        await until_asleep(queue, 1)
        with Waiting(queue.get) as thread:
            thread.until_asleep()
            queue.put(b"x")
            wait_until(
                lambda: thread.is_over or not queue._getting._loops._waiters, "one was woken"
            )
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            assert thread.result(SOON) == b"x"

    asyncio.run(main())


@pytest.mark.parametrize("steps", range(6))
def test_cancelled_any_number_of_steps_after_the_message_all_is_accounted_for(
    no_net: None, queue: HandleQueue[bytes], steps: int
) -> None:
    async def main() -> None:
        task = asyncio.ensure_future(queue.get_async())
        await until_asleep(queue, 1)
        queue.put(b"x")
        wait_until(lambda: not queue._getting._loops._waiters, "it was told")
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task}, timeout=SOON)
        left = drain(queue)
        assert [task.result()] if not task.cancelled() else left == [b"x"]
        assert len(left) == task.cancelled()

    asyncio.run(main())
    assert asleep(queue) == (0, 0)


def test_cancelling_at_random_loses_nothing_and_doubles_nothing(
    no_net: None, big: HandleQueue[Numbered], rng: random.Random
) -> None:
    async def main() -> None:
        tasks: list[asyncio.Task[Numbered]] = []
        put = 0
        for _ in range(400):
            deed = rng.random()
            if deed < 0.4:
                tasks.append(asyncio.ensure_future(big.get_async()))
            elif deed < 0.7:
                big.put(Numbered(0, put))
                put += 1
            elif tasks:
                rng.choice(tasks).cancel()
            for _ in range(rng.randrange(3)):
                await asyncio.sleep(0)
        got = [m.number for m in drain(big)]
        while any(not task.done() for task in tasks):
            big.put(Numbered(0, put))
            put += 1
            await asyncio.wait(tasks, timeout=SOON, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(0)
        got += [m.number for m in drain(big)]
        got += [task.result().number for task in tasks if not task.cancelled()]
        assert sorted(got) == list(range(put))

    asyncio.run(main())


def test_cancelling_puts_at_random_puts_each_message_once_or_never(
    no_net: None, queue: HandleQueue[bytes], rng: random.Random
) -> None:
    async def main() -> None:
        tasks: dict[bytes, asyncio.Task[None]] = {}
        got: list[bytes] = []
        for number in range(200):
            message = b"%d" % number
            tasks[message] = asyncio.ensure_future(queue.put_async(message))
            if rng.random() < 0.4:
                rng.choice(list(tasks.values())).cancel()
            if rng.random() < 0.5 and not queue.empty():
                got += queue.get_many(rng.randrange(1, 4))
            for _ in range(rng.randrange(3)):
                await asyncio.sleep(0)
        while any(not task.done() for task in tasks.values()):
            got += drain(queue)
            await asyncio.sleep(0)
        got += drain(queue)
        assert sorted(got) == sorted(m for m, task in tasks.items() if not task.cancelled())

    asyncio.run(main())


def test_a_coroutine_that_is_dropped_in_its_wait_eats_no_message(
    no_net: None, queue: HandleQueue[bytes]
) -> None:
    async def main() -> None:
        dropped = queue.get_async()
        dropped.send(None)
        task = asyncio.ensure_future(queue.get_async())
        await until_asleep(queue, 2)
        dropped.close()
        assert asleep(queue) == (1, 0)
        queue.put(b"x")
        assert await soon(task) == b"x"

    asyncio.run(main())
    assert asleep(queue) == (0, 0)


def drop_what_was_inherited(
    _: Channel, coroutine: Coroutine[object, object, bytes], queue: HandleQueue[bytes]
) -> None:
    coroutine.close()
    with pytest.raises(standard.Empty):
        queue.get_nowait()


def test_a_forked_child_does_not_give_up_in_its_parents_place(
    no_net: None, queue: HandleQueue[bytes]
) -> None:
    """Found: collecting the inherited coroutine counted the parent off, and no put woke it."""

    async def main() -> None:
        inherited = queue.get_async()
        future = inherited.send(None)
        with fork(drop_what_was_inherited, inherited, queue):
            pass
        assert asleep(queue) == (1, 0)
        queue.put(b"x")
        await soon(future)
        with pytest.raises(StopIteration) as got:
            inherited.send(None)
        assert got.value.value == b"x"

    asyncio.run(main())
    assert asleep(queue) == (0, 0)


def interrupted_again_and_again(queue: HandleQueue[bytes], seed: float) -> int:
    """In a child, whose main thread this is."""
    random_moment = random.Random(seed)
    interrupted = 0

    async def wait_for_messages() -> None:
        await asyncio.gather(*(queue.get_async() for _ in range(3)))

    for _ in range(100):
        signal.setitimer(signal.ITIMER_REAL, random_moment.uniform(0.0001, 0.003))
        try:
            asyncio.run(asyncio.wait_for(wait_for_messages(), 0.003))
        except (KeyboardInterrupt, asyncio.TimeoutError) as error:
            interrupted += isinstance(error, KeyboardInterrupt)
        signal.setitimer(signal.ITIMER_REAL, 0)
    # A signal that came just before the last line may have set the timer again.
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    queue.put(b"x")
    assert asyncio.run(soon(queue.get_async())) == b"x"
    with Waiting(queue.close) as closing:
        closing.result(SOON)
    assert waiter_threads() == []
    return interrupted


def test_interrupts_at_any_moment_leave_it_usable(
    queue: HandleQueue[bytes], rng: random.Random
) -> None:
    def interrupt_ours(_: int, frame: FrameType | None) -> None:
        # asyncio itself cannot bear it: a task whose step is interrupted may never go on.
        if frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
            raise KeyboardInterrupt
        signal.setitimer(signal.ITIMER_REAL, 0.00005)

    def child() -> int:
        signal.signal(signal.SIGALRM, interrupt_ours)
        return interrupted_again_and_again(queue, rng.random())

    assert run_in_fork(child) > 0
    queue.put(b"y")
    assert queue.get() == b"y"


# ---- more ------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [2**32 - 2, 2**31 - 2, 2**33 - 1])
def test_the_count_of_messages_may_run_over_the_futex_word(
    no_net: None, queue: HandleQueue[bytes], start: int
) -> None:
    start_counting_at(queue, start)

    async def main() -> None:
        for number in range(4):
            task = asyncio.ensure_future(queue.get_async())
            await until_asleep(queue, 1)
            queue.put(b"%d" % number)
            assert await soon(task) == b"%d" % number

    asyncio.run(main())


def test_one_queue_serves_the_loops_of_two_threads(
    no_net: None, big: HandleQueue[Numbered]
) -> None:
    def in_a_loop() -> list[int]:
        async def main() -> list[int]:
            got = await asyncio.gather(*(big.get_async() for _ in range(50)))
            return [message.number for message in got]

        return asyncio.run(asyncio.wait_for(main(), PATIENCE))

    with Waiting(in_a_loop) as first, Waiting(in_a_loop) as second:
        for number in range(100):
            big.put(Numbered(0, number))
        assert sorted(first.result() + second.result()) == list(range(100))
    assert big.empty()


def test_one_run_after_the_other_may_use_the_same_queue(queue: HandleQueue[bytes]) -> None:
    async def main(message: bytes) -> bytes:
        task = asyncio.ensure_future(queue.get_async())
        await until_asleep(queue, 1)
        queue.put(message)
        return await soon(task)

    for number in range(5):
        assert asyncio.run(main(b"%d" % number)) == b"%d" % number


def test_a_malformed_message_is_the_error_of_the_one_who_gets_it(pool_name: str) -> None:
    with (
        HandleQueue.create(pool_name, 4, message_type=Numbered) as queue,
        HandleQueue.attach(pool_name) as raw,
    ):

        async def main() -> None:
            tasks = [asyncio.ensure_future(queue.get_async()) for _ in range(2)]
            await until_asleep(queue, 2)
            raw.put(b"malformed")
            queue.put(Numbered(1, 2))
            results = await soon(asyncio.gather(*tasks, return_exceptions=True))
            assert isinstance(results[0], MalformedMessageError)
            assert results[1] == Numbered(1, 2)

        asyncio.run(main())


def test_close_in_the_same_loop_ends_every_wait(no_net: None, pool_name: str) -> None:
    queue = HandleQueue.create(pool_name, 4)

    async def main() -> None:
        tasks = [asyncio.ensure_future(queue.get_async()) for _ in range(10)]
        await until_asleep(queue, 10)
        queue.close()
        for result in await soon(asyncio.gather(*tasks, return_exceptions=True)):
            assert isinstance(result, PoolClosedError)

    asyncio.run(main())
    assert waiter_threads() == []
