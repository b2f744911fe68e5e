"""Counts and lengths that something else wrote into the segment: a typed error, never a hang."""

from __future__ import annotations

import asyncio
import queue as standard
import random
from collections.abc import Callable

import pytest

from shmblocks import DamagedPoolError, HandleQueue
from shmblocks._state.layout import Q_GETTERS_ASLEEP, Q_HEAD, Q_PUTTERS_ASLEEP, Q_TAIL
from shmblocks._state.queue_state import MOST_ASLEEP
from tests.queue.kit import CAPACITY, SOON, Waiting, asleep, drain, fill, positions

LARGEST = 2**64 - 1

POSITIONS = [
    (1, 0),
    (LARGEST, 0),
    (0, CAPACITY + 1),
    (0, LARGEST),
    (2**63, 0),
    (5, 5 + 2**32),
]

WAYS: dict[str, Callable[[HandleQueue[bytes]], object]] = {
    "put": lambda queue: queue.put(b"x"),
    "put_nowait": lambda queue: queue.put_nowait(b"x"),
    "put with a timeout": lambda queue: queue.put(b"x", timeout=SOON * 10),
    "put_async": lambda queue: asyncio.run(queue.put_async(b"x")),
    "get": lambda queue: queue.get(),
    "get_nowait": lambda queue: queue.get_nowait(),
    "get with a timeout": lambda queue: queue.get(timeout=SOON * 10),
    "get_many": lambda queue: queue.get_many(2**24),
    "get_async": lambda queue: asyncio.run(queue.get_async()),
}


def set_words(queue: HandleQueue[bytes], **words: int) -> None:
    indices = {
        "head": Q_HEAD,
        "tail": Q_TAIL,
        "getters": Q_GETTERS_ASLEEP,
        "putters": Q_PUTTERS_ASLEEP,
    }
    for name, value in words.items():
        queue.state.segment.words[indices[name]] = value


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("head", "tail"), POSITIONS)
def test_impossible_positions_are_a_typed_error_for_everyone(
    queue: HandleQueue[bytes], way: str, head: int, tail: int
) -> None:
    """Found: putters waited for ever for room that the counts could not have."""
    set_words(queue, head=head, tail=tail)
    with Waiting(lambda: WAYS[way](queue)) as user:
        assert isinstance(user.error(SOON), DamagedPoolError)
    assert positions(queue) == (head, tail)
    set_words(queue, head=0, tail=0)


@pytest.mark.parametrize(("head", "tail"), POSITIONS)
def test_impossible_positions_can_be_counted_without_an_error(
    queue: HandleQueue[bytes], head: int, tail: int
) -> None:
    set_words(queue, head=head, tail=tail)
    assert 0 <= queue.qsize() <= CAPACITY
    assert isinstance(queue.empty(), bool)
    assert isinstance(queue.full(), bool)
    assert "messages" in repr(queue)
    set_words(queue, head=0, tail=0)


def test_a_queue_that_has_counted_to_the_end_is_a_typed_error(queue: HandleQueue[bytes]) -> None:
    """Found: a ValueError of memoryview."""
    set_words(queue, head=LARGEST, tail=LARGEST)
    with pytest.raises(DamagedPoolError):
        queue.put(b"x")
    set_words(queue, head=0, tail=0)


@pytest.mark.parametrize("count", [1, 2**31, 2**32, 2**63, LARGEST])
def test_sleepers_that_are_not_there_cost_nobody_anything(
    queue: HandleQueue[bytes], count: int
) -> None:
    """Found: with the largest count, nobody could go to sleep any more (ValueError)."""
    set_words(queue, getters=count, putters=count)
    with pytest.raises(standard.Empty):
        queue.get(timeout=0.001)
    fill(queue)
    with pytest.raises(standard.Full):
        queue.put(b"x", timeout=0.001)
    assert drain(queue) == [b"0", b"1", b"2", b"3"]
    set_words(queue, getters=LARGEST, putters=LARGEST)
    with Waiting(queue.get) as getter:
        getter.until_asleep()
        queue.put(b"x")
        assert getter.result(SOON) == b"x"
    assert asleep(queue)[0] < MOST_ASLEEP, "needless wake-ups are bounded"


@pytest.mark.parametrize("length", [65, 2**31, 2**63, LARGEST])
def test_a_message_that_claims_too_much_is_a_typed_error(
    queue: HandleQueue[bytes], length: int
) -> None:
    first_slot = queue.state._slots
    queue.put(b"x")
    queue.state.segment.words[first_slot // 8] = length
    for get in (queue.get_nowait, lambda: queue.get_many(2)):
        with pytest.raises(DamagedPoolError, match="claims"):
            get()
    queue.state.segment.words[first_slot // 8] = 1
    assert queue.get() == b"x"


def test_random_words_never_hang_or_break_the_lock(
    queue: HandleQueue[bytes], rng: random.Random
) -> None:
    interesting = [0, 1, 3, 4, 5, 2**31, 2**32 - 1, 2**32, 2**63, LARGEST]
    for _ in range(500):
        set_words(
            queue,
            **{
                name: rng.choice(interesting)
                for name in ("head", "tail", "getters", "putters")
                if rng.random() < 0.6
            },
        )
        for use in (
            lambda: queue.put(b"x", timeout=0.0001),
            lambda: queue.get(timeout=0.0001),
            lambda: queue.get_many(3, block=False),
        ):
            try:
                use()
            except (standard.Empty, standard.Full, DamagedPoolError):
                continue
    set_words(queue, head=0, tail=0, getters=0, putters=0)
    queue.put(b"x")
    assert queue.get() == b"x"
