"""Endpoints as objects: counting, closing, forking, broken queues, a pool that is taken away."""

from __future__ import annotations

import contextlib
import multiprocessing
import queue

import pytest

from shmblocks import (
    BlockPool,
    InvalidStateError,
    PoolClosedError,
    PoolTimeoutError,
    TransferError,
)
from shmblocks.transfer import EmbeddingEndpoint, LanguageEndpoint, Status
from tests.support.children import run_in_fork
from tests.transfer.conftest import Pair
from tests.transfer.kit import LANDING, assert_arrived, assert_nothing_held, payload, settle
from tests.transfer.steps import LONG, ROOM


def test_everything_is_counted(pair: Pair) -> None:
    tokens = 3 * LANDING
    receiver = pair.language.receive(ROOM)
    pair.embedding.send(ROOM, payload(pair.pool.config.fields, tokens))
    pair.language.receive(ROOM + 1).abort()
    open_one = pair.language.receive(ROOM + 2)
    settle(pair.embedding, pair.language)
    receiver.wait(0).release()
    for stats in (pair.embedding.stats(), pair.language.stats()):
        assert (stats.rooms_succeeded, stats.rounds, stats.num_tokens) == (1, 2, tokens)
        assert stats.num_bytes == tokens * pair.pool.config.token_bytes
        assert (stats.malformed, stats.foreign, stats.late, stats.duplicate) == (0, 0, 0, 0)
        assert stats.peer.startswith("participant 0 (pid ")
    sent, received = pair.language.stats(), pair.embedding.stats()
    assert (sent.rooms_failed, sent.rooms_open) == (1, 1)
    assert sent.sent == received.received
    assert received.sent == sent.received
    open_one.abort()


def test_a_closed_endpoint_says_so(pair: Pair) -> None:
    receiver = pair.language.receive(ROOM)
    pair.language.close()
    pair.language.close()
    assert pair.language.is_closed
    assert "closed" in repr(pair.language)
    for use in (pair.language.poll, lambda: pair.language.receive(8)):
        with pytest.raises(InvalidStateError, match="it was closed"):
            use()
    assert receiver.poll() is Status.Failed
    with pytest.raises(TransferError, match="the endpoint was closed"):
        receiver.wait()
    assert pair.language.stats().rooms_failed == 1


def test_rooms_opened_after_the_peer_closed_fail_until_it_is_back(pair: Pair) -> None:
    settle(pair.embedding, pair.language)
    pair.embedding.close()
    receiver = pair.language.receive(ROOM)
    with pytest.raises(TransferError, match=r"participant 0 .* closed its endpoint"):
        receiver.wait(1)
    with EmbeddingEndpoint(pair.pool, pair.to_language, pair.to_embedding) as embedding:
        receiver = pair.language.receive(ROOM)
        embedding.send(ROOM, payload(pair.pool.config.fields, 5))
        settle(embedding, pair.language)
        with receiver.wait(0) as result:
            assert_arrived(result, pair.pool, 5)


def test_an_endpoint_is_of_the_process_that_made_it(pair: Pair) -> None:
    receiver = pair.language.receive(ROOM)

    def in_child() -> str:
        with contextlib.suppress(InvalidStateError):
            pair.language.poll()
            return "polled"
        pair.language.close()
        pair.pool.close()
        return "refused"

    assert run_in_fork(in_child) == "refused"
    assert receiver.status is Status.WaitingForInput
    assert len(pair.pool.allocations()) == 1, "the child's close gave nothing of ours back"
    receiver.abort()


def test_an_endpoint_can_be_made_in_a_forked_child(pair: Pair) -> None:
    to_child: multiprocessing.queues.SimpleQueue[bytes] = multiprocessing.SimpleQueue()
    to_us: multiprocessing.queues.SimpleQueue[bytes] = multiprocessing.SimpleQueue()
    fields = pair.pool.config.fields
    me = pair.pool.participant

    def in_child() -> bool:
        with EmbeddingEndpoint(pair.pool, to_us, to_child) as embedding:
            embedding.send(ROOM, payload(fields, LONG))
            embedding.poll()
            return pair.pool.participant != me

    with LanguageEndpoint(pair.pool, to_child, to_us) as language:
        receiver = language.receive(ROOM)
        assert run_in_fork(in_child)
        with pytest.raises(TransferError, match="the endpoint was closed"):
            receiver.wait(5)
    to_child.close()
    to_us.close()


def test_a_queue_that_breaks_fails_the_rooms_and_not_the_poll(pool: BlockPool) -> None:
    tx: multiprocessing.queues.SimpleQueue[bytes] = multiprocessing.SimpleQueue()
    rx: multiprocessing.queues.SimpleQueue[bytes] = multiprocessing.SimpleQueue()
    with LanguageEndpoint(pool, tx, rx) as language:
        receiver = language.receive(ROOM)
        rx.close()
        language.poll()
        assert "the queue to or from the other side broke: reading" in (receiver.failure or "")
        with pytest.raises(TransferError, match="broke"):
            language.receive(ROOM).wait(5)
    tx.close()
    assert_nothing_held(pool)


def test_a_pool_closed_under_an_endpoint_is_told_by_poll(pool: BlockPool) -> None:
    one: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    two: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    attached = BlockPool.attach(pool.name, prefault="off")
    with (
        EmbeddingEndpoint(pool, one, two) as embedding,
        LanguageEndpoint(attached, two, one) as language,
    ):
        settle(embedding, language)
        receiver = language.receive(ROOM)
        attached.close()
        with pytest.raises((PoolClosedError, TransferError)):
            language.receive(ROOM + 1).wait(1)
        receiver.abort()
        sender = embedding.send(ROOM, payload(pool.config.fields, 5))
        with contextlib.suppress(PoolTimeoutError, TransferError):
            sender.wait(0.01)


def test_what_a_bounded_queue_does_not_take_is_sent_by_later_polls(pool: BlockPool) -> None:
    to_language: queue.Queue[bytes] = queue.Queue(1)
    to_embedding: queue.Queue[bytes] = queue.Queue(1)
    with (
        EmbeddingEndpoint(pool, to_language, to_embedding) as embedding,
        LanguageEndpoint(pool, to_embedding, to_language) as language,
    ):
        receivers = [language.receive(room) for room in range(8)]
        assert language.stats().unsent == 8
        for room in range(8):
            embedding.send(room, payload(pool.config.fields, LONG, seed=room))
        for _ in range(200):
            embedding.poll()
            language.poll()
        for room, receiver in enumerate(receivers):
            with receiver.wait(0) as result:
                assert_arrived(result, pool, LONG, seed=room)


def test_rooms_and_endpoints_show_where_they_stand(pair: Pair) -> None:
    receiver = pair.language.receive(ROOM)
    sender = pair.embedding.send(ROOM, payload(pair.pool.config.fields, LONG))
    assert repr(receiver) == f"Receiver(room={ROOM}, WaitingForInput, 0 tokens in 0 round(s))"
    assert repr(sender) == f"Sender(room={ROOM}, Transferring, {LANDING} tokens in 1 round(s))"
    assert repr(pair.embedding).startswith(f"EmbeddingEndpoint('{pair.pool.name}', 1 rooms, part")
    assert pair.language.pool is pair.pool
    assert receiver.room == sender.room == ROOM
    receiver.abort()
