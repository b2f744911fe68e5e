"""Landing: blocks that the language side reserves before it knows the length, and how it gets
more when they are too few."""

from __future__ import annotations

import queue

import pytest

from shmblocks import BlockPool
from shmblocks.transfer import EmbeddingEndpoint, LanguageEndpoint, Status, TransferResult
from tests.transfer.conftest import Pair
from tests.transfer.kit import (
    BLOCK,
    LANDING,
    LANDING_BLOCKS,
    TOTAL_BLOCKS,
    WHOLE_POOL,
    assert_arrived,
    assert_nothing_held,
    config,
    payload,
    peek,
    settle,
)
from tests.transfer.steps import ROOM, no_blocks


def transfer(pair: Pair, tokens: int, room: int = ROOM) -> TransferResult:
    """A whole transfer; the receiver's side was not begun before."""
    receiver = pair.language.receive(room, "landing")
    sender = pair.embedding.send(room, payload(pair.pool.config.fields, tokens, room))
    settle(pair.embedding, pair.language)
    assert sender.status is Status.Success, sender.failure
    assert sender.rounds == receiver.rounds
    assert sender.num_tokens == receiver.num_tokens == tokens
    assert sender.num_bytes == receiver.num_bytes == tokens * pair.pool.config.token_bytes
    return receiver.wait(0)


@pytest.mark.parametrize("tokens", [1, BLOCK, LANDING - 1, LANDING])
def test_what_fits_lands_in_one_round_without_a_copy(pair: Pair, tokens: int) -> None:
    with transfer(pair, tokens) as result:
        assert result.rounds == 1
        assert result.is_zero_copy
        assert_arrived(result, pair.pool, tokens, ROOM)
        (held,) = pair.pool.allocations()
        assert (held.num_blocks, held.req_id) == (LANDING_BLOCKS, f"room {ROOM}")


def test_what_is_longer_grows_in_place_when_the_blocks_behind_are_free(pair: Pair) -> None:
    with transfer(pair, 2000 % WHOLE_POOL) as result:
        assert result.rounds == 2
        assert result.is_zero_copy
        assert_arrived(result, pair.pool, 2000 % WHOLE_POOL, ROOM)
        assert len(pair.pool.allocations()) == 1


def test_what_cannot_grow_takes_a_second_allocation_and_copies_nothing(pair: Pair) -> None:
    receiver = pair.language.receive(ROOM)
    in_the_way = pair.pool.alloc_blocks(1, 1)
    assert in_the_way is not None
    tokens = LANDING + 100
    pair.embedding.send(ROOM, payload(pair.pool.config.fields, tokens))
    settle(pair.embedding, pair.language)
    with receiver.wait(0) as result:
        assert result.rounds == 2
        assert not result.is_zero_copy
        parts = result.parts("input_embeddings")
        assert [len(part) for part in parts] == [LANDING, 100]
        assert len(pair.pool.allocations()) == 3
        assert_arrived(result, pair.pool, tokens)
        assert result["fill_ids"] is result["fill_ids"], "joined once"
    pair.pool.free(in_the_way)


def test_when_no_blocks_are_free_the_same_ones_are_offered_again(pair: Pair) -> None:
    receiver = pair.language.receive(ROOM)
    with no_blocks(pair.pool, free_blocks=LANDING_BLOCKS):
        tokens = 5 * LANDING + 3
        pair.embedding.send(ROOM, payload(pair.pool.config.fields, tokens))
        settle(pair.embedding, pair.language)
        with receiver.wait(0) as result:
            assert result.rounds == 6
            assert not result.is_zero_copy
            assert_arrived(result, pair.pool, tokens)
            assert pair.pool.available_blocks() == LANDING_BLOCKS, "what is private holds no blocks"


@pytest.mark.parametrize("tokens", [WHOLE_POOL, WHOLE_POOL + 1, 5 * WHOLE_POOL + 7])
def test_a_transfer_can_be_as_long_as_the_pool_and_longer(pair: Pair, tokens: int) -> None:
    with transfer(pair, tokens) as result:
        assert_arrived(result, pair.pool, tokens, ROOM)
        assert result.is_zero_copy == (tokens == WHOLE_POOL)


