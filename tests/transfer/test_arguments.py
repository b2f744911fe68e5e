"""Arguments that cannot be right, and what the errors say."""

from __future__ import annotations

import queue

import pytest

from shmblocks import BlockPool
from shmblocks.transfer import LanguageEndpoint
from tests.transfer.conftest import Pair
from tests.transfer.kit import assert_nothing_held, config, payload
from tests.transfer.steps import ROOM


def test_a_missing_or_unknown_field_is_named(pair: Pair) -> None:
    tensors = payload(pair.pool.config.fields, 5)
    tensors["pixels"] = tensors.pop("fill_ids")
    with pytest.raises(ValueError, match=r"missing: fill_ids; unknown: pixels"):
        pair.embedding.send(ROOM, tensors)
    with pytest.raises(ValueError, match=r"expected the pool's fields input_embeddings, fill_ids"):
        pair.embedding.send(ROOM, {})


def test_a_wrong_dtype_is_named(pair: Pair) -> None:
    tensors = payload(pair.pool.config.fields, 5)
    tensors["fill_ids"] = tensors["fill_ids"].long()
    with pytest.raises(TypeError, match=r"fill_ids: expected torch.int32, got torch.int64"):
        pair.embedding.send(ROOM, tensors)
    with pytest.raises(TypeError, match=r"fill_ids: expected a torch.Tensor, got list"):
        pair.embedding.send(ROOM, {**tensors, "fill_ids": [1, 2]})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("name", "shape", "text"),
    [
        ("input_embeddings", (5, 9), r"expected the shape \[tokens, 8\], got \[5, 9\]"),
        ("input_embeddings", (5,), r"expected the shape \[tokens, 8\], got \[5\]"),
        ("input_embeddings", (1, 5, 8), r"expected the shape \[tokens, 8\], got \[1, 5, 8\]"),
        ("fill_ids", (5, 1), r"expected the shape \[tokens\], got \[5, 1\]"),
        ("fill_ids", (), r"expected the shape \[tokens\], got \[\]"),
        ("mrope_positions", (5, 3), r"expected the shape \[3, tokens\], got \[5, 3\]"),
        ("mrope_positions", (3,), r"expected the shape \[3, tokens\], got \[3\]"),
    ],
)
def test_a_wrong_shape_is_named(pair: Pair, name: str, shape: tuple[int, ...], text: str) -> None:
    tensors = payload(pair.pool.config.fields, 5)
    tensors[name] = tensors[name].new_zeros(shape)
    with pytest.raises(ValueError, match=f"{name}: {text}"):
        pair.embedding.send(ROOM, tensors)


def test_fields_of_different_lengths_are_named(pair: Pair) -> None:
    tensors = payload(pair.pool.config.fields, 5)
    tensors["fill_ids"] = tensors["fill_ids"][:4]
    with pytest.raises(ValueError, match=r"the same number of tokens in every field, got .*4"):
        pair.embedding.send(ROOM, tensors)


def test_no_tokens_at_all_are_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match="expected at least one token, got 0"):
        pair.embedding.send(ROOM, payload(pair.pool.config.fields, 0))


@pytest.mark.parametrize("delta", [1 << 31, -(1 << 31) - 1])
def test_a_delta_that_aux_cannot_hold_is_refused(pair: Pair, delta: int) -> None:
    tensors = payload(pair.pool.config.fields, 5)
    with pytest.raises(ValueError, match="mrope_position_delta: expected an int32"):
        pair.embedding.send(ROOM, tensors, mrope_position_delta=delta)


@pytest.mark.parametrize("room", [-1, 1 << 64])
def test_a_room_is_a_number_of_64_bits(pair: Pair, room: int) -> None:
    with pytest.raises(ValueError, match=r"room: expected 0 to 2\*\*64 - 1"):
        pair.language.receive(room)
    assert_nothing_held(pair.pool)


def test_a_room_is_open_once_on_each_side(pair: Pair) -> None:
    receiver = pair.language.receive(ROOM)
    with pytest.raises(ValueError, match=f"room {ROOM}: is open already .WaitingForInput.; end it"):
        pair.language.receive(ROOM)
    tensors = payload(pair.pool.config.fields, 5)
    sender = pair.embedding.send(ROOM + 1, tensors)
    with pytest.raises(ValueError, match=f"room {ROOM + 1}: is open already .Bootstrapping."):
        pair.embedding.send(ROOM + 1, tensors)
    receiver.abort()
    sender.abort()


def test_an_unknown_mode_is_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match="mode: expected one of landing, push, got 'pull'"):
        pair.language.receive(ROOM, "pull")  # type: ignore[arg-type]


def test_a_pool_without_fields_has_nothing_to_transfer(pool_name: str) -> None:
    one: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with (
        BlockPool.create(pool_name, config(fields=()), prefault="off") as pool,
        pytest.raises(ValueError, match="expected at least one field to transfer"),
    ):
        LanguageEndpoint(pool, one, one)
