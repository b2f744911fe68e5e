"""Late, duplicate, foreign, malformed and hostile messages: dropped and counted, or the end of a
room with a reason. Never an exception out of `poll`, a wrong view or a lost block."""

from __future__ import annotations

import os
import queue
import random
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shmblocks import BlockHandle, BlockPool
from shmblocks.transfer import EmbeddingEndpoint, LanguageEndpoint, Status
from shmblocks.transfer.messages import (
    AnyMessage,
    Bye,
    Chunk,
    Done,
    Failed,
    Hello,
    Request,
    Resume,
    SenderId,
    Starved,
    decode,
    encode,
)
from tests.transfer.conftest import Pair
from tests.transfer.kit import (
    LANDING,
    LANDING_BLOCKS,
    MODES,
    Mode,
    assert_arrived,
    assert_nothing_held,
    intercept,
    payload,
    peek,
    poll_until,
    put,
    settle,
)
from tests.transfer.steps import LONG, ROOM, no_blocks

STRANGER = SenderId(63, 1 << 40)  # a slot that nobody has


def our_id(pair: Pair) -> SenderId:
    """Both sides of a pair are this process."""
    assert pair.pool.participant is not None
    return SenderId(*pair.pool.participant)


# ---- dropped and counted ---------------------------------------------------------------------


def test_bytes_that_are_no_message_are_dropped_and_counted(pair: Pair) -> None:
    settle(pair.embedding, pair.language)
    rubbish = [b"", b"\xc1", os.urandom(60), bytes(100_000), msgspec.msgpack.encode({"a": 1})]
    for endpoint, rx in ((pair.embedding, pair.to_embedding), (pair.language, pair.to_language)):
        for data in rubbish:
            rx.put(data)
        rx.put("not even bytes")  # type: ignore[arg-type]
        endpoint.poll()
        assert endpoint.stats().malformed == len(rubbish) + 1


def test_messages_of_the_wrong_side_are_dropped_and_counted(pair: Pair) -> None:
    me = our_id(pair)
    handle = BlockHandle(0, 1, 1, 1, pair.pool.pool_id).encode()
    put(pair.to_embedding, Chunk(me, 1, 1, 0, handle, 0, 0, 1, 1))
    put(pair.to_language, Done(me, 1, 1), Request(me, 1, 1, "push", None))
    settle(pair.embedding, pair.language)
    assert pair.embedding.stats().malformed == 1
    assert pair.language.stats().malformed == 2


def test_messages_of_another_participant_are_dropped_and_counted(pair: Pair) -> None:
    settle(pair.embedding, pair.language)
    receiver = pair.language.receive(ROOM)
    (request,) = intercept(pair.to_embedding)
    assert isinstance(request, Request)
    put(pair.to_language, Failed(STRANGER, ROOM, request.nonce, "says who?"))
    put(pair.to_embedding, msgspec.structs.replace(request, sender=STRANGER))
    settle(pair.embedding, pair.language)
    assert pair.language.stats().foreign == pair.embedding.stats().foreign == 1
    assert receiver.status is Status.WaitingForInput
    receiver.abort()


@pytest.mark.parametrize("mode", MODES)
def test_late_messages_of_an_earlier_room_of_the_same_number_are_dropped(
    pair: Pair, mode: Mode
) -> None:
    fields = pair.pool.config.fields
    to_embedding: list[AnyMessage] = []
    to_language: list[AnyMessage] = []
    first = pair.language.receive(ROOM, mode)
    to_embedding += peek(pair.to_embedding)
    pair.embedding.send(ROOM, payload(fields, LONG))
    while not first.status.is_final:
        for rx, kept in ((pair.to_embedding, to_embedding), (pair.to_language, to_language)):
            taken = intercept(rx)
            kept.extend(taken)
            put(rx, *taken)
        pair.language.poll()
        pair.embedding.poll()
    first.wait(0).release()
    assert_nothing_held(pair.pool)

    second = pair.language.receive(ROOM, mode)
    late_ones = [message for message in to_embedding if not isinstance(message, Hello)]
    put(pair.to_embedding, *late_ones)
    put(pair.to_language, *to_language)
    pair.embedding.poll()
    pair.language.poll()
    assert second.status is Status.WaitingForInput
    assert pair.embedding.stats().late == len(late_ones)
    assert pair.language.stats().late >= len(to_language) - 1, "all but the Hello"
    pair.embedding.send(ROOM, payload(fields, 5, seed=2))
    settle(pair.embedding, pair.language)
    with second.wait(0) as result:
        assert_arrived(result, pair.pool, 5, seed=2)


