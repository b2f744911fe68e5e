"""Waiting: whom a timeout names, many threads on one endpoint, and sets of rooms that need more
than the pool has and all end."""

from __future__ import annotations

import functools
import queue
import re
import threading
import time
from collections.abc import Callable, Sequence

import pytest

from shmblocks import BlockPool, PoolTimeoutError
from shmblocks.transfer import (
    EmbeddingEndpoint,
    LanguageEndpoint,
    Receiver,
    Status,
    TransferResult,
)
from tests.transfer.conftest import Pair
from tests.transfer.kinds import ALL_KINDS
from tests.transfer.kit import (
    LANDING,
    LANDING_BLOCKS,
    MODES,
    PATIENCE,
    TOTAL_BLOCKS,
    WHOLE_POOL,
    Mode,
    assert_arrived,
    assert_nothing_held,
    payload,
    poll_until,
    settle,
)
from tests.transfer.partner import PartnerThread
from tests.transfer.steps import LONG, ROOM, no_blocks

# ---- whom it waits for -----------------------------------------------------------------------


def test_a_wait_for_blocks_names_who_holds_them_for_which_request(pair: Pair) -> None:
    settle(pair.embedding, pair.language)
    with no_blocks(pair.pool, free_blocks=3):
        receiver = pair.language.receive(ROOM)
        with pytest.raises(PoolTimeoutError) as raised:
            receiver.wait(0.01)
        text = str(raised.value)
        for words in (
            f"room {ROOM} has not ended after 0.0",
            " s ago, now Bootstrapping): ",
            f"it waits for {LANDING_BLOCKS} consecutive free blocks to land in",
            "the other side is participant 0 (pid ",
            f"3 of {TOTAL_BLOCKS} blocks are free",
            f"{TOTAL_BLOCKS - 3} blocks from 0 for request somebody else: reserved since 0.",
            "held by participant 0 (pid ",
        ):
            assert words in text
        assert receiver.status is Status.Bootstrapping, "a timeout ends nothing"
        receiver.abort()


def test_the_timeout_tells_the_status_now_and_not_since_when_the_room_was_opened(
    pair: Pair,
) -> None:
    """It once said "at Transferring since it was opened", although the room had just got there."""
    receiver = pair.language.receive(ROOM)
    tokens = 2 * LANDING
    pair.embedding.send(ROOM, payload(pair.pool.config.fields, tokens))
    with pytest.raises(PoolTimeoutError) as raised:
        receiver.wait(0)
    assert re.fullmatch(
        rf"room {ROOM} has not ended after 0\.\d\d s "
        r"\(opened 0\.\d\d s ago, now Transferring\): "
        rf"{LANDING} of {tokens} tokens are here, round 1 was asked for \(blocks 0 to \d+\); "
        r"the other side is participant 0 \(pid \d+, tests\); the room stays open",
        str(raised.value),
    )


def test_a_wait_for_blocks_to_push_with_names_leases_too(pair: Pair) -> None:
    handle = pair.pool.alloc_blocks(TOTAL_BLOCKS, 1, req_id="read for long")
    assert handle is not None
    with pair.pool.open(pair.pool.publish(handle)):
        pair.language.receive(ROOM, "push")
        sender = pair.embedding.send(ROOM, payload(pair.pool.config.fields, 5))
        with pytest.raises(
            PoolTimeoutError, match=r"read for long: leased since .* held by participant 0"
        ) as raised:
            sender.wait(0.01)
        assert "it waits for 1 consecutive free blocks to push with" in str(raised.value)
        sender.abort()
        settle(pair.embedding, pair.language)


def test_a_crowded_pool_does_not_make_an_endless_message(pair: Pair) -> None:
    held = [pair.pool.alloc_blocks(1, 1) for _ in range(TOTAL_BLOCKS)]
    receiver = pair.language.receive(ROOM)
    with pytest.raises(PoolTimeoutError, match=r"and \d+ more") as raised:
        receiver.wait(0)
    assert len(str(raised.value).splitlines()) < TOTAL_BLOCKS / 2
    receiver.abort()
    for handle in held:
        assert handle is not None
        pair.pool.free(handle)


@pytest.mark.parametrize("mode", MODES)
def test_a_wait_for_the_other_side_says_what_it_has_to_do(pair: Pair, mode: Mode) -> None:
    receiver = pair.language.receive(ROOM, mode)
    with pytest.raises(PoolTimeoutError, match="it asked for the first round"):
        receiver.wait(0)
    tokens = 3 * WHOLE_POOL
    sender = pair.embedding.send(ROOM, payload(pair.pool.config.fields, tokens))
    with pytest.raises(PoolTimeoutError, match="the language side has not asked for the next"):
        sender.wait(0)
    with pytest.raises(PoolTimeoutError, match=f"of {tokens} tokens are here, round 1 was asked"):
        receiver.wait(0)
    receiver.abort()
    settle(pair.embedding, pair.language)
    lonely = pair.embedding.send(ROOM, payload(pair.pool.config.fields, 5))
    with pytest.raises(PoolTimeoutError, match="the language side has not asked for it yet"):
        lonely.wait(0)


