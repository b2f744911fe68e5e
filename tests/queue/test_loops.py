"""One thread that sleeps for all coroutines on a word: told in turn, whatever others do.

Here the word is plain memory and the test plays the queue: it moves the word and wakes.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import NamedTuple, TypeVar

import pytest

from shmblocks._os import futex_asyncio as loops_module
from shmblocks._os.futex import Futex
from shmblocks._os.futex_asyncio import LoopWaiters
from tests.queue.kit import PATIENCE, SOON, Waiting, wait_until_asleep, waiter_threads
from tests.support.children import Channel, fork, wait_until

T = TypeVar("T")


class Word(NamedTuple):
    """A word of shared memory, and those who await it."""

    waiters: LoopWaiters
    futex: Futex
    words: memoryview

    def goes_up(self, by: int = 1) -> None:
        self.words[0] = (self.words[0] + by) % 2**64
        self.futex.wake()


def make_word(*, notifies_all: bool = False) -> Word:
    mapping = mmap.mmap(-1, mmap.PAGESIZE)
    futex = Futex(mapping, 0)
    return Word(LoopWaiters(futex, notifies_all=notifies_all), futex, memoryview(mapping).cast("Q"))


@pytest.fixture
def word(no_net: None) -> Iterator[Word]:
    made = make_word()
    yield made
    made.waiters.close()
    assert waiter_threads() == []


async def until(predicate: Callable[[], object], what: str) -> None:
    """`wait_until` for one who is inside of an event loop that must go on."""
    deadline = asyncio.get_running_loop().time() + PATIENCE
    while not predicate():
        assert asyncio.get_running_loop().time() < deadline, f"waited until {what}"
        await asyncio.sleep(0)


async def soon(awaitable: asyncio.Future[T] | Coroutine[object, object, T]) -> T:
    return await asyncio.wait_for(awaitable, SOON)


def waiting_count(word: Word) -> int:
    return len(word.waiters._waiters)


async def sleeping(word: Word, count: int, seen: int) -> list[asyncio.Task[bool]]:
    """So many tasks, in this order asleep."""
    tasks = []
    for _ in range(count):
        tasks.append(asyncio.ensure_future(word.waiters.sleep(seen)))
        await asyncio.sleep(0)
    return tasks


def over(tasks: list[asyncio.Task[bool]]) -> list[bool]:
    return [task.done() for task in tasks]


@pytest.mark.parametrize("start", [0, 5, 2**32 - 2, 2**32 - 1, 2**32, 2**33 - 2, 2**64 - 2])
def test_as_many_are_told_as_the_word_goes_up_by_longest_waiting_first(
    word: Word, start: int
) -> None:
    word.words[0] = start

    async def main() -> None:
        tasks = await sleeping(word, 4, start)
        word.goes_up(1)
        await soon(tasks[0])
        await asyncio.sleep(0.01)
        assert over(tasks) == [True, False, False, False]
        word.goes_up(2)
        await soon(asyncio.gather(tasks[1], tasks[2]))
        await asyncio.sleep(0.01)
        assert over(tasks) == [True, True, True, False]
        word.goes_up(7)
        await soon(tasks[3])

    asyncio.run(main())


def test_one_thread_sleeps_for_all_and_ends_by_itself(word: Word) -> None:
    async def main() -> None:
        tasks = await sleeping(word, 100, 0)
        assert len(waiter_threads()) == 1
        word.goes_up(100)
        await soon(asyncio.gather(*tasks))

    asyncio.run(main())
    wait_until(lambda: waiter_threads() == [], "the thread has ended")


def test_the_thread_comes_back_for_the_next(word: Word) -> None:
    async def main() -> None:
        for number in range(3):
            (task,) = await sleeping(word, 1, number)
            word.goes_up()
            await soon(task)
            await until(lambda: waiter_threads() == [], "the thread has ended")

    asyncio.run(main())


def test_a_word_that_went_up_before_the_sleep_ends_it(word: Word) -> None:
    word.words[0] = 5
    asyncio.run(soon(word.waiters.sleep(4)))


def test_one_who_saw_an_older_value_is_told_too(word: Word) -> None:
    """Two loops register in one order and come here in the other."""

    async def main() -> None:
        (newer,) = await sleeping(word, 1, 6)
        (older,) = await sleeping(word, 1, 5)
        await soon(older)
        if not newer.done():  # it may have been told for nothing
            word.goes_up()
        await soon(newer)

    word.words[0] = 6
    asyncio.run(main())


def test_all_are_told_where_each_change_concerns_everyone(no_net: None) -> None:
    word = make_word(notifies_all=True)

    async def main() -> None:
        tasks = await sleeping(word, 5, 0)
        word.goes_up(1)
        await soon(asyncio.gather(*tasks))

    asyncio.run(main())
    word.waiters.close()


def test_a_sleep_with_a_timeout_ends_by_itself_and_leaves_nothing(word: Word) -> None:
    async def main() -> None:
        start = asyncio.get_running_loop().time()
        assert not await soon(word.waiters.sleep(0, 0.02))
        assert asyncio.get_running_loop().time() - start >= 0.019
        assert waiting_count(word) == 0
        (task,) = await sleeping(word, 1, 0)
        word.goes_up()
        assert await soon(task)

    asyncio.run(main())


# ---- whoever goes away -----------------------------------------------------------------------


def test_one_who_is_cancelled_leaves_nothing_behind(word: Word) -> None:
    async def main() -> None:
        tasks = await sleeping(word, 3, 0)
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        assert waiting_count(word) == 2
        word.goes_up()
        await soon(tasks[1])
        assert not tasks[2].done()
        word.goes_up()
        await soon(tasks[2])

    asyncio.run(main())


def test_one_who_is_told_and_cancelled_in_the_same_moment_hands_it_on(word: Word) -> None:
    async def main() -> None:
        tasks = await sleeping(word, 2, 0)
        word.goes_up()
        # Not awaited: the loop stands still, so that nobody acts on what he was told.
        wait_until(lambda: waiting_count(word) == 1, "the first was told")
        tasks[0].cancel()
        await soon(tasks[1])
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]

    asyncio.run(main())


def test_one_who_is_told_and_cancelled_with_nobody_behind_hands_it_to_other_processes(
    word: Word,
) -> None:
    """Found: the wake-up was lost, and a sleeper elsewhere slept on beside a message."""

    async def main() -> None:
        (task,) = await sleeping(word, 1, 0)
        await until(waiter_threads, "the thread is there")
        wait_until_asleep(waiter_threads()[0].native_id or 0)
        with Waiting(lambda: word.futex.wait(0, SOON * 10)) as elsewhere:
            elsewhere.until_asleep()
            word.words[0] = 1
            assert word.futex.wake(1) == 1
            wait_until(lambda: waiting_count(word) == 0, "the coroutine was told")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            elsewhere.end(SOON)

    asyncio.run(main())


def test_a_coroutine_that_is_closed_is_not_told_in_anothers_place(word: Word) -> None:
    """Found: only cancelling took a waiter out; a closed one ate what another waited for."""

    async def main() -> None:
        closed = word.waiters.sleep(0)
        closed.send(None)
        (task,) = await sleeping(word, 1, 0)
        closed.close()
        assert waiting_count(word) == 1
        word.goes_up()
        await soon(task)

    asyncio.run(main())


def leave_waiting_in_a_closed_loop(word: Word) -> asyncio.Task[bool]:
    loop = asyncio.new_event_loop()

    async def start() -> asyncio.Task[bool]:
        return (await sleeping(word, 1, 0))[0]

    task = loop.run_until_complete(start())
    loop.close()
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # left on purpose
    return task


def test_one_whose_loop_was_closed_is_not_told_in_anothers_place(word: Word) -> None:
    """Found: what the dead loop's waiter was told, nobody heard."""
    left = leave_waiting_in_a_closed_loop(word)

    async def main() -> None:
        (task,) = await sleeping(word, 1, 0)
        word.goes_up()
        await soon(task)

    asyncio.run(main())
    assert not left.done()