def test_a_failed_of_an_earlier_attempt_does_not_end_a_room_that_nobody_has_asked_for(
    pair: Pair,
) -> None:
    fields = pair.pool.config.fields
    pair.language.receive(ROOM).abort("the first attempt")
    (*_, failed) = intercept(pair.to_embedding)
    put(pair.to_embedding, failed)
    pair.embedding.poll()
    assert pair.embedding.send(ROOM, payload(fields, 5)).status is Status.Failed
    again = pair.embedding.send(ROOM, payload(fields, 5))
    put(pair.to_embedding, failed)
    pair.embedding.poll()
    assert again.status is Status.Bootstrapping
    assert pair.embedding.stats().late == 1


def test_a_newer_request_replaces_one_that_was_not_served_yet(pair: Pair) -> None:
    """As when the embedding side was restarted on the same queues, with old requests in them."""
    receiver = pair.language.receive(ROOM)
    (*_, newer) = intercept(pair.to_embedding)
    stale = BlockHandle(0, LANDING_BLOCKS, LANDING, 1 << 40, pair.pool.pool_id).encode()
    put(pair.to_embedding, Request(our_id(pair), ROOM, 1, "landing", stale))
    sender = pair.embedding.send(ROOM, payload(pair.pool.config.fields, LONG))
    assert sender.status is Status.WaitingForInput
    put(pair.to_embedding, newer, Failed(our_id(pair), ROOM, 1, "of the first attempt"))
    settle(pair.embedding, pair.language)
    assert pair.embedding.stats().late == 1
    with receiver.wait(0) as result:
        assert_arrived(result, pair.pool, LONG)


def test_a_request_for_a_room_that_was_partly_served_ends_that_room(pair: Pair) -> None:
    """As a language side does that came back without a goodbye."""
    tokens = pair.pool.config.total_tokens + 1
    put(pair.to_embedding, Request(our_id(pair), ROOM, 1, "push", None))
    first = pair.embedding.send(ROOM, payload(pair.pool.config.fields, tokens))
    assert first.rounds == 1
    put(pair.to_embedding, Request(our_id(pair), ROOM, 2, "push", None))
    pair.embedding.poll()
    assert "began this room anew" in (first.failure or "")
    assert_nothing_held(pair.pool)
    second = pair.embedding.send(ROOM, payload(pair.pool.config.fields, tokens))
    assert second.rounds == 1
    second.abort()


def test_requests_without_a_send_are_bounded_and_the_oldest_is_refused(pair: Pair) -> None:
    from shmblocks.transfer.embedding import MOST_EARLY

    settle(pair.embedding, pair.language)
    for number in range(MOST_EARLY + 1):
        put(pair.to_embedding, Request(our_id(pair), number, number + 1, "push", None))
    for _ in range(MOST_EARLY // 1024 + 1):
        pair.embedding.poll()
    (refusal,) = intercept(pair.to_language)
    assert isinstance(refusal, Failed)
    assert (refusal.room, refusal.nonce) == (0, 1)
    assert "wait for their send()" in refusal.reason


def test_a_flood_of_messages_does_not_hold_up_a_poll_for_ever(pair: Pair) -> None:
    class Flood:
        def put(self, item: bytes) -> None:
            """Swallow it."""

        def get_nowait(self) -> bytes:
            return b"and another"

        def get(self, *, timeout: float = 0.0) -> bytes:
            return b"and another"

    with LanguageEndpoint(pair.pool, Flood(), Flood()) as language:
        language.poll()
        assert language.stats().malformed == 1024


# ---- the end of a room, with a reason --------------------------------------------------------

Change = Callable[[Chunk], Chunk]


def changed(**values: object) -> Change:
    return lambda chunk: msgspec.structs.replace(chunk, **values)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "change",
    [
        changed(round=1),
        changed(sent_tokens=1),
        changed(total_tokens=1),
        changed(total_tokens=LONG + 1),
        changed(num_tokens=LONG + 1, total_tokens=2 * LONG),
        changed(offset=1),
        changed(handle=b""),
        changed(handle=BlockHandle(0, 1, 16, 77, 5).encode()),
        changed(handle=BlockHandle(2**31, 1, 16, 77, 5).encode()),
        lambda chunk: msgspec.structs.replace(chunk, handle=fake_of(chunk.handle)),
        lambda chunk: msgspec.structs.replace(chunk, handle=longer_of(chunk.handle)),
    ],
)
def test_a_chunk_that_does_not_fit_fails_the_room_and_says_so_to_both(
    pair: Pair, mode: Mode, change: Change
) -> None:
    receiver = pair.language.receive(ROOM, mode)
    sender = pair.embedding.send(ROOM, payload(pair.pool.config.fields, LONG))
    *_, chunk = intercept(pair.to_language)
    assert isinstance(chunk, Chunk)
    put(pair.to_language, Hello(our_id(pair), pair.pool.pool_id), change(chunk))
    # A handle that looks as if it was freed is given a second for the reason to come.
    poll_until(lambda: sender.status is Status.Failed, pair.embedding, pair.language)
    assert receiver.status is sender.status is Status.Failed
    assert receiver.failure
    assert sender.failure
    assert_nothing_held(pair.pool)


