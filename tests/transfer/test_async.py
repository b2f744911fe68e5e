"""Rooms that coroutines open and wait for: the loop never blocks, and a cancelled call leaves
nothing."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable

import pytest

from shmblocks import BlockPool, PoolClosedError, PoolTimeoutError, TransferError
from shmblocks.transfer import EmbeddingEndpoint, LanguageEndpoint, Receiver, Status
from tests.transfer.conftest import Pair
from tests.transfer.kinds import ALL_KINDS
from tests.transfer.kit import (
    LANDING,
    LANDING_BLOCKS,
    MODES,
    PATIENCE,
    WHOLE_POOL,
    Mode,
    assert_arrived,
    assert_nothing_held,
    payload,
    settle,
)
from tests.transfer.steps import LONG, ROOM, no_blocks


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until it is so."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        await asyncio.sleep(0.001)
        assert time.monotonic() < deadline, "hangs"


def threads_of_endpoints() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "shmblocks transfer"]


def no_thread_is_left() -> bool:
    return not threads_of_endpoints()


@contextlib.asynccontextmanager
async def lock_held(endpoint: EmbeddingEndpoint | LanguageEndpoint) -> AsyncIterator[None]:
    """Another thread has the endpoint's lock, as while it copies."""
    has_it, may_go = threading.Event(), threading.Event()

    def hold() -> None:
        with endpoint._changed:
            has_it.set()
            may_go.wait(PATIENCE)

    thread = threading.Thread(target=hold)
    thread.start()
    has_it.wait(PATIENCE)
    try:
        yield
    finally:
        may_go.set()
        thread.join()


