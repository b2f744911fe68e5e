"""What a receiver gets: tensors, aux, and blocks that it holds until it is released."""

from __future__ import annotations

import gc
import queue
import weakref

import pytest

from shmblocks import BlockPool, Field, InvalidStateError
from shmblocks.config import DTYPES
from shmblocks.transfer import EmbeddingEndpoint, LanguageEndpoint, TransferResult
from tests.transfer.conftest import Pair
from tests.transfer.kit import (
    LANDING,
    LANDING_BLOCKS,
    MODES,
    WHOLE_POOL,
    Mode,
    assert_arrived,
    assert_nothing_held,
    config,
    payload,
    settle,
)
from tests.transfer.steps import LONG, ROOM


def received(pair: Pair, mode: Mode, tokens: int = LONG, delta: int = 0) -> TransferResult:
    receiver = pair.language.receive(ROOM, mode)
    tensors = payload(pair.pool.config.fields, tokens)
    pair.embedding.send(ROOM, tensors, mrope_position_delta=delta)
    settle(pair.embedding, pair.language)
    return receiver.wait(0)


# One length for each of the ways in which a result can lie: in place, and in private memory.
LENGTHS = (LANDING, 2 * WHOLE_POOL)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("mode", MODES)
def test_a_released_result_gives_nothing_any_more(pair: Pair, mode: Mode, tokens: int) -> None:
    result = received(pair, mode, tokens)
    result.release()
    result.release()
    assert result.is_released
    assert_nothing_held(pair.pool)
    for use in (lambda: result["fill_ids"], lambda: result.parts("fill_ids"), result.__enter__):
        with pytest.raises(InvalidStateError, match="was released, and its blocks may hold"):
            use()
    assert result.num_tokens == tokens
    assert result.aux[0] == tokens
    assert "released" in repr(result)


@pytest.mark.parametrize("delta", [0, -(1 << 31), (1 << 31) - 1])
@pytest.mark.parametrize("mode", MODES)
def test_the_mrope_delta_arrives_in_aux(pair: Pair, mode: Mode, delta: int) -> None:
    with received(pair, mode, delta=delta) as result:
        assert result.mrope_position_delta == delta
        assert result.aux.tolist() == [LONG, delta] + [0] * 14


@pytest.mark.parametrize("mode", MODES)
def test_every_dtype_and_shape_arrives_bit_for_bit(pool_name: str, mode: Mode) -> None:
    fields = tuple(Field(f"scalar_{dtype}", (), dtype) for dtype in DTYPES)
    fields += tuple(Field(f"matrix_{dtype}", (2, 3), dtype) for dtype in DTYPES)
    fields += tuple(Field(f"turned_{dtype}", (5,), dtype, transposed=True) for dtype in DTYPES)
    one: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    two: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with BlockPool.create(pool_name, config(fields=fields), prefault="off") as pool:
        with (
            EmbeddingEndpoint(pool, one, two) as embedding,
            LanguageEndpoint(pool, two, one) as language,
        ):
            for tokens in (1, LONG, 2 * WHOLE_POOL):
                receiver = language.receive(ROOM, mode)
                in_the_way = pool.alloc_blocks(1, 1) if tokens == LONG else None
                embedding.send(ROOM, payload(pool.config.fields, tokens))
                settle(embedding, language)
                with receiver.wait(0) as result:
                    assert_arrived(result, pool, tokens)
                if in_the_way is not None:
                    pool.free(in_the_way)
        assert_nothing_held(pool)


def test_a_result_is_a_mapping_of_the_pools_fields(pair: Pair) -> None:
    with received(pair, "landing") as result:
        names = [field.name for field in pair.pool.config.fields]
        assert list(result) == names
        assert len(result) == len(names)
        assert dict(result).keys() == set(names)
        with pytest.raises(KeyError, match=r"expected one of input_embeddings, .*, got 'pixels'"):
            result["pixels"]
        assert tuple(result["mrope_positions"].shape) == (3, LONG)


@pytest.mark.parametrize("tokens", [LANDING, LONG])
def test_a_result_moved_out_of_the_pool_holds_no_blocks_and_stays_right(
    pair: Pair, tokens: int
) -> None:
    result = received(pair, "landing", tokens)
    result.move_out()
    assert_nothing_held(pair.pool)
    assert_arrived(result, pair.pool, tokens)
    assert not result.is_zero_copy
    result.move_out()
    result.release()
    result.move_out()
    assert result.is_released


def test_the_tensors_that_were_sent_are_let_go_when_the_room_ends(pair: Pair) -> None:
    tensors = payload(pair.pool.config.fields, 5)
    watched = weakref.ref(tensors["input_embeddings"])
    receiver = pair.language.receive(ROOM)
    sender = pair.embedding.send(ROOM, tensors)
    del tensors
    settle(pair.embedding, pair.language)
    gc.collect()
    assert watched() is None
    assert sender.num_tokens == 5
    receiver.wait(0).release()


def test_releasing_after_the_pool_was_closed_does_nothing(pool_name: str) -> None:
    one: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    two: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    pool = BlockPool.create(pool_name, config(), prefault="off")
    embedding, language = EmbeddingEndpoint(pool, one, two), LanguageEndpoint(pool, two, one)
    results = []
    for room, mode in enumerate(MODES):
        receiver = language.receive(room, mode)
        embedding.send(room, payload(pool.config.fields, 5))
        settle(embedding, language)
        results.append(receiver.wait(0))
    language.receive(2)
    pool.close()
    for result in results:
        assert_arrived(result, pool, 5)
        result.release()
    embedding.close()
    language.close()


def test_gradients_stay_where_they_are(pair: Pair) -> None:
    tensors = payload(pair.pool.config.fields, LANDING_BLOCKS)
    tensors["input_embeddings"] = tensors["input_embeddings"].float().bfloat16().requires_grad_()
    receiver = pair.language.receive(ROOM)
    pair.embedding.send(ROOM, tensors)
    settle(pair.embedding, pair.language)
    with receiver.wait(0) as result:
        assert not result["input_embeddings"].requires_grad
