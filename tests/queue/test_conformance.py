"""One conformance suite over the standard library's queues and ours."""

from __future__ import annotations

import contextlib
import multiprocessing
import queue as standard
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import pytest

from shmblocks import HandleQueue
from tests.queue.kit import PATIENCE, SOON, Waiting

SIZE = 3
A_WHILE = 0.05  # seconds


class AnyQueue(Protocol):
    """What a queue of bytes is, in the words of the standard library."""

    def put(self, item: bytes, block: bool = ..., timeout: float | None = ...) -> None: ...
    def get(self, block: bool = ..., timeout: float | None = ...) -> bytes: ...
    def put_nowait(self, item: bytes) -> None: ...
    def get_nowait(self) -> bytes: ...
    def qsize(self) -> int: ...
    def empty(self) -> bool: ...
    def full(self) -> bool: ...


@contextlib.contextmanager
def _thread_queue(_: str) -> Iterator[AnyQueue]:
    yield standard.Queue(SIZE)


@contextlib.contextmanager
def _process_queue(_: str) -> Iterator[AnyQueue]:
    made: multiprocessing.Queue[bytes] = multiprocessing.Queue(SIZE)
    try:
        yield made
    finally:
        made.close()
        made.join_thread()
        for end in (made._reader, made._writer):  # type: ignore[attr-defined]
            end.close()  # by itself it does that only when something was put


@contextlib.contextmanager
def _handle_queue(name: str) -> Iterator[AnyQueue]:
    with HandleQueue.create(name, SIZE, message_bytes=64) as made:
        yield made


@contextlib.contextmanager
def _handle_queue_without_spin(name: str) -> Iterator[AnyQueue]:
    with HandleQueue.create(name, SIZE, message_bytes=64, spin=0) as made:
        yield made


KINDS: dict[str, Callable[[str], contextlib.AbstractContextManager[AnyQueue]]] = {
    "queue.Queue": _thread_queue,
    "multiprocessing.Queue": _process_queue,
    "HandleQueue": _handle_queue,
    "HandleQueue that never spins": _handle_queue_without_spin,
}
# Those whose messages are there as soon as `put` returns; multiprocessing's are sent by a thread.
PROMPT_KINDS = [kind for kind in KINDS if kind != "multiprocessing.Queue"]


@pytest.fixture(params=KINDS)
def any_queue(request: pytest.FixtureRequest, pool_name: str) -> Iterator[AnyQueue]:
    with KINDS[request.param](pool_name) as made:
        yield made


@pytest.fixture(params=PROMPT_KINDS)
def prompt_queue(request: pytest.FixtureRequest, pool_name: str) -> Iterator[AnyQueue]:
    with KINDS[request.param](pool_name) as made:
        yield made


def filled(queue: AnyQueue) -> AnyQueue:
    for number in range(SIZE):
        queue.put(b"%d" % number)
    return queue


def test_messages_come_out_in_the_order_in_which_they_went_in(any_queue: AnyQueue) -> None:
    filled(any_queue)
    assert [any_queue.get(timeout=PATIENCE) for _ in range(SIZE)] == [b"0", b"1", b"2"]


def test_order_holds_over_many_rounds_of_the_slots(any_queue: AnyQueue) -> None:
    got = []
    for number in range(20 * SIZE):
        any_queue.put(b"%d" % number)
        if number % SIZE == SIZE - 1:
            got += [any_queue.get(timeout=PATIENCE) for _ in range(SIZE)]
    assert got == [b"%d" % number for number in range(20 * SIZE)]


def test_an_empty_queue_raises_empty(any_queue: AnyQueue) -> None:
    for get in (
        any_queue.get_nowait,
        lambda: any_queue.get(False),
        lambda: any_queue.get(block=False),
        lambda: any_queue.get(timeout=0),
        lambda: any_queue.get(True, 0.001),
    ):
        with pytest.raises(standard.Empty):
            get()


def test_a_full_queue_raises_full(any_queue: AnyQueue) -> None:
    filled(any_queue)
    ways: list[Callable[[], None]] = [
        lambda: any_queue.put_nowait(b"x"),
        lambda: any_queue.put(b"x", False),
        lambda: any_queue.put(b"x", block=False),
        lambda: any_queue.put(b"x", timeout=0),
        lambda: any_queue.put(b"x", True, 0.001),
    ]
    for put in ways:
        with pytest.raises(standard.Full):
            put()
    assert [any_queue.get(timeout=PATIENCE) for _ in range(SIZE)] == [b"0", b"1", b"2"]


def test_a_timeout_is_waited_for_and_not_less(any_queue: AnyQueue) -> None:
    start = time.monotonic()
    with pytest.raises(standard.Empty):
        any_queue.get(timeout=A_WHILE)
    assert time.monotonic() - start >= A_WHILE
    filled(any_queue)
    start = time.monotonic()
    with pytest.raises(standard.Full):
        any_queue.put(b"x", timeout=A_WHILE)
    assert time.monotonic() - start >= A_WHILE


