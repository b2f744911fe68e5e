"""What a config refuses, and that what it accepts survives the header of a segment."""

from __future__ import annotations

import math
import re
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shmblocks import BlockPool, Field, PoolConfig, multimodal_fields
from shmblocks.config import (
    BLOCK_SIZE_ENV,
    DEFAULT_BLOCKS_ENV,
    DTYPES,
    MAX_BLOCK_SIZE,
    MAX_BLOCKS,
    MAX_CHANNEL_SLOTS,
    MAX_CHANNELS,
    MAX_CLAIMS,
    MAX_LEASES,
    MAX_PARTICIPANTS,
    MAX_TOKEN_BYTES,
    MAX_WAITERS,
    dtype_name,
)
from tests.core import pools

ITEM_BYTES = {
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "bf16": 2,
    "fp16": 2,
    "fp32": 4,
    "fp64": 8,
    "fp8_e4m3": 1,
    "fp8_e5m2": 1,
    "fp8_e4m3fnuz": 1,
    "fp8_e5m2fnuz": 1,
    "fp8_e8m0fnu": 1,
    "complex64": 8,
    "complex128": 16,
    "bool": 1,
}


# --- fields -----------------------------------------------------------------------------------


def test_every_promised_dtype_has_its_size() -> None:
    assert {name: size for name, (size, _) in DTYPES.items()} == ITEM_BYTES


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_a_token_takes_its_elements_times_their_size(dtype: str) -> None:
    assert Field("x", (), dtype).token_bytes == ITEM_BYTES[dtype]
    assert Field("x", (3, 5), dtype).token_bytes == 15 * ITEM_BYTES[dtype]


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_a_dtype_is_known_by_its_short_name_and_by_torchs(dtype: str) -> None:
    torch_name = DTYPES[dtype][1]
    assert dtype_name(dtype) == dtype_name(torch_name) == dtype_name(f"torch.{torch_name}") == dtype


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_every_dtype_is_one_of_torchs_and_of_its_size(dtype: str) -> None:
    torch_name = DTYPES[dtype][1]
    if not hasattr(torch, torch_name):
        pytest.skip(f"torch {torch.__version__} has no {torch_name}")
    assert getattr(torch, torch_name).itemsize == ITEM_BYTES[dtype]
    assert dtype_name(getattr(torch, torch_name)) == dtype


@pytest.mark.parametrize("name", ["", "a b", "1st", "a-b", "x" * 65])
def test_a_field_name_must_be_a_short_identifier(name: str) -> None:
    with pytest.raises(ValueError, match="field name: expected an identifier"):
        Field(name)


@pytest.mark.parametrize("dtype", ["", "float128", "qint8", "BF16"])
def test_a_dtype_that_no_pool_holds_is_refused_with_the_list(dtype: str) -> None:
    with pytest.raises(ValueError, match=r"dtype.*expected one of uint8, .*bool, got") as caught:
        Field("x", (), dtype)
    assert repr(dtype) in str(caught.value)
    with pytest.raises(ValueError, match="dtype: expected one of"):
        Field.of("x", (), dtype)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (-1,), (1,) * 9])