def fake_of(handle: bytes) -> bytes:
    return msgspec.structs.replace(BlockHandle.decode(handle), generation=0).encode()


def longer_of(handle: bytes) -> bytes:
    real = BlockHandle.decode(handle)
    return msgspec.structs.replace(real, num_tokens=real.num_tokens + 1).encode()


def test_a_chunk_for_a_room_that_has_asked_for_nothing_fails_it(pair: Pair) -> None:
    with no_blocks(pair.pool):
        receiver = pair.language.receive(ROOM)
        nonce = receiver._room.nonce
        put(pair.to_language, Chunk(our_id(pair), ROOM, nonce, 0, b"", 0, 0, 1, 1))
        pair.language.poll()
        assert "a room at Bootstrapping" in (receiver.failure or "")


@pytest.mark.parametrize(
    ("offer", "reason"),
    [
        (b"", "MalformedHandleError"),
        (None, "expected blocks that are not full"),
        (BlockHandle(0, 1, 16, 1, 12345).encode(), "ForeignHandleError"),
        (BlockHandle(0, 1, 16, 0, 0).encode(), "Error"),
    ],
)
def test_a_request_with_a_bad_handle_fails_the_room(
    pair: Pair, offer: bytes | None, reason: str
) -> None:
    sender = pair.embedding.send(ROOM, payload(pair.pool.config.fields, 5))
    put(pair.to_embedding, Request(our_id(pair), ROOM, 1, "landing", offer))
    pair.embedding.poll()
    assert sender.status is Status.Failed
    assert reason in (sender.failure or "")
    answer = intercept(pair.to_language)[-1]
    assert isinstance(answer, Failed)
    assert reason in answer.reason


@pytest.mark.parametrize(
    "resume",
    [
        lambda me, handle: Resume(me, ROOM, 1, 2, handle, 0, LANDING),
        lambda me, handle: Resume(me, ROOM, 1, 1, handle, 0, LANDING - 1),
        lambda me, handle: Resume(me, ROOM, 1, 1, handle, LANDING, LANDING),
        lambda me, handle: Resume(me, ROOM, 1, 1, None, 0, LANDING),
        lambda me, handle: Done(me, ROOM, 1),
    ],
)
def test_a_resume_or_done_that_does_not_fit_fails_the_room(
    pair: Pair, resume: Callable[[SenderId, bytes], AnyMessage]
) -> None:
    sender = pair.embedding.send(ROOM, payload(pair.pool.config.fields, LONG))
    landing = pair.pool.alloc_blocks(LANDING_BLOCKS, LANDING)
    assert landing is not None
    put(pair.to_embedding, Request(our_id(pair), ROOM, 1, "landing", landing.encode()))
    put(pair.to_embedding, resume(our_id(pair), landing.encode()))
    pair.embedding.poll()
    assert sender.status is Status.Failed
    assert isinstance(intercept(pair.to_language)[-1], Failed)
    pair.pool.free(landing)


def test_blocks_whose_aux_tells_another_length_fail_the_room(pair: Pair) -> None:
    receiver = pair.language.receive(ROOM)
    *_, request = intercept(pair.to_embedding)
    assert isinstance(request, Request)
    assert request.handle is not None
    with pair.pool.open_for_write(BlockHandle.decode(request.handle)) as lease:
        lease.aux[0] = 6
    put(
        pair.to_language,
        Chunk(our_id(pair), ROOM, request.nonce, 0, request.handle, 0, 0, 5, 5),
    )
    pair.language.poll()
    assert "aux[0]: expected the total length 5, got 6" in (receiver.failure or "")