async def cancel(task: asyncio.Task[object]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# ---- what arrives ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["queue.SimpleQueue", "HandleQueue of one", "zmq PAIR"])
def test_many_coroutines_wait_on_one_endpoint_with_one_thread(
    pool: BlockPool, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    queues = ALL_KINDS[kind](str(tmp_path_factory.mktemp("z")))
    rooms = range(12)

    async def receive(language: LanguageEndpoint, room: int) -> None:
        receiver = await language.receive_async(room, MODES[room % 2])
        with await receiver as result:
            assert_arrived(result, pool, 1 + 29 * room, seed=room)
        assert len(threads_of_endpoints()) <= 2, "one for each endpoint"

    async def send(embedding: EmbeddingEndpoint, room: int) -> None:
        tensors = payload(pool.config.fields, 1 + 29 * room, seed=room)
        sender = await embedding.send_async(room, tensors)
        await sender
        assert sender.status is Status.Success

    async def both(embedding: EmbeddingEndpoint, language: LanguageEndpoint) -> None:
        work = [receive(language, room) for room in rooms]
        work += [send(embedding, room) for room in rooms]
        await asyncio.wait_for(asyncio.gather(*work), PATIENCE)

    with (
        queues.embedding.opened() as embedding_queues,
        queues.language.opened() as language_queues,
        EmbeddingEndpoint(pool, *embedding_queues) as embedding,
        LanguageEndpoint(pool, *language_queues) as language,
    ):
        asyncio.run(both(embedding, language))
    queues.close()
    assert no_thread_is_left()


@pytest.mark.parametrize("mode", MODES)
def test_a_transfer_longer_than_the_pool_arrives(pair: Pair, mode: Mode) -> None:
    async def transfer() -> None:
        tensors = payload(pair.pool.config.fields, 2 * WHOLE_POOL + 5)
        receiver = await pair.language.receive_async(ROOM, mode)
        sender = await pair.embedding.send_async(ROOM, tensors, mrope_position_delta=-3)
        _, result = await asyncio.gather(sender.wait_async(PATIENCE), receiver.wait_async(PATIENCE))
        with result:
            assert_arrived(result, pair.pool, 2 * WHOLE_POOL + 5, delta=-3)

    asyncio.run(transfer())


def test_blocks_written_by_the_caller_are_sent(pair: Pair) -> None:
    async def transfer() -> None:
        handle = pair.pool.alloc(5)
        assert handle is not None
        view = pair.pool.view(handle)
        for name, tensor in payload(pair.pool.config.fields, 5).items():
            view[name].copy_(tensor)
        view.aux.zero_()
        receiver = await pair.language.receive_async(ROOM, "push")
        sender = await pair.embedding.send_handle_async(ROOM, handle)
        with await receiver as result:
            assert result.is_zero_copy
            assert_arrived(result, pair.pool, 5)
        await sender

    asyncio.run(transfer())


# ---- how waits end ---------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0, 0.01])
def test_a_timeout_names_who_holds_the_blocks_and_ends_nothing(pair: Pair, timeout: float) -> None:
    async def wait() -> None:
        with no_blocks(pair.pool):
            receiver = await pair.language.receive_async(ROOM)
            with pytest.raises(PoolTimeoutError, match="for request somebody else"):
                await receiver.wait_async(timeout)
            assert receiver.status is Status.Bootstrapping
        pair.embedding.send(ROOM, payload(pair.pool.config.fields, 5))
        waiting = asyncio.create_task(receiver.wait_async(PATIENCE))
        await until(lambda: receiver.status is not Status.Bootstrapping)
        pair.embedding.poll()
        with await waiting as result:
            assert_arrived(result, pair.pool, 5)

    asyncio.run(wait())


def test_a_wait_of_no_time_still_takes_what_is_there(pair: Pair) -> None:
    async def wait() -> None:
        receiver = await pair.language.receive_async(ROOM)
        pair.embedding.send(ROOM, payload(pair.pool.config.fields, 5))
        with await receiver.wait_async(0) as result:
            assert_arrived(result, pair.pool, 5)

    asyncio.run(wait())


def test_a_room_that_fails_raises_its_reason_in_the_coroutine(pair: Pair) -> None:
    async def wait() -> None:
        receiver = await pair.language.receive_async(ROOM)
        waiting = asyncio.create_task(receiver.wait_async(PATIENCE))
        sender = await pair.embedding.send_async(ROOM, payload(pair.pool.config.fields, LONG))
        sender.abort("the image is broken")
        with pytest.raises(TransferError, match="the image is broken"):
            await waiting
        with pytest.raises(TransferError, match="the image is broken"):
            await sender

    asyncio.run(wait())


def test_closing_an_endpoint_wakes_the_coroutines_and_ends_its_thread(pair: Pair) -> None:
    async def wait() -> None:
        receivers = [await pair.language.receive_async(room) for room in range(3)]
        waits = [asyncio.create_task(each.wait_async()) for each in receivers]
        await until(lambda: not no_thread_is_left())
        await asyncio.to_thread(pair.language.close)
        assert no_thread_is_left()
        for each in await asyncio.gather(*waits, return_exceptions=True):
            assert "the endpoint was closed" in str(each)

    asyncio.run(wait())


def test_an_argument_that_cannot_be_right_is_refused_as_by_receive(pair: Pair) -> None:
    async def receive() -> None:
        receiver = await pair.language.receive_async(ROOM)
        with pytest.raises(ValueError, match=f"room {ROOM}: is open already"):
            await pair.language.receive_async(ROOM)
        receiver.abort()

    asyncio.run(receive())


def test_what_the_pool_raises_reaches_every_coroutine(pool: BlockPool) -> None:
    queues = ALL_KINDS["queue.SimpleQueue"]("")
    attached = BlockPool.attach(pool.name, prefault="off")

    async def wait() -> None:
        with (
            queues.language.opened() as (tx, rx),
            LanguageEndpoint(attached, tx, rx) as language,
            no_blocks(pool),
        ):
            receivers = [await language.receive_async(room) for room in range(2)]
            waits = [asyncio.create_task(each.wait_async(PATIENCE)) for each in receivers]
            await until(lambda: not no_thread_is_left())
            attached.close()
            for each in await asyncio.gather(*waits, return_exceptions=True):
                assert isinstance(each, (PoolClosedError, TransferError)), each

    asyncio.run(wait())


# ---- the loop goes on ------------------------------------------------------------------------


def test_the_loop_runs_while_another_thread_has_the_endpoint(pair: Pair) -> None:
    """Opening, waiting, a timeout that has passed, and a cancellation."""

    async def go() -> None:
        first = await pair.language.receive_async(ROOM)
        async with lock_held(pair.language):
            opening = asyncio.create_task(pair.language.receive_async(ROOM + 1))
            waiting = asyncio.create_task(first.wait_async())
            late = asyncio.create_task(first.wait_async(0))
            doomed = asyncio.create_task(first.wait_async())
            for _ in range(20):
                await asyncio.sleep(0)
            await cancel(doomed)
            assert not any(task.done() for task in (opening, waiting, late))
        with pytest.raises(PoolTimeoutError, match=f"room {ROOM} has not ended"):
            await late
        (await opening).abort()
        first.abort()
        with pytest.raises(TransferError, match="aborted"):
            await waiting

    asyncio.run(go())


# ---- cancelling ------------------------------------------------------------------------------


def test_a_cancelled_wait_leaves_the_room_open_and_no_thread(pair: Pair) -> None:
    async def wait() -> None:
        receiver = await pair.language.receive_async(ROOM)
        waiting = asyncio.create_task(receiver.wait_async())
        await until(lambda: not no_thread_is_left())
        await cancel(waiting)
        await until(no_thread_is_left)
        assert receiver.status is Status.WaitingForInput
        pair.embedding.send(ROOM, payload(pair.pool.config.fields, 5))
        with await receiver as result:
            assert_arrived(result, pair.pool, 5)

    asyncio.run(wait())


def test_a_result_is_not_taken_by_a_wait_that_is_cancelled_when_it_is_there(pair: Pair) -> None:
    async def wait() -> None:
        receiver = await pair.language.receive_async(ROOM)
        waiting = asyncio.create_task(receiver.wait_async())
        await until(lambda: not no_thread_is_left())
        pair.embedding.send(ROOM, payload(pair.pool.config.fields, 5))
        block_until(lambda: receiver.status is Status.Success)  # the coroutine cannot run yet
        await cancel(waiting)
        assert not receiver.abort("nobody wants it"), "it gives the untaken result back"

    asyncio.run(wait())
    assert_nothing_held(pair.pool)


def block_until(condition: Callable[[], bool]) -> None:
    """Block the loop, too."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        time.sleep(0.0005)
        assert time.monotonic() < deadline, "hangs"


@pytest.mark.parametrize("is_opened", [False, True])
@pytest.mark.parametrize("side", ["receive", "send", "send_handle"])
def test_a_cancelled_opening_leaves_neither_a_room_nor_blocks(
    pair: Pair, side: str, is_opened: bool
) -> None:
    endpoint = pair.language if side == "receive" else pair.embedding

    def opening() -> asyncio.Task[object]:
        if side == "receive":
            return asyncio.create_task(pair.language.receive_async(ROOM))
        if side == "send":
            tensors = payload(pair.pool.config.fields, 5)
            return asyncio.create_task(pair.embedding.send_async(ROOM, tensors))
        handle = pair.pool.alloc(5)
        assert handle is not None
        return asyncio.create_task(pair.embedding.send_handle_async(ROOM, handle))

    async def go() -> None:
        if is_opened:
            task = opening()
            await asyncio.sleep(0)
            block_until(lambda: endpoint.stats().rooms_open == 1)
            await cancel(task)
        else:
            async with lock_held(endpoint):
                task = opening()
                await asyncio.sleep(0)
                await cancel(task)
        await until(lambda: endpoint.stats().rooms_failed == 1)
        assert endpoint.stats().rooms_open == 0

    asyncio.run(go())
    assert_nothing_held(pair.pool)
    settle(pair.embedding, pair.language)
    other = pair.embedding.send(ROOM, payload(pair.pool.config.fields, 5))
    other.abort()


def test_a_cancelled_opening_that_was_refused_frees_the_blocks_and_tells_nobody(pair: Pair) -> None:
    async def go() -> None:
        sender = await pair.embedding.send_async(ROOM, payload(pair.pool.config.fields, 5))
        handle = pair.pool.alloc(5)
        assert handle is not None
        async with lock_held(pair.embedding):
            task = asyncio.create_task(pair.embedding.send_handle_async(ROOM, handle))
            await asyncio.sleep(0)
            await cancel(task)
        await until(lambda: pair.pool.allocations() == [])
        assert sender.status is Status.Bootstrapping
        sender.abort()

    asyncio.run(go())


def test_a_loop_that_is_closed_while_a_coroutine_waits_ends_the_thread(pair: Pair) -> None:
    loop = asyncio.new_event_loop()
    receiver = pair.language.receive(ROOM)
    waiting = loop.create_task(receiver.wait_async())
    loop.run_until_complete(_thread_is_there())
    loop.close()
    block_until(no_thread_is_left)
    waiting._log_destroy_pending = False  # type: ignore[attr-defined]
    assert receiver.status is Status.WaitingForInput
    receiver.abort()


async def _thread_is_there() -> None:
    await until(lambda: not no_thread_is_left())


def test_waits_of_threads_and_of_two_loops_share_an_endpoint(pair: Pair) -> None:
    receivers = [pair.language.receive(room, "push") for room in range(3)]
    arrived: list[int] = []

    def take(receiver: Receiver, wait: Callable[[Receiver], None]) -> None:
        wait(receiver)
        arrived.append(receiver.room)

    def by_thread(receiver: Receiver) -> None:
        receiver.wait(PATIENCE).release()

    def by_loop(receiver: Receiver) -> None:
        async def wait() -> None:
            (await receiver.wait_async(PATIENCE)).release()

        asyncio.run(wait())

    waits = [by_thread, by_loop, by_loop]
    threads = [
        threading.Thread(target=take, args=each) for each in zip(receivers, waits, strict=True)
    ]
    for thread in threads:
        thread.start()
    for room in range(3):
        tensors = payload(pair.pool.config.fields, LANDING // LANDING_BLOCKS)
        pair.embedding.send(room, tensors).wait(PATIENCE)
    for thread in threads:
        thread.join(PATIENCE)
    assert sorted(arrived) == [0, 1, 2]