def test_a_shape_has_up_to_eight_sizes_of_at_least_one(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected up to 8 sizes of at least 1"):
        Field("x", shape)


def test_a_token_has_an_upper_size() -> None:
    assert Field("x", (MAX_TOKEN_BYTES,), "int8").token_bytes == MAX_TOKEN_BYTES
    with pytest.raises(ValueError, match="bytes per token are more than"):
        Field("x", (MAX_TOKEN_BYTES + 1,), "int8")


@pytest.mark.parametrize("shape", [(), (3, 2)])
def test_only_a_field_of_one_dimension_can_be_transposed(shape: tuple[int, ...]) -> None:
    assert Field("x", (3,), transposed=True).transposed
    with pytest.raises(ValueError, match="only a field of one dimension"):
        Field("x", shape, transposed=True)


def test_the_usual_fields_are_those_of_a_multimodal_model() -> None:
    assert multimodal_fields(3584) == (
        Field("input_embeddings", (3584,), "bf16"),
        Field("fill_ids", (), "int32"),
        Field("mrope_positions", (3,), "int32", transposed=True),
    )


def test_deepstack_comes_when_the_model_has_it_and_mrope_goes_when_it_has_not() -> None:
    assert multimodal_fields(64, num_deepstack=3, mrope=False, dtype="fp16") == (
        Field("input_embeddings", (64,), "fp16"),
        Field("fill_ids", (), "int32"),
        Field("deepstack_embeddings", (192,), "fp16"),
    )


# --- the pool's config ------------------------------------------------------------------------


class Wrong(msgspec.Struct, frozen=True):
    """A change to a right config, and what must be said of it."""

    change: dict[str, object]
    said: str


WRONG = [
    Wrong({"total_tokens": 0}, "total_tokens: expected a multiple of block_size (4), got 0"),
    Wrong({"total_tokens": -4}, "total_tokens: expected a multiple of block_size (4), got -4"),
    Wrong({"total_tokens": 9}, "total_tokens: expected a multiple of block_size (4), got 9"),
    Wrong({"total_tokens": (MAX_BLOCKS + 1) * 4}, "total_tokens / block_size: expected 1 to"),
    Wrong({"block_size": 0}, "block_size: expected 1 to"),
    Wrong({"block_size": MAX_BLOCK_SIZE + 1}, "block_size: expected 1 to"),
    Wrong({"default_num_blocks": 0}, "default_num_blocks: expected 1 to"),
    Wrong({"default_num_blocks": MAX_BLOCKS + 1}, "default_num_blocks: expected 1 to"),
    Wrong({"max_participants": 0}, "max_participants: expected 1 to"),
    Wrong({"max_participants": MAX_PARTICIPANTS + 1}, "max_participants: expected 1 to"),
    Wrong({"max_leases": 0}, "max_leases: expected 1 to"),
    Wrong({"max_leases": MAX_LEASES + 1}, "max_leases: expected 1 to"),
    Wrong({"max_waiters": 0}, "max_waiters: expected 1 to"),
    Wrong({"max_waiters": MAX_WAITERS + 1}, "max_waiters: expected 1 to"),
    Wrong({"channels": 0}, "channels: expected 1 to"),
    Wrong({"channels": MAX_CHANNELS + 1}, "channels: expected 1 to"),
    Wrong({"channel_slots": MAX_CHANNEL_SLOTS + 1}, "channel_slots: expected 1 to"),
    Wrong({"max_claims": -1}, "max_claims: expected 1 to"),
    Wrong({"max_claims": MAX_CLAIMS + 1}, "max_claims: expected 1 to"),
    Wrong({"unclaimed_timeout": 0.0}, "unclaimed_timeout: expected seconds"),
    Wrong({"unclaimed_timeout": math.inf}, "unclaimed_timeout: expected seconds"),
    Wrong({"unclaimed_timeout": 1e12}, "unclaimed_timeout: expected seconds"),
    Wrong({"lock_timeout": -1.0}, "lock_timeout: expected seconds"),
    Wrong({"lock_timeout": math.nan}, "lock_timeout: expected seconds"),
    Wrong({"fields": (Field("x"), Field("x"))}, "fields: expected up to 64 different names"),
    Wrong({"fields": (Field("aux"),)}, "fields: expected up to 64 different names"),
    Wrong({"fields": tuple(Field(f"x{n}") for n in range(65))}, "fields: expected up to 64"),
]


def right() -> dict[str, object]:
    return msgspec.structs.asdict(pools.tiny())


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: str(list(wrong.change.items()))[:40])
def test_a_config_that_no_pool_can_have_is_refused(wrong: Wrong) -> None:
    with pytest.raises(ValueError, match=re.escape(wrong.said)):
        msgspec.convert({**right(), **wrong.change}, PoolConfig)
    with pytest.raises(ValueError, match=re.escape(wrong.said)):
        PoolConfig(**{**right(), **wrong.change})  # type: ignore[arg-type]


def test_where_blocks_are_looked_for_is_one_of_two_words() -> None:
    assert PoolConfig(total_tokens=128, block_size=4).allocation == "next fit"
    config = PoolConfig(total_tokens=128, block_size=4, allocation="first fit")
    assert config.allocation == "first fit"
    with pytest.raises(
        ValueError, match="allocation: expected 'next fit' or 'first fit', got 'best"
    ):
        PoolConfig(total_tokens=128, block_size=4, allocation="best fit")  # type: ignore[arg-type]


def test_numpys_numbers_are_taken_and_kept_as_pythons(pool_name: str) -> None:
    """Found: they were accepted, and failed later inside msgspec."""
    config = PoolConfig(
        total_tokens=np.int64(64),
        block_size=np.uint16(4),
        fields=(Field("x", (np.int32(3),), "uint8"),),
        unclaimed_timeout=np.float32(7.5),
        lock_timeout=np.int64(3),
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=PoolConfig) == config
    assert type(config.total_tokens) is type(config.fields[0].shape[0]) is int
    assert type(config.lock_timeout) is float
    with BlockPool.create(pool_name, config, prefault="off") as pool:
        assert pool.config == config


def test_lists_are_taken_for_tuples() -> None:
    fields: Any = [Field("x", [2, 3])]  # type: ignore[arg-type]
    assert PoolConfig(total_tokens=128, fields=fields).fields == (Field("x", (2, 3)),)


