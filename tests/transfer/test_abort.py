"""A room that is ended early, at every status and from each side: the other side is told why, and
everything comes back."""

from __future__ import annotations

import pytest

from shmblocks import BlockHandle, TransferError
from shmblocks.transfer import Receiver, Sender, Status
from shmblocks.transfer.messages import Request, decode
from tests.transfer.conftest import Pair
from tests.transfer.kit import MODES, Mode, assert_arrived, assert_nothing_held, payload, settle
from tests.transfer.steps import LONG, ROOM, STEPS, Step, no_blocks, room_at

IDS = [f"{step.mode}: {step.embedding or 'none'} and {step.language or 'none'}" for step in STEPS]


def assert_failed(side: Sender | Receiver, reason: str) -> None:
    assert side.status is Status.Failed
    assert reason in (side.failure or "")
    with pytest.raises(TransferError, match=reason):
        side.wait(0)


@pytest.mark.parametrize("step", STEPS, ids=IDS)
def test_an_abort_of_the_language_side_ends_both_sides(step: Step, pair: Pair) -> None:
    with room_at(step, pair) as (sender, receiver):
        if receiver is None:
            return
        assert receiver.abort("the client has gone")
        settle(pair.embedding, pair.language)
        assert_failed(receiver, "aborted: the client has gone")
        late = sender or pair.embedding.send(ROOM, payload(pair.pool.config.fields, LONG))
        assert_failed(late, "ended it: aborted: the client has gone")
    assert_nothing_held(pair.pool)


@pytest.mark.parametrize("step", STEPS, ids=IDS)
def test_an_abort_of_the_embedding_side_ends_both_sides(step: Step, pair: Pair) -> None:
    with room_at(step, pair) as (sender, receiver):
        if sender is None:
            return
        assert sender.abort("the image is broken")
        late = receiver or pair.language.receive(ROOM, step.mode)
    settle(pair.embedding, pair.language)  # a room without blocks asks when it gets some
    assert_failed(sender, "aborted: the image is broken")
    assert_failed(late, "ended it: aborted: the image is broken")
    assert_nothing_held(pair.pool)


@pytest.mark.parametrize("step", STEPS, ids=IDS)
@pytest.mark.parametrize("closed", ["embedding", "language"])
def test_closing_an_endpoint_ends_its_rooms_and_tells_the_other_side(
    step: Step, closed: str, pair: Pair
) -> None:
    with room_at(step, pair) as (sender, receiver):
        (pair.embedding if closed == "embedding" else pair.language).close()
        open_one = pair.language if closed == "embedding" else pair.embedding
        open_one.poll()
        for side in (sender, receiver):
            assert side is None or side.status is Status.Failed
            assert side is None or "closed" in (side.failure or "")
    assert_nothing_held(pair.pool)


def test_what_was_being_written_when_the_blocks_were_freed_is_not_used_again_before_the_end(
    pair: Pair,
) -> None:
    receiver = pair.language.receive(ROOM)
    (landing,) = pair.pool.allocations()
    handle = receiver_handle(pair)
    with pair.pool.open_for_write(handle):
        receiver.abort("in the middle of a write")
        assert pair.pool.available_blocks() == pair.pool.config.total_blocks - landing.num_blocks
    assert_nothing_held(pair.pool)


def receiver_handle(pair: Pair) -> BlockHandle:
    """The handle that the language side asked with."""
    messages = [decode(pair.to_embedding.get_nowait()) for _ in range(pair.to_embedding.qsize())]
    (request,) = [message for message in messages if isinstance(message, Request)]
    assert request.handle is not None
    return BlockHandle.decode(request.handle)


@pytest.mark.parametrize("mode", MODES)
def test_a_room_that_has_ended_is_not_aborted_again(pair: Pair, mode: Mode) -> None:
    receiver = pair.language.receive(ROOM, mode)
    sender = pair.embedding.send(ROOM, payload(pair.pool.config.fields, 5))
    settle(pair.embedding, pair.language)
    with receiver.wait(0) as result:
        assert not receiver.abort("too late")
        assert not sender.abort("too late")
        assert receiver.status is sender.status is Status.Success
        assert_arrived(result, pair.pool, 5)
    failed = pair.language.receive(ROOM, mode)
    failed.abort("first")
    assert not failed.abort("second")
    assert "first" in (failed.failure or "")


def test_an_abort_gives_back_a_result_that_nobody_has_taken(pair: Pair) -> None:
    receiver = pair.language.receive(ROOM)
    pair.embedding.send(ROOM, payload(pair.pool.config.fields, 5))
    settle(pair.embedding, pair.language)
    assert receiver.status is Status.Success
    assert not receiver.abort("its client has gone")
    assert_nothing_held(pair.pool)
    with pytest.raises(TransferError, match="its result was given back by abort"):
        receiver.wait(0)


def test_closing_gives_back_results_that_nobody_has_taken_and_leaves_those_that_were(
    pair: Pair,
) -> None:
    receivers = [pair.language.receive(room) for room in range(3)]
    for room in range(3):
        pair.embedding.send(room, payload(pair.pool.config.fields, 5 + room, seed=room))
    settle(pair.embedding, pair.language)
    taken = receivers[1].wait(0)
    pair.language.close()
    assert len(pair.pool.allocations()) == 1
    assert_arrived(taken, pair.pool, 6, seed=1)
    taken.release()
    assert_nothing_held(pair.pool)


def test_a_room_can_be_tried_again_after_it_failed(pair: Pair) -> None:
    fields = pair.pool.config.fields
    with no_blocks(pair.pool):
        receiver = pair.language.receive(ROOM, "push")
        sender = pair.embedding.send(ROOM, payload(fields, 9))
        receiver.abort("not now")
        settle(pair.embedding, pair.language)
        assert sender.status is Status.Failed
    again = pair.language.receive(ROOM, "push")
    pair.embedding.send(ROOM, payload(fields, 9, seed=4))
    settle(pair.embedding, pair.language)
    with again.wait(0) as result:
        assert_arrived(result, pair.pool, 9, seed=4)