def test_a_landing_allocation_is_never_more_than_the_pool(pool_name: str) -> None:
    with BlockPool.create(pool_name, config(total_blocks=2), prefault="off") as pool:
        one: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        two: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        with (
            EmbeddingEndpoint(pool, one, two) as embedding,
            LanguageEndpoint(pool, two, one) as language,
        ):
            receiver = language.receive(ROOM)
            embedding.send(ROOM, payload(pool.config.fields, 100))
            settle(embedding, language)
            with receiver.wait(0) as result:
                assert result.rounds == 4
                assert_arrived(result, pool, 100)
        assert_nothing_held(pool)


def test_a_room_without_blocks_holds_nothing_and_begins_when_there_are_some(pair: Pair) -> None:
    with no_blocks(pair.pool):
        receiver = pair.language.receive(ROOM)
        sender = pair.embedding.send(ROOM, payload(pair.pool.config.fields, 10))
        settle(pair.embedding, pair.language)
        assert receiver.status is sender.status is Status.Bootstrapping
        assert len(pair.pool.allocations()) == 1, "somebody else's"
    settle(pair.embedding, pair.language)
    with receiver.wait(0) as result:
        assert_arrived(result, pair.pool, 10)


def test_rooms_get_blocks_in_the_order_in_which_they_were_opened(pair: Pair) -> None:
    with no_blocks(pair.pool):
        receivers = [pair.language.receive(room) for room in range(TOTAL_BLOCKS)]
    pair.language.poll()
    begun = [receiver.status is Status.WaitingForInput for receiver in receivers]
    assert begun == [room < TOTAL_BLOCKS // LANDING_BLOCKS for room in range(TOTAL_BLOCKS)]
    for receiver in receivers:
        receiver.abort()


def test_the_request_id_is_shown_by_inspectors(pair: Pair) -> None:
    receiver = pair.language.receive(ROOM, req_id="chatcmpl-42")
    (held,) = pair.pool.allocations()
    assert held.req_id == "chatcmpl-42"
    receiver.abort()


@pytest.mark.parametrize("is_alone", [True, False])
def test_the_resume_of_the_original_2000_tokens_into_1024(pool_name: str, is_alone: bool) -> None:
    """Pool of 8192 tokens in blocks of 128, landing blocks for 1024, as in its documents."""
    from shmblocks import PoolConfig, multimodal_fields
    from shmblocks.transfer.messages import Chunk, Resume

    wide = PoolConfig(
        total_tokens=8192, fields=multimodal_fields(4), block_size=128, default_num_blocks=8
    )
    to_language: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    to_embedding: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with (
        BlockPool.create(pool_name, wide, prefault="off") as pool,
        EmbeddingEndpoint(pool, to_language, to_embedding) as embedding,
        LanguageEndpoint(pool, to_embedding, to_language) as language,
    ):
        receiver = language.receive(ROOM)
        other = None if is_alone else pool.alloc(976)
        sender = embedding.send(ROOM, payload(pool.config.fields, 2000))
        chunk = peek(to_language)[-1]
        assert isinstance(chunk, Chunk)
        assert (chunk.sent_tokens, chunk.num_tokens, chunk.total_tokens) == (0, 1024, 2000)
        language.poll()
        assert str(receiver.status) == "Transferring"
        asked = peek(to_embedding)[-1]
        assert isinstance(asked, Resume)
        assert (asked.sent_tokens, asked.round) == (1024, 1)
        assert asked.offset == (1024 if is_alone else 0)
        settle(embedding, language)
        assert (sender.num_tokens, sender.rounds, str(sender.status)) == (2000, 2, "Success")
        with receiver.wait(0) as result:
            assert [len(part) for part in result.parts("fill_ids")] == (
                [2000] if is_alone else [1024, 976]
            )
            assert_arrived(result, pool, 2000)
        if other is not None:
            pool.free(other)
        assert_nothing_held(pool)