def test_a_length_that_no_memory_holds_fails_the_room(pair: Pair) -> None:
    longest = (1 << 31) - 1
    with no_blocks(pair.pool, free_blocks=LANDING_BLOCKS):
        receiver = pair.language.receive(ROOM)
        *_, request = intercept(pair.to_embedding)
        assert isinstance(request, Request)
        assert request.handle is not None
        with pair.pool.open_for_write(BlockHandle.decode(request.handle)) as lease:
            lease.aux[0] = longest
        chunk = Chunk(our_id(pair), ROOM, request.nonce, 0, request.handle, 0, 0, LANDING, longest)
        put(pair.to_language, chunk)
        pair.language.poll()
        # 2**31 tokens of 60 bytes: where the system promises that much memory, it goes on.
        assert receiver.status in (Status.Failed, Status.Transferring)
        receiver.abort()


def test_an_endpoint_on_another_pool_is_told_apart(pair: Pair) -> None:
    settle(pair.embedding, pair.language)
    receiver = pair.language.receive(ROOM)
    put(pair.to_language, Hello(our_id(pair), pair.pool.pool_id ^ 1))
    pair.language.poll()
    assert "attach both sides to the same pool" in (receiver.failure or "")


# ---- whatever comes --------------------------------------------------------------------------

sizes = st.integers(0, 2 * LANDING)


def messages(nonce: int, handle: bytes, me: SenderId) -> st.SearchStrategy[AnyMessage]:
    """Messages that come close: the right room and nonce, numbers around the right ones."""
    from_whom = st.sampled_from([me, me, me, STRANGER])
    nonces = st.sampled_from([nonce, nonce, nonce, 0, 5])
    handles = st.sampled_from([handle, handle, fake_of(handle), longer_of(handle), b"\x95", None])
    some = st.sampled_from([handle, handle, longer_of(handle), b""])
    rounds, rooms = st.integers(0, 3), st.sampled_from([ROOM, ROOM, ROOM + 1])
    more = st.integers(1, 3 * LANDING)
    mode: st.SearchStrategy[Mode] = st.sampled_from(["landing", "push"])
    return st.one_of(
        st.builds(Hello, from_whom, st.just(0)),
        st.builds(Bye, st.just(STRANGER)),
        st.builds(Request, from_whom, rooms, nonces, mode, handles),
        st.builds(Chunk, from_whom, rooms, nonces, rounds, some, sizes, sizes, more, more),
        st.builds(Resume, from_whom, rooms, nonces, st.integers(1, 3), handles, sizes, more),
        st.builds(Starved, from_whom, rooms, nonces, rounds, more),
        st.builds(Done, from_whom, rooms, nonces),
        st.builds(Failed, from_whom, rooms, nonces, st.just("because")),
    )


QUICK = settings(
    max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)


@QUICK
@given(junk=st.lists(st.binary(max_size=80), max_size=20))
def test_any_bytes_leave_an_endpoint_working(pool: BlockPool, junk: list[bytes]) -> None:
    play(pool, lambda *_: junk, random.Random(0), is_genuine=True)


@QUICK
@given(data=st.data())
def test_any_messages_that_come_close_leave_an_endpoint_working(
    pool: BlockPool, data: st.DataObject
) -> None:
    def close_ones(nonce: int, handle: bytes, me: SenderId) -> list[bytes]:
        drawn = data.draw(st.lists(messages(nonce, handle, me), max_size=6))
        return [encode(message) for message in drawn]

    play(pool, close_ones, random.Random(data.draw(st.integers(0, 1000))), is_genuine=False)


def play(
    pool: BlockPool,
    junk: Callable[[int, bytes, SenderId], list[bytes]],
    rng: random.Random,
    is_genuine: bool,
) -> None:
    """A transfer in each direction amid junk: whatever becomes of it, nothing raises, what arrives
    is right, and everything comes back."""
    one: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    two: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with (
        EmbeddingEndpoint(pool, one, two) as embedding,
        LanguageEndpoint(pool, two, one) as language,
    ):
        receiver = language.receive(ROOM, rng.choice(MODES))
        asked = [decode(two.get_nowait()) for _ in range(two.qsize())]
        request = asked[-1]
        assert isinstance(request, Request)
        handle = request.handle or BlockHandle(0, 4, LANDING, 1, pool.pool_id).encode()
        for data in [*junk(request.nonce, handle, request.sender), encode(request)]:
            rng.choice((one, two)).put(data)
        embedding.send(ROOM, payload(pool.config.fields, LONG))
        for data in junk(request.nonce, handle, request.sender):
            rng.choice((one, two)).put(data)
        settle(embedding, language)
        if receiver.status is Status.Success:
            with receiver.wait(0) as result:
                if is_genuine:
                    assert_arrived(result, pool, LONG)
                assert [len(result[field.name].reshape(-1)) for field in pool.config.fields] == [
                    field.elements * result.num_tokens for field in pool.config.fields
                ]
    assert_nothing_held(pool)