class ClosingLoop:
    """A loop that is closed between the question whether it is and the call."""

    def is_closed(self) -> bool:
        return False

    def call_soon_threadsafe(self, *_: object) -> None:
        raise RuntimeError("Event loop is closed")


def test_a_loop_that_closes_while_it_is_told_does_not_end_the_thread(word: Word) -> None:
    """Found: the thread died of it, nobody noticed, and every later wait was for ever."""

    async def main() -> None:
        waiter = loops_module._Waiter(asyncio.get_running_loop())
        waiter.loop = ClosingLoop()  # type: ignore[assignment]
        word.waiters._waiters.append(waiter)
        (task,) = await sleeping(word, 1, 0)
        word.goes_up()
        await soon(task)

    asyncio.run(main())


def test_a_thread_that_cannot_be_started_is_told_and_tried_again(
    word: Word, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found: it counted as running from then on."""
    start = threading.Thread.start

    def no_thread(self: threading.Thread) -> None:
        monkeypatch.setattr(threading.Thread, "start", start)
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        monkeypatch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(RuntimeError, match="can't start"):
            await word.waiters.sleep(0)
        assert waiting_count(word) == 0
        (task,) = await sleeping(word, 1, 0)
        word.goes_up()
        await soon(task)

    asyncio.run(main())


# ---- several loops ---------------------------------------------------------------------------


def test_loops_of_two_threads_are_both_told(word: Word) -> None:
    def in_a_loop() -> None:
        async def main() -> None:
            await soon(word.waiters.sleep(0))

        asyncio.run(main())

    with Waiting(in_a_loop) as first, Waiting(in_a_loop) as second:
        wait_until(lambda: waiting_count(word) == 2, "both wait")
        assert len(waiter_threads()) == 1
        word.goes_up(2)
        first.result()
        second.result()


def test_what_a_loop_that_stands_still_was_told_another_hears_in_the_end() -> None:
    """A waiter that was told need not come: its loop may be busy, or never run again."""
    word = make_word()
    word.waiters.close()
    there = LoopWaiters(word.futex, is_there=lambda: bool(word.words[0]))
    stopped = asyncio.new_event_loop()

    async def start() -> asyncio.Task[bool]:
        task = asyncio.ensure_future(there.sleep(0))
        await asyncio.sleep(0)
        return task

    left = stopped.run_until_complete(start())

    async def main() -> None:
        task = asyncio.ensure_future(there.sleep(0))
        await asyncio.sleep(0)
        word.goes_up()
        await soon(task)

    asyncio.run(main())
    assert not left.done()
    stopped.run_until_complete(asyncio.wait_for(left, SOON))
    stopped.close()
    there.close()


# ---- closing and forking ---------------------------------------------------------------------


def test_close_ends_every_wait_and_the_thread(word: Word) -> None:
    async def main() -> None:
        tasks = await sleeping(word, 3, 0)
        word.waiters.close()
        assert waiter_threads() == []
        await soon(asyncio.gather(*tasks))

    asyncio.run(main())


def sleep_in_the_child(_: Channel, word: Word) -> int:
    async def main() -> None:
        (task,) = await sleeping(word, 1, word.words[0])
        word.goes_up()
        await soon(task)

    asyncio.run(main())
    word.waiters.close()
    return len(waiter_threads())


def test_a_forked_child_has_waiters_of_its_own(word: Word) -> None:
    async def main() -> None:
        (task,) = await sleeping(word, 1, 0)
        with fork(sleep_in_the_child, word) as child:
            assert child.result() == 0
        await soon(task)  # it is the same word

    asyncio.run(main())


def test_a_child_forked_while_a_thread_is_inside_is_not_locked_out(word: Word) -> None:
    """Found: the lock stayed taken in the child for ever, by a thread that only the parent has."""
    with word.waiters._lock:
        child = fork(sleep_in_the_child, word)
    with child:
        assert child.result(PATIENCE) == 0


def test_the_module_does_not_import_asyncio() -> None:
    """It takes longer than all of the library, and most users never await."""
    import subprocess
    import sys

    code = "import sys, shmblocks; sys.exit('asyncio' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], env=os.environ, timeout=PATIENCE)
    assert ended.returncode == 0
    assert not hasattr(loops_module, "asyncio")
