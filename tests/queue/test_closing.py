"""close() while others of the same process use the queue: an error for them, never a hang."""

from __future__ import annotations

import asyncio
import queue as standard
import sys
from collections.abc import Callable, Iterator

import pytest

from shmblocks import HandleQueue, PoolClosedError
from tests.queue.kit import (
    CAPACITY,
    MESSAGE_BYTES,
    SOON,
    Waiting,
    abandon,
    asleep,
    fill,
    waiter_threads,
)
from tests.support.children import Channel, fork, wait_until

USES: dict[str, Callable[[HandleQueue[bytes]], object]] = {
    "put": lambda queue: queue.put(b"x"),
    "put_nowait": lambda queue: queue.put_nowait(b"x"),
    "get": lambda queue: queue.get(),
    "get_nowait": lambda queue: queue.get_nowait(),
    "get with a timeout": lambda queue: queue.get(timeout=0.01),
    "get_many": lambda queue: queue.get_many(2),
    "qsize": lambda queue: queue.qsize(),
    "empty": lambda queue: queue.empty(),
    "full": lambda queue: queue.full(),
    "get_async": lambda queue: asyncio.run(queue.get_async()),
    "put_async": lambda queue: asyncio.run(queue.put_async(b"x")),
}


@pytest.mark.parametrize("use", USES)
def test_a_closed_queue_says_so(queue: HandleQueue[bytes], use: str) -> None:
    queue.close()
    with pytest.raises(PoolClosedError, match=f"{queue.name}: closed in this process"):
        USES[use](queue)


@pytest.mark.parametrize("use", USES)
def test_a_queue_that_is_closed_between_the_question_and_the_use_says_so_too(
    queue: HandleQueue[bytes], use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found: a ValueError about released memory."""
    queue.close()
    monkeypatch.setattr(HandleQueue, "is_closed", False)
    with pytest.raises(PoolClosedError, match="closed in this process"):
        USES[use](queue)


def test_close_is_idempotent_and_the_rest_can_still_be_asked(queue: HandleQueue[bytes]) -> None:
    queue.close()
    queue.close()
    assert queue.is_closed
    assert (queue.capacity, queue.message_bytes) == (CAPACITY, MESSAGE_BYTES)
    assert repr(queue) == f"HandleQueue({queue.name!r}, closed)"


def test_a_waiting_getter_is_told_at_once(no_net: None, queue: HandleQueue[bytes]) -> None:
    with Waiting(queue.get) as getter:
        getter.until_asleep()
        queue.close()
        assert isinstance(getter.error(SOON), PoolClosedError)


def test_a_waiting_putter_is_told_at_once(no_net: None, queue: HandleQueue[bytes]) -> None:
    fill(queue)
    with Waiting(lambda: queue.put(b"x")) as putter:
        putter.until_asleep()
        queue.close()
        assert isinstance(putter.error(SOON), PoolClosedError)


@pytest.fixture
def quick_switches() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("use", ["put", "get with a timeout", "qsize", "get_many"])
def test_threads_in_the_middle_of_it_end_with_the_same_error(
    quick_switches: None, new_pool_name: Callable[[], str], use: str
) -> None:
    def use_it(queue: HandleQueue[bytes]) -> None:
        while True:
            try:
                USES[use](queue)
            except (standard.Empty, standard.Full):
                continue

    for _ in range(15):
        queue = HandleQueue.create(new_pool_name(), CAPACITY, spin=0)
        with Waiting(lambda q=queue: use_it(q)) as first, Waiting(lambda q=queue: use_it(q)) as two:  # type: ignore[misc]
            wait_until(lambda q=queue: q.qsize() > 0 or sum(asleep(q)) or use == "qsize", "used")  # type: ignore[misc]
            queue.close()
            for each in (first, two):
                assert type(each.error(SOON)) is PoolClosedError


def test_a_putter_that_has_put_is_not_troubled_by_a_close_before_its_wake_up(
    no_net: None, queue: HandleQueue[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    wake = queue.state.puts.wake

    def after_a_close(count: int) -> int:
        queue.close()
        return wake(count)

    with HandleQueue.attach(queue.name) as other, Waiting(other.get) as getter:
        getter.until_asleep()
        monkeypatch.setattr(queue.state.puts, "wake", after_a_close)
        queue.put(b"x")
        assert getter.result(SOON) == b"x"


def test_coroutines_of_another_thread_end_and_close_returns(
    no_net: None, new_pool_name: Callable[[], str]
) -> None:
    """Found: the coroutines went to sleep again, and close waited for their thread for ever."""

    async def many(queue: HandleQueue[bytes]) -> list[object]:
        return await asyncio.gather(*(queue.get_async() for _ in range(20)), return_exceptions=True)

    for _ in range(10):
        queue = HandleQueue.create(new_pool_name(), CAPACITY)
        with Waiting(lambda q=queue: asyncio.run(many(q))) as loop:  # type: ignore[misc]
            wait_until(lambda q=queue: asleep(q) == (20, 0), "all wait")  # type: ignore[misc]
            with Waiting(queue.close) as closer:
                closer.result(SOON)
            for result in loop.result(SOON):
                assert isinstance(result, PoolClosedError)
    assert waiter_threads() == []


def test_other_processes_go_on_when_one_closes(no_net: None, queue: HandleQueue[bytes]) -> None:
    with HandleQueue.attach(queue.name) as other, Waiting(other.get) as getter:
        getter.until_asleep()
        queue.close()
        getter_sleeps_on = not getter.is_over
        other.put(b"x")
        assert getter.result(SOON) == b"x"
        assert getter_sleeps_on


def close_there(_: Channel, queue: HandleQueue[bytes]) -> None:
    queue.close()


def test_a_forked_child_that_closes_takes_nothing_from_its_parent(
    no_net: None, queue: HandleQueue[bytes]
) -> None:
    with Waiting(queue.get) as getter:
        getter.until_asleep()
        with fork(close_there, queue):
            pass
        queue.put(b"x")
        assert getter.result(SOON) == b"x"


def test_the_mapping_goes_with_close(queue: HandleQueue[bytes]) -> None:
    async def wait_a_while() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(queue.get_async(), 0.01)

    asyncio.run(wait_a_while())
    with pytest.raises(standard.Empty):
        queue.get(timeout=0.001)
    queue.close()
    with open("/proc/self/maps") as maps:
        assert queue.name not in maps.read()


def test_a_queue_that_was_abandoned_is_a_closed_one(queue: HandleQueue[bytes]) -> None:
    with HandleQueue.attach(queue.name):
        abandon(queue)
        with pytest.raises(PoolClosedError):
            queue.get()
