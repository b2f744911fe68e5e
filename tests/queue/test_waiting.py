"""Waiting in threads and processes: no wake-up is lost, whoever waits, dies, stops or gives up.

Most tests run without the net (`no_net`): a sleep that nobody ends lasts a minute.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import queue as standard
import random
import time
from collections.abc import Callable
from typing import NoReturn

import pytest

from shmblocks import HandleQueue
from shmblocks._os import wait as waiting_module
from shmblocks._os.futex import Futex
from shmblocks._os.wait import LONGEST_SPIN, Sleeper, Spinner, deadline_of, seconds_left
from tests.queue.kit import (
    NO_NET,
    PATIENCE,
    SOON,
    Waiting,
    asleep,
    drain,
    fill,
    start_counting_at,
    wait_until_asleep,
)
from tests.support.children import Channel, Child, fork, wait_until

# ---- spinning --------------------------------------------------------------------------------


class CountedWord(Futex):
    """A word that counts how often it is read, and changes at the given reading."""

    def __init__(self, changes_at: int | None = None) -> None:
        super().__init__(mmap.mmap(-1, mmap.PAGESIZE), 0)
        self.reads = 0
        self._changes_at = changes_at

    @property
    def value(self) -> int:
        self.reads += 1
        return int(self._changes_at is not None and self.reads >= self._changes_at)


@pytest.fixture
def two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)


def test_a_spin_sees_the_change(two_processors: None) -> None:
    assert Spinner().until_changed(CountedWord(changes_at=100), 0)


def test_a_spin_in_vain_ends(two_processors: None) -> None:
    start = time.monotonic()
    assert not Spinner(0.01).until_changed(CountedWord(), 0)
    assert 0.01 <= time.monotonic() - start < SOON


def test_a_spin_lasts_no_longer_than_the_wait_may(two_processors: None) -> None:
    word = CountedWord()
    assert not Spinner(SOON).until_changed(word, 0, 0.0)
    assert not Spinner(SOON).until_changed(word, 0, -1.0)
    assert word.reads == 0
    start = time.monotonic()
    assert not Spinner(2 * SOON).until_changed(word, 0, 0.01)
    assert 0.01 <= time.monotonic() - start < SOON


def test_waits_too_long_for_spinning_make_it_shorter_and_short_ones_long_again(
    two_processors: None,
) -> None:
    spinner = Spinner(0.004)
    budgets = []
    for _ in range(12):
        spinner.slept(time.monotonic_ns() - 5_000_000)
        budgets.append(spinner._budget_ns)
    assert budgets[:3] == [2_000_000, 1_000_000, 500_000]
    assert budgets[-1] == int(waiting_module.SHORTEST_SPIN * 1e9)
    spinner.slept(time.monotonic_ns())  # it would have seen that, had it spun on
    assert spinner._budget_ns == 4_000_000
    spinner.gave_up()
    assert spinner._budget_ns == 2_000_000
    assert spinner.until_changed(CountedWord(changes_at=1), 0)
    assert spinner._budget_ns == 2_000_000


def test_a_getter_learns_from_how_long_it_waits(two_processors: None, pool_name: str) -> None:
    with HandleQueue.create(pool_name, 4, spin=SOON) as queue:
        spinner = queue._getting._spinner
        for _ in range(40):
            spinner.gave_up()
        shortest = spinner._budget_ns
        with pytest.raises(standard.Empty):
            queue.get(timeout=0.01)
        assert spinner._budget_ns == shortest
        with Waiting(queue.get) as getter:
            getter.until_asleep()
            queue.put(b"x")
            assert getter.result(SOON) == b"x"
        assert spinner._budget_ns == int(SOON * 1e9)


def test_no_spin_does_not_read_the_word_at_all(two_processors: None) -> None:
    """Found: it read it 64 times, some five microseconds of each wait."""
    word = CountedWord()
    assert not Spinner(0).until_changed(word, 0)
    assert word.reads <= 1


def test_nobody_spins_where_there_is_one_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    word = CountedWord()
    assert not Spinner(10.0).until_changed(word, 0)
    assert word.reads <= 1


def spin_on_one_processor(_: Channel, name: str) -> int:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with HandleQueue.attach(name, spin=SOON) as queue:
        word = CountedWord(changes_at=1000)
        assert queue._getting._spinner.until_changed(word, 0)
        return word.reads


def test_a_child_that_is_pinned_to_one_processor_spins(
    two_processors: None, queue: HandleQueue[bytes]
) -> None:
    """Found: it never did, though its partners had processors of their own."""
    with fork(spin_on_one_processor, queue.name) as child:
        assert child.result() == 1000


def test_a_queue_that_never_spins_sleeps_at_once(no_net: None, pool_name: str) -> None:
    with HandleQueue.create(pool_name, 4, spin=0) as queue:
        word = CountedWord()
        assert not queue._getting._spinner.until_changed(word, 0)
        assert word.reads <= 1
        with Waiting(queue.get) as getter:
            getter.until_asleep()
            queue.put(b"x")
            assert getter.result(SOON) == b"x"


def test_a_queue_that_spins_takes_a_message_without_sleeping(
    monkeypatch: pytest.MonkeyPatch, two_processors: None, pool_name: str
) -> None:
    def no_sleep(*_: object) -> NoReturn:
        raise AssertionError("it slept")

    with HandleQueue.create(pool_name, 4, spin=PATIENCE) as queue:
        monkeypatch.setattr(queue._getting, "_sleep", no_sleep)
        with Waiting(queue.get) as getter, HandleQueue.attach(queue.name) as other:
            other.put(b"x")
            assert getter.result() == b"x"


def test_what_comes_between_the_look_and_the_spin_is_not_spun_for(
    two_processors: None, pool_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found: the spinner took the word as it was *after* the message, and spun to its end."""
    with HandleQueue.create(pool_name, 4, spin=NO_NET) as queue:
        queue.state.core = None  # the compiled core looks while it spins
        look = queue._try_get

        def and_then_a_message_comes(limit: int) -> list[bytes]:
            monkeypatch.setattr(queue, "_try_get", look)
            messages = look(limit)
            queue.put(b"x")
            return messages

        monkeypatch.setattr(queue, "_try_get", and_then_a_message_comes)
        with Waiting(queue.get) as getter:
            assert getter.result(SOON) == b"x"


