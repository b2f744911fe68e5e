"""Push: blocks that the embedding side allocates, writes once and publishes."""

from __future__ import annotations

import queue

import pytest

from shmblocks import BlockHandle, InvalidStateError, StaleHandleError, State
from shmblocks.transfer import EmbeddingEndpoint, LanguageEndpoint, Status
from tests.transfer.conftest import Pair
from tests.transfer.kit import (
    LANDING,
    WHOLE_POOL,
    Mode,
    assert_arrived,
    assert_nothing_held,
    payload,
    settle,
)
from tests.transfer.steps import ROOM, no_blocks


def written_by_hand(pair: Pair, tokens: int, delta: int = 0) -> BlockHandle:
    """An allocation that the caller wrote itself, as with `out=`."""
    handle = pair.pool.alloc(tokens, req_id="by hand")
    assert handle is not None
    view = pair.pool.view(handle)
    for name, tensor in payload(pair.pool.config.fields, tokens).items():
        view[name].copy_(tensor)
    view.aux.zero_()
    view.aux[1] = delta
    return handle


@pytest.mark.parametrize("tokens", [1, LANDING + 1, 700, WHOLE_POOL])
def test_what_fits_into_the_pool_is_read_in_place(pair: Pair, tokens: int) -> None:
    receiver = pair.language.receive(ROOM, "push")
    sender = pair.embedding.send(ROOM, payload(pair.pool.config.fields, tokens))
    settle(pair.embedding, pair.language)
    assert sender.status is Status.Success
    with receiver.wait(0) as result:
        assert (result.rounds, result.is_zero_copy) == (1, True)
        assert_arrived(result, pair.pool, tokens)
        (held,) = pair.pool.allocations()
        assert (held.state, held.num_tokens) == (State.LEASED, tokens)