def test_a_wait_for_nobody_asks_whether_the_queues_are_crossed(pool: BlockPool) -> None:
    one: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    two: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with LanguageEndpoint(pool, one, two) as language:
        receiver = language.receive(ROOM)
        with pytest.raises(PoolTimeoutError, match=r"nobody yet: .* is its rx this one's tx"):
            receiver.wait(0.01)


def test_a_wait_of_no_time_still_takes_what_is_there(pair: Pair) -> None:
    receiver = pair.language.receive(ROOM)
    pair.embedding.send(ROOM, payload(pair.pool.config.fields, 5))
    with receiver.wait(0) as result:
        assert_arrived(result, pair.pool, 5)


# ---- threads ---------------------------------------------------------------------------------


def in_threads(work: Sequence[Callable[[], None]]) -> None:
    """Run all at once; the first exception of any is raised here."""
    failures: list[BaseException] = []

    def run(step: Callable[[], None]) -> None:
        try:
            step()
        except BaseException as error:  # noqa: BLE001 - raised again below, in the test's thread
            failures.append(error)

    threads = [threading.Thread(target=run, args=(step,)) for step in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
        assert not thread.is_alive(), "a thread hangs"
    if failures:
        raise failures[0]


@pytest.mark.parametrize("kind", ["queue.Queue", "queue.Queue of one", "zmq PAIR"])
def test_many_threads_wait_on_one_endpoint_and_each_gets_its_own(
    pool: BlockPool, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    queues = ALL_KINDS[kind](str(tmp_path_factory.mktemp("z")))
    with (
        queues.embedding.opened() as embedding_queues,
        queues.language.opened() as language_queues,
        EmbeddingEndpoint(pool, *embedding_queues) as embedding,
        LanguageEndpoint(pool, *language_queues) as language,
    ):

        def receive(room: int) -> None:
            with language.receive(room, MODES[room % 2]).wait(PATIENCE) as result:
                assert_arrived(result, pool, 1 + 29 * room, seed=room)

        def send(room: int) -> None:
            tensors = payload(pool.config.fields, 1 + 29 * room, seed=room)
            embedding.send(room, tensors).wait(PATIENCE)

        rooms = range(12)
        in_threads(
            [functools.partial(send, room) for room in rooms]
            + [functools.partial(receive, room) for room in rooms]
        )
        assert_nothing_held(pool)


class Hesitates:
    """A queue that is full most of the time: it takes a message at the tenth attempt."""

    def __init__(self) -> None:
        self.items: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._attempts = 0

    def put(self, item: bytes) -> None:
        self.items.put(item)

    def put_nowait(self, item: bytes) -> None:
        self._attempts += 1
        if self._attempts % 10:
            raise queue.Full
        self.items.put(item)

    def get(self) -> bytes:
        return self.items.get()


def test_a_wait_sends_what_a_full_queue_did_not_take_before_it_returns(pool: BlockPool) -> None:
    """Nobody might poll any more, and the other side waits for the confirmation."""
    to_language: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    to_embedding = Hesitates()
    with (
        EmbeddingEndpoint(pool, to_language, to_embedding.items) as embedding,
        LanguageEndpoint(pool, to_embedding, to_language) as language,
    ):
        receiver = language.receive(ROOM, "push")
        sender = embedding.send(ROOM, payload(pool.config.fields, 5))
        poll_until(lambda: sender.status is Status.Transferring, embedding, language)
        with receiver.wait(PATIENCE):
            assert language.stats().unsent == 0
        embedding.poll()
        assert str(sender.status) == "Success"


class Holds(queue.SimpleQueue[bytes]):
    """A queue whose sleeping reader has a message in hand for as long as a test wants."""

    def __init__(self) -> None:
        self.is_in_hand = threading.Event()
        self.may_go_on = threading.Event()

    def get(self, block: bool = True, timeout: float | None = None) -> bytes:
        item = super().get(block, timeout)
        if block:
            self.is_in_hand.set()
            assert self.may_go_on.wait(PATIENCE)
        return item


def test_messages_are_handled_in_order_while_another_thread_has_one_in_hand(
    pool: BlockPool,
) -> None:
    to_embedding: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    to_language = Holds()
    with LanguageEndpoint(pool, to_embedding, to_language) as language:
        receiver = language.receive(ROOM)
        waiting = threading.Thread(target=_wait_and_release, args=(receiver,))
        waiting.start()
        with EmbeddingEndpoint(pool, to_language, to_embedding) as embedding:
            assert to_language.is_in_hand.wait(PATIENCE)  # it has the Hello
            sender = embedding.send(ROOM, payload(pool.config.fields, 5))
            language.poll()
            assert language.stats().received == 0, "the chunk is not taken before the Hello"
            to_language.may_go_on.set()
            sender.wait(PATIENCE)
        waiting.join(PATIENCE)
        assert not waiting.is_alive()


def _wait_and_release(receiver: Receiver) -> None:
    receiver.wait(PATIENCE).release()


def test_closing_wakes_those_who_wait(pool: BlockPool) -> None:
    from shmblocks import TransferError

    one: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    two: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    language = LanguageEndpoint(pool, one, two)
    receivers = [language.receive(room) for room in range(3)]

    def wait(number: int) -> None:
        with pytest.raises(TransferError, match="the endpoint was closed"):
            receivers[number].wait(PATIENCE)

    start = time.monotonic()
    in_threads([*(functools.partial(wait, number) for number in range(3)), language.close])
    assert time.monotonic() - start < PATIENCE / 2


# ---- more than the pool has ------------------------------------------------------------------


def test_many_landing_rooms_that_need_more_than_the_pool_all_end(pool: BlockPool) -> None:
    """Sixteen times what the pool holds, all at once, and each needs several rounds."""
    rooms = range(4 * TOTAL_BLOCKS // LANDING_BLOCKS)
    lengths = [4 * LANDING + 3 * room for room in rooms]
    assert sum(lengths) > 16 * WHOLE_POOL
    with (
        PartnerThread(
            pool, "embedding", (queues := ALL_KINDS["queue.SimpleQueue"](""))[0]
        ) as partner,
        queues.language.opened() as (tx, rx),
        LanguageEndpoint(pool, tx, rx) as language,
    ):
        receivers = [language.receive(room) for room in rooms]
        for room in rooms:
            partner.ask("start", room, num_tokens=lengths[room], seed=room)
        for room in rooms:
            with receivers[room].wait(PATIENCE) as result:
                assert_arrived(result, pool, lengths[room], seed=room)
        assert_nothing_held(pool)


@pytest.mark.parametrize("mode", MODES)
def test_untaken_results_leave_the_pool_for_the_room_that_is_waited_for(
    pool: BlockPool, mode: Mode
) -> None:
    """Waited for in the order in which they end last: each would wait for the others for ever."""
    rooms = range(20)
    tokens = WHOLE_POOL // 3
    with (
        PartnerThread(
            pool, "embedding", (queues := ALL_KINDS["queue.SimpleQueue"](""))[0]
        ) as partner,
        queues.language.opened() as (tx, rx),
        LanguageEndpoint(pool, tx, rx) as language,
    ):
        receivers = [language.receive(room, mode) for room in rooms]
        for room in rooms:
            partner.ask("start", room, num_tokens=tokens, seed=room)
        results: list[TransferResult] = []
        for room in reversed(rooms):
            results.append(receivers[room].wait(PATIENCE))
            assert_arrived(results[-1], pool, tokens, seed=room)
            results.pop().release()
        assert_nothing_held(pool)


def test_a_result_in_use_is_never_moved(pair: Pair) -> None:
    receiver = pair.language.receive(ROOM)
    pair.embedding.send(ROOM, payload(pair.pool.config.fields, LANDING))
    result = receiver.wait(0)
    with no_blocks(pair.pool, free_blocks=LANDING_BLOCKS):
        starving = pair.language.receive(ROOM + 1)
        with pytest.raises(PoolTimeoutError, match=f"for request room {ROOM}"):
            starving.wait(0.1)
        assert result.is_zero_copy
        starving.abort()
    result.release()


def test_rooms_of_several_endpoints_share_a_pool_that_is_too_small_for_them(
    pool: BlockPool,
) -> None:
    """Three language sides, each with rooms of both modes, against one pool."""
    pairs = [ALL_KINDS["queue.SimpleQueue"]("") for _ in range(3)]

    def receive(number: int) -> None:
        with (
            PartnerThread(pool, "embedding", pairs[number].embedding) as partner,
            pairs[number].language.opened() as (tx, rx),
            LanguageEndpoint(pool, tx, rx) as language,
        ):
            receivers = [language.receive(room, MODES[room % 2]) for room in range(10)]
            for room in range(10):
                partner.ask("start", room, num_tokens=LONG * (room + 1), seed=room)
            for room, receiver in enumerate(receivers):
                with receiver.wait(PATIENCE) as result:
                    assert_arrived(result, pool, LONG * (room + 1), seed=room)

    in_threads([functools.partial(receive, number) for number in range(3)])
