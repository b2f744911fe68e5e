"""The handle: small, exact, and made of bytes that nobody has to trust."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shmblocks import BlockHandle, MalformedHandleError
from shmblocks.handle import MAX_ENCODED_BYTES

LARGEST_32 = 2**32 - 1
LARGEST_64 = 2**64 - 1

handles = st.builds(
    BlockHandle,
    st.integers(0, LARGEST_32),
    st.integers(0, LARGEST_32),
    st.integers(0, LARGEST_64),
    st.integers(0, LARGEST_64),
    st.integers(0, LARGEST_64),
)
LARGEST = BlockHandle(LARGEST_32, LARGEST_32, LARGEST_64, LARGEST_64, LARGEST_64)
SOME = BlockHandle(8, 16, 2000, 77, 2**63 + 5)


@given(handles)
@example(LARGEST)
@example(BlockHandle(0, 0, 0, 0, 0))
def test_a_handle_comes_back_equal_from_at_most_forty_bytes(handle: BlockHandle) -> None:
    encoded = handle.encode()
    assert len(encoded) <= MAX_ENCODED_BYTES == 40
    assert BlockHandle.decode(encoded) == handle
    assert BlockHandle.decode(bytearray(encoded)) == handle
    assert BlockHandle.decode(memoryview(encoded)) == handle


@given(st.binary(max_size=60))
@example(b"")
@example(b"\x95")
@example(b"\x91" * 40)  # nested forty deep
@example(b"\xc1")
@example(b"\x95\x01\x01\x01\x01\xff")  # a negative number
@example(b"\x95\x01\x01\x01\x01\xcb?\xf0\0\0\0\0\0\0")  # 1.0
@example(b"\x96\x01\x01\x01\x01\x01\x01")  # one element too many
@example(b"\xa5hello")
@example(b"\xa5\xff\xff\xff\xff\xff")  # not UTF-8
@example(b"\xdd\xff\xff\xff\xff")  # an array of four billion elements
@example(b"\x95\xce\0\0\0\x01\x01\x01\x01\x01")  # a number longer than it had to be
def test_any_bytes_are_a_handle_that_round_trips_or_malformed(data: bytes) -> None:
    require_sound(data)


@given(handles, st.data())
def test_a_mutated_handle_is_a_handle_that_round_trips_or_malformed(
    handle: BlockHandle, data: st.DataObject
) -> None:
    encoded = bytearray(handle.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(encoded)))
    require_sound(bytes(encoded))
    require_sound(bytes(encoded[:cut]))
    require_sound(bytes(encoded) + b"\0")


def require_sound(data: bytes) -> None:
    try:
        handle = BlockHandle.decode(data)
    except MalformedHandleError:
        return
    assert BlockHandle.decode(handle.encode()) == handle
    assert all(type(number) is int and number >= 0 for number in numbers(handle))


def numbers(handle: BlockHandle) -> tuple[int, int, int, int, int]:
    return (
        handle.start_block,
        handle.num_blocks,
        handle.num_tokens,
        handle.generation,
        handle.pool_id,
    )


def test_bytes_that_are_too_long_are_told_without_being_looked_at() -> None:
    with pytest.raises(MalformedHandleError, match="at most 40 bytes, got 1000000 bytes"):
        BlockHandle.decode(bytes(1_000_000))


def test_bytes_after_the_handle_are_not_overlooked() -> None:
    with pytest.raises(MalformedHandleError, match=r"expected the bytes of BlockHandle\.encode"):
        BlockHandle.decode(SOME.encode() + b"\x01")


def test_a_handle_is_a_value() -> None:
    twin = BlockHandle.decode(SOME.encode())
    assert twin == SOME
    assert twin is not SOME
    assert hash(twin) == hash(SOME)
    assert len({twin, SOME}) == 1
    with pytest.raises(AttributeError):
        twin.start_block = 3  # type: ignore[misc]


def test_only_a_handle_without_generation_is_fake() -> None:
    assert BlockHandle(0, 8, 1024, 0, 5).is_fake
    assert not SOME.is_fake