@pytest.mark.parametrize(
    ("argument", "value", "said"),
    [
        ("total_tokens", "64", "expected a whole number, got str '64'"),
        ("total_tokens", 64.0, "expected a whole number, got float"),
        ("total_tokens", True, "expected a whole number, got bool"),
        ("max_leases", None, "expected a whole number, got NoneType"),
        ("lock_timeout", "3", "expected seconds, got str"),
        ("unclaimed_timeout", None, "expected seconds, got NoneType"),
        ("fields", Field("x"), "expected a tuple, got Field"),
        ("fields", ("x",), "expected Field, got str"),
        ("group", 0, "expected str, got int"),
        ("device", torch.device("cpu"), "expected str, got device"),
    ],
)
def test_a_wrong_type_in_a_config_is_told_with_the_argument(
    argument: str, value: object, said: str
) -> None:
    with pytest.raises(TypeError, match=f"^{argument}: {said}"):
        PoolConfig(**{**right(), argument: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((5,), "field name: expected str, got int"),
        (("x", 5), "shape of field x: expected a tuple, got int 5"),
        (("x", "35"), "shape of field x: expected a tuple, got str '35'"),
        (("x", (2.0,)), "shape of field x: expected a whole number, got float"),
        (("x", (), torch.bfloat16), "dtype of field x: expected a name such as 'bf16', got dtype"),
        (("x", (3,), "bf16", 1), "transposed of field x: expected bool, got int"),
    ],
)
def test_a_wrong_type_in_a_field_is_told_with_the_argument(
    arguments: tuple[Any, ...], said: str
) -> None:
    with pytest.raises(TypeError, match=f"^{said}"):
        Field(*arguments)


def test_an_unclaimed_timeout_that_is_accepted_can_be_published_with(pool_name: str) -> None:
    # It once overflowed a word of the record: everything up to the bound must fit.
    config = pools.tiny(unclaimed_timeout=1e9)
    with pools.create(pool_name, config) as pool:
        pool.free(pool.publish(pools.take(pool)))


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        pools.tiny().total_tokens = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("tokens", "blocks"), [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3), (64, 16)]
)
def test_tokens_take_the_blocks_that_hold_them(tokens: int, blocks: int) -> None:
    assert pools.tiny().blocks_for(tokens) == blocks


def test_the_environment_sets_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BLOCK_SIZE_ENV, raising=False)
    monkeypatch.delenv(DEFAULT_BLOCKS_ENV, raising=False)
    plain = PoolConfig(total_tokens=8192)
    assert (plain.block_size, plain.default_num_blocks) == (128, 8)
    monkeypatch.setenv("SGLANG_MULTIMODAL_BLOCK_SIZE", "64")
    monkeypatch.setenv("SGLANG_DEFAULT_MULTIMODAL_BLOCKS", "16")
    told = PoolConfig(total_tokens=8192)
    assert (told.block_size, told.default_num_blocks, told.total_blocks) == (64, 16, 128)


@pytest.mark.parametrize("variable", [BLOCK_SIZE_ENV, DEFAULT_BLOCKS_ENV])
@pytest.mark.parametrize("text", ["x", "-1", "0", "1.5", "٣"])
def test_a_default_from_the_environment_that_is_no_number_is_told_with_its_name(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(ValueError, match=f"environment variable {variable}: expected a whole"):
        PoolConfig(total_tokens=8192)


# --- through the header -----------------------------------------------------------------------

names = st.text("abcxyz_", min_size=1, max_size=8)
fields = st.builds(
    Field,
    names,
    # 9**7 items of 8 bytes are less than a token may have.
    st.lists(st.integers(1, 9), max_size=7).map(tuple),
    st.sampled_from(sorted(ITEM_BYTES)),
)


@st.composite
def configs(draw: st.DrawFn) -> PoolConfig:
    block_size = draw(st.integers(1, 300))
    return PoolConfig(
        total_tokens=block_size * draw(st.integers(1, 1000)),
        block_size=block_size,
        fields=tuple(draw(st.lists(fields, max_size=6, unique_by=lambda field: field.name))),
        default_num_blocks=draw(st.integers(1, 99)),
        max_participants=draw(st.integers(1, 99)),
        max_leases=draw(st.integers(1, 99)),
        max_waiters=draw(st.integers(1, 99)),
        channels=draw(st.integers(1, 99)),
        channel_slots=draw(st.integers(1, 99)),
        max_claims=draw(st.integers(1, 99)),
        allocation=draw(st.sampled_from(["next fit", "first fit"])),
        unclaimed_timeout=draw(st.floats(1e-3, 1e6)),
        lock_timeout=draw(st.floats(1e-3, 1e6)),
        group=draw(st.none() | names),
    )


@given(configs())
def test_a_config_survives_encoding(config: PoolConfig) -> None:
    encoded = msgspec.msgpack.encode(config)
    assert msgspec.msgpack.decode(encoded, type=PoolConfig) == config


def test_an_attacher_has_the_creators_config(pool_name: str) -> None:
    config = pools.tiny(fields=multimodal_fields(8, num_deepstack=2), unclaimed_timeout=7.5)
    with pools.create(pool_name, config), pools.attach(pool_name) as pool:
        assert pool.config == config


def test_a_config_that_does_not_fit_the_header_is_refused_and_leaves_nothing(
    pool_name: str,
) -> None:
    # Letters of four bytes each: 64 names of 64 letters are as long as the rules allow.
    long_names = tuple(Field("𠀀" * 62 + f"{n:02}") for n in range(64))
    config = msgspec.structs.replace(pools.tiny(), fields=long_names)
    with pytest.raises(ValueError, match=r"config: expected at most 16376 bytes when encoded"):
        BlockPool.create(pool_name, config)
    with pools.create(pool_name) as pool:
        assert pool.check() == []