def test_a_timeout_means_nothing_to_one_that_does_not_block(any_queue: AnyQueue) -> None:
    start = time.monotonic()
    with pytest.raises(standard.Empty):
        any_queue.get(False, 10 * PATIENCE)
    filled(any_queue)
    with pytest.raises(standard.Full):
        any_queue.put(b"x", False, 10 * PATIENCE)
    assert time.monotonic() - start < SOON


def test_a_get_makes_room_for_a_put(any_queue: AnyQueue) -> None:
    filled(any_queue)
    assert any_queue.get(timeout=PATIENCE) == b"0"
    any_queue.put(b"3", timeout=PATIENCE)
    assert [any_queue.get(timeout=PATIENCE) for _ in range(SIZE)] == [b"1", b"2", b"3"]


def test_a_waiting_get_is_woken_by_a_put(any_queue: AnyQueue) -> None:
    with Waiting(lambda: any_queue.get(timeout=10 * PATIENCE)) as getter:
        any_queue.put(b"x")
        assert getter.result(SOON) == b"x"


def test_a_waiting_put_is_woken_by_a_get(any_queue: AnyQueue) -> None:
    filled(any_queue)
    with Waiting(lambda: any_queue.put(b"3", timeout=10 * PATIENCE)) as putter:
        assert any_queue.get(timeout=PATIENCE) == b"0"
        putter.result(SOON)
    assert any_queue.full()


def test_a_get_without_timeout_waits_as_long_as_it_takes(any_queue: AnyQueue) -> None:
    with Waiting(any_queue.get) as getter:
        any_queue.put(b"x")
        assert getter.result(SOON) == b"x"


def test_it_counts_what_is_in_it(prompt_queue: AnyQueue) -> None:
    assert (prompt_queue.qsize(), prompt_queue.empty(), prompt_queue.full()) == (0, True, False)
    prompt_queue.put(b"x")
    assert (prompt_queue.qsize(), prompt_queue.empty(), prompt_queue.full()) == (1, False, False)
    prompt_queue.put(b"x")
    prompt_queue.put(b"x")
    assert (prompt_queue.qsize(), prompt_queue.empty(), prompt_queue.full()) == (3, False, True)
    prompt_queue.get()
    assert (prompt_queue.qsize(), prompt_queue.empty(), prompt_queue.full()) == (2, False, False)


def test_what_was_put_is_there_at_once(prompt_queue: AnyQueue) -> None:
    for number in range(10 * SIZE):
        prompt_queue.put_nowait(b"%d" % number)
        assert prompt_queue.get_nowait() == b"%d" % number


@pytest.mark.parametrize("wrong", [-1, -0.001])
def test_a_negative_timeout_is_a_value_error_whatever_is_in_it(
    prompt_queue: AnyQueue, wrong: float
) -> None:
    """Found: it was one only if there was something to wait for."""
    with pytest.raises(ValueError, match=r"non-negative|>= 0"):
        prompt_queue.get(timeout=wrong)
    with pytest.raises(ValueError, match=r"non-negative|>= 0"):
        prompt_queue.put(b"x", timeout=wrong)
    filled(prompt_queue)
    with pytest.raises(ValueError, match=r"non-negative|>= 0"):
        prompt_queue.get(timeout=wrong)
    with pytest.raises(ValueError, match=r"non-negative|>= 0"):
        prompt_queue.put(b"x", timeout=wrong)
    assert prompt_queue.full()


def _put_all(queue: AnyQueue, producer: int, count: int) -> None:
    for number in range(count):
        queue.put(b"%d %d" % (producer, number), timeout=PATIENCE)


def _get_until_told(queue: AnyQueue) -> list[bytes]:
    got = []
    while (message := queue.get(timeout=PATIENCE)) != b"over":
        got.append(message)
    return got


def test_threads_lose_nothing_double_nothing_and_keep_each_others_order(
    any_queue: AnyQueue,
) -> None:
    count = 100
    getters = [Waiting(lambda: _get_until_told(any_queue)) for _ in range(3)]
    putters = [Waiting(lambda p=p: _put_all(any_queue, p, count)) for p in range(3)]  # type: ignore[misc]
    for putter in putters:
        putter.result(PATIENCE)
    for _ in getters:
        any_queue.put(b"over", timeout=PATIENCE)
    got = [getter.result(PATIENCE) for getter in getters]
    everything = sorted(tuple(map(int, message.split())) for part in got for message in part)
    assert everything == [(producer, number) for producer in range(3) for number in range(count)]
    for part in got:
        for producer in range(3):
            mine = [int(m.split()[1]) for m in part if m.startswith(b"%d " % producer)]
            assert mine == sorted(mine)