def test_room_that_comes_between_the_look_and_the_spin_is_not_spun_for(
    two_processors: None, pool_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HandleQueue.create(pool_name, 1, spin=NO_NET) as queue:
        queue.put(b"x")
        look = queue._try_put
        looks = []

        def and_then_room_comes(message: bytes) -> bool:
            looks.append(message)
            found = look(message)
            if len(looks) == 2 and not found:
                queue.get()
            return found

        monkeypatch.setattr(queue, "_try_put", and_then_room_comes)
        with Waiting(lambda: queue.put(b"y")) as putter:
            putter.result(SOON)
        assert drain(queue) == [b"y"]


# ---- sleeping --------------------------------------------------------------------------------


def test_deadlines() -> None:
    assert deadline_of(None) is None
    assert seconds_left(None) == float("inf")
    deadline = deadline_of(10.0)
    assert 9.0 < seconds_left(deadline) <= 10.0
    assert seconds_left(time.monotonic() - 1) < 0
    for wrong in (-1.0, -1e-9, float("nan")):
        with pytest.raises(ValueError, match="timeout: expected seconds >= 0, got"):
            deadline_of(wrong)


def test_a_message_that_comes_before_the_getter_registers_is_seen(
    no_net: None, pool_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HandleQueue.create(pool_name, 4, spin=0) as queue:
        register = queue._getting._register

        def after_a_message() -> int:
            queue.state.put(b"x")  # under the lock already
            return register()

        queue._getting._register = after_a_message
        with Waiting(queue.get) as getter:
            assert getter.result(SOON) == b"x"
        assert asleep(queue) == (0, 0)


def test_a_message_that_comes_before_the_getter_sleeps_is_seen(
    no_net: None, pool_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HandleQueue.create(pool_name, 4, spin=0) as queue:
        wait = queue.state.puts.wait

        def after_a_message(expected: int, timeout: float) -> None:
            queue.put(b"x")
            wait(expected, timeout)

        monkeypatch.setattr(queue.state.puts, "wait", after_a_message)
        with Waiting(queue.get) as getter:
            assert getter.result(SOON) == b"x"
        assert asleep(queue) == (0, 0)


def test_each_of_several_messages_wakes_one_of_several_getters(
    no_net: None, queue: HandleQueue[bytes]
) -> None:
    getters = [Waiting(queue.get).until_asleep() for _ in range(4)]
    assert asleep(queue) == (4, 0)
    for number in range(4):
        queue.put(b"%d" % number)
    assert sorted(getter.result(SOON) for getter in getters) == [b"0", b"1", b"2", b"3"]
    assert asleep(queue) == (0, 0)


def test_each_of_several_gets_wakes_one_of_several_putters(
    no_net: None, queue: HandleQueue[bytes]
) -> None:
    fill(queue)
    putters = [Waiting(lambda: queue.put(b"x")).until_asleep() for _ in range(4)]
    assert asleep(queue) == (0, 4)
    for number in range(4):
        assert queue.get() == b"%d" % number
    for putter in putters:
        putter.result(SOON)
    assert asleep(queue) == (0, 0)
    assert drain(queue) == [b"x"] * 4


def test_one_that_gives_up_is_counted_no_more(queue: HandleQueue[bytes]) -> None:
    with pytest.raises(standard.Empty):
        queue.get(timeout=0.01)
    fill(queue)
    with pytest.raises(standard.Full):
        queue.put(b"x", timeout=0.01)
    assert asleep(queue) == (0, 0)


def test_nobody_who_waits_means_no_system_call_to_wake(
    queue: HandleQueue[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_wake(*_: object) -> NoReturn:
        raise AssertionError("it woke somebody")

    with Waiting(queue.get) as getter:
        getter.until_asleep()
        queue.put(b"x")
        getter.result()
    monkeypatch.setattr(queue.state.puts, "wake", no_wake)
    monkeypatch.setattr(queue.state.gets, "wake", no_wake)
    for _ in range(3):
        fill(queue)
        drain(queue)


class Interrupted(BaseException):
    """Stands for KeyboardInterrupt in a thread that is not the main one."""


def interrupted_after(sleeper: Sleeper, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that sleeps there next is interrupted right after it was woken."""
    wait = sleeper._futex.wait

    def then_interrupted(expected: int, timeout: float) -> None:
        monkeypatch.setattr(sleeper._futex, "wait", wait)
        wait(expected, timeout)
        raise Interrupted

    monkeypatch.setattr(sleeper._futex, "wait", then_interrupted)


def test_a_getter_that_is_woken_and_interrupted_hands_the_wake_up_on(
    no_net: None, queue: HandleQueue[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found: the message lay there, and the next sleeper slept on to the end of its sleep."""
    interrupted_after(queue._getting, monkeypatch)
    with Waiting(queue.get) as first:
        first.until_asleep()
        with Waiting(queue.get) as second:
            second.until_asleep()
            queue.put(b"x")
            assert second.result(SOON) == b"x"
        assert isinstance(first.error(SOON), Interrupted)


def test_a_putter_that_is_woken_and_interrupted_hands_the_wake_up_on(
    no_net: None, queue: HandleQueue[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(queue)
    interrupted_after(queue._putting, monkeypatch)
    with Waiting(lambda: queue.put(b"first")) as first:
        first.until_asleep()
        with Waiting(lambda: queue.put(b"second")) as second:
            second.until_asleep()
            queue.get()
            second.result(SOON)
        assert isinstance(first.error(SOON), Interrupted)
    assert drain(queue) == [b"1", b"2", b"3", b"second"]


@pytest.mark.parametrize("start", [2**32 - 2, 2**31 - 2, 2**33 - 2, 2**63 - 2])
def test_the_count_of_messages_may_run_over_the_futex_word(
    no_net: None, queue: HandleQueue[bytes], start: int
) -> None:
    start_counting_at(queue, start)
    for number in range(5):
        with Waiting(queue.get) as getter:
            getter.until_asleep()
            queue.put(b"%d" % number)
            assert getter.result(SOON) == b"%d" % number
    start_counting_at(queue, start)
    fill(queue)
    for number in range(5):
        with Waiting(lambda n=number: queue.put(b"%d" % (4 + n))) as putter:  # type: ignore[misc]
            putter.until_asleep()
            assert queue.get() == b"%d" % number
            putter.result(SOON)
    assert asleep(queue) == (0, 0)


def test_idle_waiters_come_and_go_and_the_counts_stay_right(
    queue: HandleQueue[bytes], rng: random.Random
) -> None:
    for _ in range(30):
        if rng.random() < 0.5:
            with pytest.raises(standard.Empty):
                queue.get(timeout=rng.random() * 0.002)
        else:
            fill(queue)
            with pytest.raises(standard.Full):
                queue.put(b"x", timeout=rng.random() * 0.002)
            drain(queue)
    assert asleep(queue) == (0, 0)


# ---- other processes -------------------------------------------------------------------------


def get_there(channel: Channel, queue: HandleQueue[bytes]) -> bytes:
    channel.say("waiting")
    return queue.get(timeout=PATIENCE * 2)


def put_there(channel: Channel, queue: HandleQueue[bytes]) -> None:
    channel.say("waiting")
    queue.put(b"from the child", timeout=PATIENCE * 2)


def asleep_in(function: Callable[..., object], queue: HandleQueue[bytes]) -> Child:
    child = fork(function, queue)
    child.hear("waiting")
    wait_until_asleep(child.pid, child.pid)
    return child


def test_a_getter_in_another_process_is_woken(no_net: None, queue: HandleQueue[bytes]) -> None:
    with asleep_in(get_there, queue) as child:
        queue.put(b"x")
        assert child.result(SOON) == b"x"
    assert asleep(queue) == (0, 0)


def test_a_putter_in_another_process_is_woken(no_net: None, queue: HandleQueue[bytes]) -> None:
    fill(queue)
    with asleep_in(put_there, queue) as child:
        assert queue.get() == b"0"
        child.result(SOON)
    assert drain(queue) == [b"1", b"2", b"3", b"from the child"]


def test_dead_getters_take_nobodys_wake_up(no_net: None, queue: HandleQueue[bytes]) -> None:
    children = [asleep_in(get_there, queue) for _ in range(3)]
    with Waiting(queue.get) as survivor:
        survivor.until_asleep()
        for child in children:
            child.kill()
            child.close()
        queue.put(b"x")
        assert survivor.result(SOON) == b"x"
    # Three are counted who are dead: each put takes one of them back.
    for number in range(3):
        assert asleep(queue)[0] == 3 - number
        queue.put(b"x")
    assert asleep(queue) == (0, 0)


def test_dead_putters_take_nobodys_wake_up(no_net: None, queue: HandleQueue[bytes]) -> None:
    fill(queue)
    children = [asleep_in(put_there, queue) for _ in range(3)]
    with Waiting(lambda: queue.put(b"mine")) as survivor:
        survivor.until_asleep()
        for child in children:
            child.kill()
            child.close()
        queue.get()
        survivor.result(SOON)
    assert drain(queue) == [b"1", b"2", b"3", b"mine"]


def test_a_stopped_getter_takes_nobodys_wake_up_and_goes_on_later(
    no_net: None, queue: HandleQueue[bytes]
) -> None:
    with asleep_in(get_there, queue) as stopped:
        stopped.stop()
        with Waiting(queue.get) as other:
            other.until_asleep()
            queue.put(b"for the other")
            assert other.result(SOON) == b"for the other"
        stopped.resume()
        queue.put(b"for the stopped")
        assert stopped.result(SOON) == b"for the stopped"


def test_a_getter_that_is_stopped_after_it_was_woken_holds_nobody_up_for_long(
    queue: HandleQueue[bytes],
) -> None:
    """Its wake-up cannot be had back; the others look by themselves."""
    with asleep_in(get_there, queue) as stopped, Waiting(queue.get) as other:
        other.until_asleep()
        stopped.stop()
        # The wake-up that goes to the stopped one, as if it had been woken a moment before.
        queue.state.put(b"x")
        assert other.result(SOON) == b"x"
        stopped.resume()
        queue.put(b"y")
        assert stopped.result(SOON) == b"y"


def put_and_die_before_the_wake_up(_: Channel, queue: HandleQueue[bytes]) -> None:
    queue.state.put(b"the last words")
    os._exit(0)


def test_a_putter_that_dies_before_its_wake_up_costs_a_quarter_of_a_second(
    queue: HandleQueue[bytes],
) -> None:
    with Waiting(queue.get) as getter:
        getter.until_asleep()
        child = fork(put_and_die_before_the_wake_up, queue)
        child.wait()
        child.close()
        assert getter.result(SOON) == b"the last words"


def give_up_there(channel: Channel, queue: HandleQueue[bytes]) -> None:
    import asyncio

    async def in_vain() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(queue.get_async(), 0.05)

    asyncio.run(in_vain())
    channel.say("gave up")
    channel.hear("end")
    queue.close()


def test_an_event_loop_that_gave_up_takes_nobodys_wake_up(
    no_net: None, queue: HandleQueue[bytes]
) -> None:
    """Found: its thread slept on for a while, and ate the wake-up that was meant for others."""
    with fork(give_up_there, queue) as child:
        child.hear("gave up")
        with Waiting(queue.get) as getter:
            getter.until_asleep()
            queue.put(b"x")
            assert getter.result(SOON) == b"x"
        child.say("end")


def test_a_wait_ends_at_its_deadline_also_when_it_is_woken_for_nothing(
    queue: HandleQueue[bytes],
) -> None:
    deadline = time.monotonic() + 0.2
    with Waiting(lambda: queue.get(timeout=0.2)) as getter:
        while not getter.is_over:
            queue.state.puts.wake()
            assert time.monotonic() < deadline + SOON
            time.sleep(0.001)
        assert isinstance(getter.error(), standard.Empty)
        assert time.monotonic() >= deadline


def awaited(sleeper: Sleeper, timeout: float | None) -> bool:
    return asyncio.run(asyncio.wait_for(sleeper.until_changed_async(deadline_of(timeout)), SOON))


def test_an_awaited_change_comes_before_the_deadline_or_not(
    no_net: None, queue: HandleQueue[bytes]
) -> None:
    assert not awaited(queue._getting, 0.0)
    start = time.monotonic()
    assert not awaited(queue._getting, 0.02)
    assert time.monotonic() - start >= 0.019
    assert asleep(queue) == (0, 0)
    with Waiting(lambda: awaited(queue._getting, SOON)) as waiter:
        wait_until(lambda: asleep(queue) == (1, 0), "it is registered")
        queue.put(b"x")
        assert waiter.result(SOON)
    assert awaited(queue._getting, None)  # there is a message: no need to wait
    assert asleep(queue) == (0, 0)


def test_the_longest_spin_is_shorter_than_the_longest_sleep() -> None:
    assert LONGEST_SPIN < 0.001
