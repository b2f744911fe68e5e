"""The futex itself: sleeps, wakes across processes, and words of 32 bits of 64."""

from __future__ import annotations

import errno
import mmap
import os
import time
from typing import NamedTuple

import pytest

from shmblocks._os import futex as futex_module
from shmblocks._os.futex import Futex
from tests.queue.kit import SOON, Waiting, is_asleep, wait_until_asleep
from tests.support.children import Channel, fork, wait_until

MASK = 0xFFFFFFFF


class Shared(NamedTuple):
    """A word of shared memory, and the futex on it."""

    futex: Futex
    words: memoryview


@pytest.fixture
def shared() -> Shared:
    mapping = mmap.mmap(-1, mmap.PAGESIZE)
    words = memoryview(mapping).cast("Q")
    return Shared(Futex(mapping, 16), words)


WORD = 2


def test_it_reads_the_lower_half_of_its_word(shared: Shared) -> None:
    for value in (0, 1, MASK, 1 << 32, (1 << 32) + 5, 2**64 - 1):
        shared.words[WORD] = value
        assert shared.futex.value == value & MASK


def test_wait_returns_at_once_when_the_word_has_another_value(no_net: None, shared: Shared) -> None:
    shared.words[WORD] = 7
    for other in (6, 8, 7 + (1 << 31)):
        shared.futex.wait(other, SOON)


def test_wait_compares_the_lower_half(no_net: None, shared: Shared) -> None:
    shared.words[WORD] = (5 << 32) + 7
    with Waiting(lambda: shared.futex.wait((9 << 32) + 7, SOON * 10)) as waiting:
        waiting.until_asleep()
        assert shared.futex.wake(1) == 1


def test_wait_ends_at_its_timeout_and_not_before(shared: Shared) -> None:
    for timeout in (0.0, 0.02):
        start = time.monotonic()
        shared.futex.wait(0, timeout)
        assert time.monotonic() - start >= timeout


def test_a_negative_timeout_has_passed(shared: Shared) -> None:
    shared.futex.wait(0, -1.0)


def test_no_wait_is_longer_than_the_longest(
    monkeypatch: pytest.MonkeyPatch, shared: Shared
) -> None:
    monkeypatch.setattr(futex_module, "LONGEST_SLEEP", 0.01)
    start = time.monotonic()
    shared.futex.wait(0, float("inf"))
    assert 0.01 <= time.monotonic() - start < SOON


def test_a_longest_sleep_of_more_than_a_second_is_slept(no_net: None, shared: Shared) -> None:
    """Found: whole seconds stood among the nanoseconds, and the kernel refused to sleep at all."""
    with Waiting(lambda: shared.futex.wait(0, SOON * 10)) as waiting:
        waiting.until_asleep()
        shared.futex.wake()


def test_wake_wakes_as_many_as_asked_and_says_how_many(no_net: None, shared: Shared) -> None:
    sleepers = [Waiting(lambda: shared.futex.wait(0, SOON * 10)).until_asleep() for _ in range(3)]
    assert shared.futex.wake(2) == 2
    wait_until(lambda: sum(each.is_over for each in sleepers) == 2, "two are awake")
    assert shared.futex.wake() == 1
    for each in sleepers:
        each.end()
    assert shared.futex.wake() == 0


def sleep_there(channel: Channel, shared: Shared) -> None:
    channel.say(os.getpid())
    shared.futex.wait(0, SOON * 10)


def test_a_sleeper_in_another_process_is_woken(no_net: None, shared: Shared) -> None:
    with fork(sleep_there, shared) as child:
        child.receive()
        wait_until_asleep(child.pid, child.pid)
        assert shared.futex.wake(1) == 1


def test_a_dead_sleeper_is_not_woken_in_place_of_a_living_one(no_net: None, shared: Shared) -> None:
    with fork(sleep_there, shared) as child:
        child.receive()
        wait_until_asleep(child.pid, child.pid)
        with Waiting(lambda: shared.futex.wait(0, SOON * 10)) as living:
            living.until_asleep()
            child.kill()
            assert shared.futex.wake(1) == 1
            living.end()


def test_a_dropped_futex_wakes_nobody_sleeps_not_and_shows_no_value(shared: Shared) -> None:
    """Found: a put that was to wake when another thread closed the queue raised EFAULT."""
    shared.futex.drop()
    assert shared.futex.value == -1
    assert shared.futex.wake() == 0
    shared.futex.wait(0, SOON * 10)
    shared.futex.drop()


def test_a_wake_that_the_kernel_refuses_is_an_error(
    monkeypatch: pytest.MonkeyPatch, shared: Shared
) -> None:
    monkeypatch.setattr(futex_module, "_number", -1)
    with pytest.raises(OSError, match="Function not implemented") as caught:
        shared.futex.wake()
    assert caught.value.errno == errno.ENOSYS


def test_a_dropped_futex_lets_the_mapping_go() -> None:
    mapping = mmap.mmap(-1, mmap.PAGESIZE)
    futex = Futex(mapping, 0)
    with pytest.raises(BufferError):
        mapping.close()
    futex.drop()
    mapping.close()


def test_a_sleeper_can_be_seen_asleep() -> None:
    """What the other tests rest on: an idle thread in Python's own locks is not one."""
    with Waiting(lambda: time.sleep(0.05)) as other:
        assert not is_asleep(other.thread_id)


def test_system_call_numbers_are_those_of_the_supported_processors() -> None:
    assert futex_module._NUMBERS == {"x86_64": 202, "aarch64": 98}
