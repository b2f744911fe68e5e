"""A peer that is killed, at every status and from each side: its rooms fail within a second, the
reason names it and says what it was doing, and everything that it held comes back.

The peer is forked, does what it is told and nothing else, and so stands still at a known point. The
queues are pipes without threads: what it has sent is in them when it has answered.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from shmblocks import BlockPool, PeerDiedError, State
from shmblocks.transfer import (
    EmbeddingEndpoint,
    LanguageEndpoint,
    Receiver,
    Sender,
    Status,
)
from tests.support.children import Channel, Child, fork
from tests.transfer.kinds import PROCESS_KINDS, AnyEnd, QueuePair
from tests.transfer.kit import (
    LANDING,
    PATIENCE,
    WHOLE_POOL,
    Mode,
    assert_arrived,
    assert_nothing_held,
    payload,
    poll_until,
)
from tests.transfer.partner import Partner, Side, serve_one
from tests.transfer.steps import LONG, ROOM, no_blocks

SOON = 1.0  # seconds: the promise


@pytest.fixture
def queues() -> Iterator[QueuePair]:
    made = PROCESS_KINDS["multiprocessing.SimpleQueue"]("")
    yield made
    made.close()


class Peer(NamedTuple):
    """A forked process that is the other side."""

    child: Child
    partner: Partner


@contextlib.contextmanager
def forked(pool: BlockPool, side: Side, end: AnyEnd) -> Iterator[Peer]:
    with fork(serve_one, pool.name, side, end, False) as child:
        yield Peer(child, Partner(child))


def fails_soon(room: Sender | Receiver, child: Child, doing: str) -> None:
    """Polling sees the death within a second, and says whose."""
    child.kill()
    start = time.monotonic()
    while not room.status.is_final and time.monotonic() - start < PATIENCE:
        room.poll()
    assert time.monotonic() - start < SOON
    assert room.status is Status.Failed
    with pytest.raises(PeerDiedError) as raised:
        room.wait(0)
    for words in (f"room {ROOM}", f"(pid {child.pid}, ", "died", doing):
        assert words in str(raised.value)


@contextlib.contextmanager
def language_here(pool: BlockPool, queues: QueuePair) -> Iterator[LanguageEndpoint]:
    with (
        queues.language.opened() as (tx, rx),
        LanguageEndpoint(pool, tx, rx) as language,
    ):
        yield language


@contextlib.contextmanager
def embedding_here(pool: BlockPool, queues: QueuePair) -> Iterator[EmbeddingEndpoint]:
    with (
        queues.embedding.opened() as (tx, rx),
        EmbeddingEndpoint(pool, tx, rx) as embedding,
    ):
        yield embedding


# ---- the embedding side dies -----------------------------------------------------------------


def test_embedding_dies_while_the_room_has_no_blocks(pool: BlockPool, queues: QueuePair) -> None:
    with (
        forked(pool, "embedding", queues.embedding) as peer,
        language_here(pool, queues) as language,
        no_blocks(pool),
    ):
        receiver = language.receive(ROOM)
        assert receiver.status is Status.Bootstrapping
        fails_soon(receiver, peer.child, "it waits for 4 consecutive free blocks to land in")


@pytest.mark.parametrize("mode", ["landing", "push"])
def test_embedding_dies_before_it_writes(pool: BlockPool, queues: QueuePair, mode: Mode) -> None:
    with (
        forked(pool, "embedding", queues.embedding) as peer,
        language_here(pool, queues) as language,
    ):
        receiver = language.receive(ROOM, mode)
        assert receiver.status is Status.WaitingForInput
        fails_soon(receiver, peer.child, "it asked for the first round")
        assert_nothing_held(pool)


def test_embedding_dies_while_it_writes_into_the_landing_blocks(
    pool: BlockPool, queues: QueuePair
) -> None:
    """Its lease goes with it, so that the blocks, freed here meanwhile, come back."""
    with language_here(pool, queues) as language:
        receiver = language.receive(ROOM)
        with fork(_stops_in_the_middle_of_a_write, pool.name, queues.embedding) as child:
            child.hear("writing")
            language.poll()
            (landing,) = pool.allocations()
            assert [lease.kind for lease in landing.leases] == ["writes"]
            fails_soon(receiver, child, "nothing came yet")
        assert_nothing_held(pool)


def _stops_in_the_middle_of_a_write(channel: Channel, pool_name: str, end: AnyEnd) -> None:
    from shmblocks.transfer.sending import Payload

    def stop(*_: object) -> None:
        channel.say("writing")
        channel.receive()

    setattr(Payload, "write", stop)  # noqa: B010 - for this process only
    with (
        BlockPool.attach(pool_name, role="embedding") as pool,
        end.opened() as (tx, rx),
        EmbeddingEndpoint(pool, tx, rx) as embedding,
    ):
        embedding.send(ROOM, payload(pool.config.fields, 5))


@pytest.mark.parametrize("mode", ["landing", "push"])
def test_embedding_dies_between_two_rounds(pool: BlockPool, queues: QueuePair, mode: Mode) -> None:
    tokens = 3 * WHOLE_POOL
    with (
        forked(pool, "embedding", queues.embedding) as peer,
        language_here(pool, queues) as language,
    ):
        receiver = language.receive(ROOM, mode)
        peer.partner.ask("start", ROOM, num_tokens=tokens)
        poll_until(lambda: receiver.status is Status.Transferring, language)
        fails_soon(receiver, peer.child, f"{receiver.num_tokens} of {tokens} tokens are here")
        assert_nothing_held(pool)


def test_embedding_dies_while_it_waits_for_blocks(pool: BlockPool, queues: QueuePair) -> None:
    with (
        forked(pool, "embedding", queues.embedding) as peer,
        language_here(pool, queues) as language,
        no_blocks(pool),
    ):
        receiver = language.receive(ROOM, "push")
        reply = peer.partner.ask("start", ROOM, num_tokens=5)
        assert reply.status == Status.WaitingForInput
        fails_soon(receiver, peer.child, "the embedding side waits for free blocks to push with")


@pytest.mark.parametrize("mode", ["landing", "push"])
def test_what_the_dead_had_sent_in_full_still_arrives(
    pool: BlockPool, queues: QueuePair, mode: Mode
) -> None:
    """No published data is lost, and no chunk that was announced."""
    with (
        forked(pool, "embedding", queues.embedding) as peer,
        language_here(pool, queues) as language,
    ):
        receiver = language.receive(ROOM, mode)
        peer.partner.ask("start", ROOM, num_tokens=LANDING)
        peer.child.kill()
        with receiver.wait(PATIENCE) as result:
            assert_arrived(result, pool, LANDING)
        late = language.receive(ROOM)
        with pytest.raises(PeerDiedError, match=f"pid {peer.child.pid}"):
            late.wait(SOON)


# ---- the language side dies ------------------------------------------------------------------


def test_language_dies_before_it_asks(pool: BlockPool, queues: QueuePair) -> None:
    with (
        forked(pool, "language", queues.language) as peer,
        embedding_here(pool, queues) as embedding,
    ):
        sender = embedding.send(ROOM, payload(pool.config.fields, LONG))
        assert sender.status is Status.Bootstrapping
        fails_soon(sender, peer.child, "the language side has not asked for it yet")


def test_language_dies_while_we_wait_for_blocks_to_push_with(
    pool: BlockPool, queues: QueuePair
) -> None:
    with (
        forked(pool, "language", queues.language) as peer,
        embedding_here(pool, queues) as embedding,
        no_blocks(pool),
    ):
        peer.partner.ask("start", ROOM, mode="push")
        sender = embedding.send(ROOM, payload(pool.config.fields, 5))
        assert sender.status is Status.WaitingForInput
        fails_soon(sender, peer.child, "it waits for 1 consecutive free blocks to push with")


def test_language_dies_with_its_landing_blocks_written(pool: BlockPool, queues: QueuePair) -> None:
    with (
        forked(pool, "language", queues.language) as peer,
        embedding_here(pool, queues) as embedding,
    ):
        peer.partner.ask("start", ROOM)
        sender = embedding.send(ROOM, payload(pool.config.fields, LONG))
        assert sender.status is Status.Transferring
        fails_soon(sender, peer.child, f"{LANDING} of {LONG} tokens are sent in 1 round(s)")
        assert_nothing_held(pool)


def test_language_dies_with_its_request_unread(pool: BlockPool, queues: QueuePair) -> None:
    """Its landing blocks may be given to another before we read the request: never written into."""
    with (
        forked(pool, "language", queues.language) as peer,
        embedding_here(pool, queues) as embedding,
    ):
        peer.partner.ask("start", ROOM)
        peer.child.kill()
        pool.reap()
        other = pool.alloc_blocks(pool.config.total_blocks, 1)
        assert other is not None
        before = pool.view(other).aux.clone()
        sender = embedding.send(ROOM, payload(pool.config.fields, LONG))
        with pytest.raises(PeerDiedError):
            sender.wait(SOON)
        assert pool.view(other).aux.tolist() == before.tolist()
        pool.free(other)


def test_language_dies_before_it_opens_what_was_published(
    pool: BlockPool, queues: QueuePair
) -> None:
    with (
        forked(pool, "language", queues.language) as peer,
        embedding_here(pool, queues) as embedding,
    ):
        peer.partner.ask("start", ROOM, mode="push")
        sender = embedding.send(ROOM, payload(pool.config.fields, 50))
        assert [held.state for held in pool.allocations()] == [State.PUBLISHED]
        fails_soon(sender, peer.child, "all 50 tokens are sent, the language side has not")
        assert_nothing_held(pool)


@pytest.mark.parametrize("mode", ["landing", "push"])
def test_language_dies_with_a_result_that_it_reads(
    pool: BlockPool, queues: QueuePair, mode: Mode
) -> None:
    with (
        forked(pool, "language", queues.language) as peer,
        embedding_here(pool, queues) as embedding,
    ):
        peer.partner.ask("start", ROOM, mode=mode)
        sender = embedding.send(ROOM, payload(pool.config.fields, 50))
        assert peer.partner.ask("until", ROOM).status == Status.Success
        sender.wait(PATIENCE)
        assert len(pool.allocations()) == 1, "the result that was not taken yet"
        peer.child.kill()
        pool.reap()
        assert_nothing_held(pool)


# ---- afterwards ------------------------------------------------------------------------------


def test_a_wait_ends_when_the_peer_dies(pool: BlockPool, queues: QueuePair) -> None:
    """Also one that sleeps on the queue; the other thread kills while it does."""
    import threading

    with (
        forked(pool, "embedding", queues.embedding) as peer,
        language_here(pool, queues) as language,
    ):
        receiver = language.receive(ROOM)
        killer = threading.Timer(0.05, peer.child.kill)
        killer.start()
        with pytest.raises(PeerDiedError, match=f"pid {peer.child.pid}, embedding"):
            receiver.wait(PATIENCE)
        killer.join()


def test_a_successor_replaces_the_dead_peer(pool: BlockPool, queues: QueuePair) -> None:
    """A launcher restarts the embedding side on the same queues: rooms from then on work."""
    with language_here(pool, queues) as language:
        with forked(pool, "embedding", queues.embedding) as first:
            receiver = language.receive(ROOM)
            poll_until(lambda: language.stats().peer != "", language)
            fails_soon(receiver, first.child, "nothing came yet")
        with forked(pool, "embedding", queues.embedding) as second:
            poll_until(lambda: f"pid {second.child.pid}" in language.stats().peer, language)
            receiver = language.receive(ROOM)
            second.partner.ask("start", ROOM, num_tokens=LONG)
            second.partner.ask("poll")
            poll_until(lambda: receiver.status.is_final or _polled(second.partner), language)
            with receiver.wait(PATIENCE) as result:
                assert_arrived(result, pool, LONG)
            second.partner.close()


def _polled(partner: Partner) -> bool:
    partner.ask("poll")
    return False


def test_messages_of_the_dead_that_come_after_its_successors_are_foreign(
    pool: BlockPool, queues: QueuePair
) -> None:
    with (
        language_here(pool, queues) as language,
        forked(pool, "embedding", queues.embedding) as peer,
    ):
        poll_until(lambda: language.stats().peer != "", language)
        dead = language._connection.peer
        assert dead is not None
        peer.child.kill()
        assert pool.participant is not None
        from shmblocks.transfer.messages import Bye, Hello, SenderId, encode

        tx = queues.embedding.tx  # type: ignore[union-attr]
        tx.put(encode(Hello(SenderId(*pool.participant), pool.pool_id)))
        tx.put(encode(Bye(SenderId(*dead))))
        poll_until(lambda: language.stats().foreign == 1, language)
        assert "tests" in language.stats().peer