@pytest.mark.parametrize("tokens", [WHOLE_POOL + 1, 4 * WHOLE_POOL + 9])
def test_what_can_never_fit_goes_in_chunks_of_half_the_pool(pair: Pair, tokens: int) -> None:
    receiver = pair.language.receive(ROOM, "push")
    sender = pair.embedding.send(ROOM, payload(pair.pool.config.fields, tokens))
    settle(pair.embedding, pair.language)
    assert sender.status is Status.Success
    assert sender.rounds == -(-tokens // (WHOLE_POOL // 2))
    with receiver.wait(0) as result:
        assert_arrived(result, pair.pool, tokens)
        assert_nothing_held(pair.pool)


def test_a_push_without_blocks_holds_nothing_and_goes_on_when_there_are_some(pair: Pair) -> None:
    with no_blocks(pair.pool, free_blocks=10):
        receiver = pair.language.receive(ROOM, "push")
        sender = pair.embedding.send(ROOM, payload(pair.pool.config.fields, 500))
        settle(pair.embedding, pair.language)
        assert sender.status is Status.WaitingForInput
        assert len(pair.pool.allocations()) == 1, "somebody else's"
        small = pair.language.receive(ROOM + 1, "push")
        pair.embedding.send(ROOM + 1, payload(pair.pool.config.fields, 50))
        settle(pair.embedding, pair.language)
        with small.wait(0) as result:
            assert_arrived(result, pair.pool, 50)
    settle(pair.embedding, pair.language)
    with receiver.wait(0) as result:
        assert_arrived(result, pair.pool, 500)


def test_blocks_written_by_the_caller_are_pushed_without_any_copy(pair: Pair) -> None:
    handle = written_by_hand(pair, 100, delta=-3)
    receiver = pair.language.receive(ROOM, "push")
    sender = pair.embedding.send_handle(ROOM, handle)
    settle(pair.embedding, pair.language)
    assert sender.status is Status.Success
    with receiver.wait(0) as result:
        assert result.is_zero_copy
        (held,) = pair.pool.allocations()
        assert held.start_block == handle.start_block
        assert_arrived(result, pair.pool, 100, delta=-3)


def test_blocks_written_by_the_caller_can_land_too(pair: Pair) -> None:
    handle = written_by_hand(pair, LANDING + 9)
    receiver = pair.language.receive(ROOM, "landing")
    sender = pair.embedding.send_handle(ROOM, handle, mrope_position_delta=5)
    settle(pair.embedding, pair.language)
    assert sender.status is Status.Success
    with pytest.raises(StaleHandleError):
        pair.pool.free(handle)
    with receiver.wait(0) as result:
        assert_arrived(result, pair.pool, LANDING + 9, delta=5)


@pytest.mark.parametrize("mode", ["push", "landing", None])
def test_blocks_written_by_the_caller_come_back_when_the_room_fails(
    pair: Pair, mode: Mode | None
) -> None:
    sender = pair.embedding.send_handle(ROOM, written_by_hand(pair, 2 * LANDING))
    if mode is not None:
        pair.language.receive(ROOM, mode)
        pair.embedding.poll()
    sender.abort()
    settle(pair.embedding, pair.language)
    assert_nothing_held(pair.pool)


def test_only_a_reservation_of_this_process_can_be_sent_as_a_handle(pair: Pair) -> None:
    handle = written_by_hand(pair, 10)
    pair.pool.free(handle)
    with pytest.raises(StaleHandleError):
        pair.embedding.send_handle(ROOM, handle)
    published = pair.pool.publish(written_by_hand(pair, 10))
    with pytest.raises(InvalidStateError, match="expected a reservation of this process"):
        pair.embedding.send_handle(ROOM, published)
    pair.pool.free(published)
    with pytest.raises(InvalidStateError, match="expected published blocks of pool"):
        pair.embedding.send_handle(ROOM, BlockHandle(0, 1, 1), published=True)


def test_published_blocks_go_to_several_receivers(pair: Pair) -> None:
    handle = written_by_hand(pair, 10)
    pair.pool.view(handle).aux[0] = 10
    handle = pair.pool.publish(handle, readers=2)
    one: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    two: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with (
        EmbeddingEndpoint(pair.pool, one, two) as embedding,
        LanguageEndpoint(pair.pool, two, one) as language,
    ):
        receivers = [pair.language.receive(ROOM, "push"), language.receive(ROOM, "push")]
        senders = [
            side.send_handle(ROOM, handle, published=True) for side in (pair.embedding, embedding)
        ]
        settle(pair.embedding, pair.language, embedding, language)
        assert [sender.status for sender in senders] == [Status.Success] * 2
        results = [receiver.wait(0) for receiver in receivers]
        for result in results:
            assert_arrived(result, pair.pool, 10)
            result.release()
    assert_nothing_held(pair.pool)


def test_published_blocks_stay_the_callers_when_a_room_fails(pair: Pair) -> None:
    handle = pair.pool.publish(written_by_hand(pair, 10), readers=2)
    receiver = pair.language.receive(ROOM, "landing")
    sender = pair.embedding.send_handle(ROOM, handle, published=True)
    settle(pair.embedding, pair.language)
    assert sender.status is receiver.status is Status.Failed
    assert "receive with mode='push'" in (receiver.failure or "")
    pair.pool.free(handle)


def test_a_chunk_that_was_never_opened_is_taken_back(pair: Pair) -> None:
    pair.language.receive(ROOM, "push")
    sender = pair.embedding.send(ROOM, payload(pair.pool.config.fields, 10))
    (held,) = pair.pool.allocations()
    assert held.state is State.PUBLISHED
    sender.abort("nobody will come")
    assert_nothing_held(pair.pool)


def test_an_open_result_outlives_both_endpoints(pair: Pair) -> None:
    receiver = pair.language.receive(ROOM, "push")
    pair.embedding.send(ROOM, payload(pair.pool.config.fields, 10))
    settle(pair.embedding, pair.language)
    result = receiver.wait(0)
    pair.embedding.close()
    pair.language.close()
    assert_arrived(result, pair.pool, 10)
    result.release()
    assert_nothing_held(pair.pool)
