"""Messages as bytes: what goes in comes out, and anything else is None."""

from __future__ import annotations

import select

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmblocks import BlockHandle
from shmblocks.transfer.messages import (
    MAX_MESSAGE_BYTES,
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
    short_reason,
)

BIG = (1 << 64) - 1
LONGEST = (1 << 31) - 1
FROM = SenderId((1 << 16) - 1, BIG)
HANDLE = BlockHandle(2**32 - 1, 2**32 - 1, BIG, BIG, BIG).encode()
MESSAGES: list[AnyMessage] = [
    Hello(FROM, BIG),
    Bye(FROM),
    Request(FROM, BIG, BIG, "landing", HANDLE),
    Request(FROM, 0, 1, "push", None),
    Chunk(FROM, BIG, BIG, LONGEST, HANDLE, LONGEST, LONGEST, LONGEST, LONGEST),
    Resume(FROM, BIG, BIG, LONGEST, HANDLE, LONGEST, LONGEST),
    Resume(FROM, 0, 1, 1, None, 0, 1),
    Starved(FROM, BIG, BIG, LONGEST, LONGEST),
    Done(FROM, BIG, BIG),
    Failed(FROM, BIG, BIG, "no blocks at the inn"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_comes_out_as_it_went_in(message: AnyMessage) -> None:
    data = encode(message)
    assert decode(data) == decode(bytearray(data)) == decode(memoryview(data)) == message
    assert len(data) <= 160, "a message is small: what is large is in the pool"


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_truncated_or_lengthened_message_is_none(message: AnyMessage) -> None:
    data = encode(message)
    assert all(decode(data[:length]) is None for length in range(len(data)))
    assert decode(data + b"\0") is None


@pytest.mark.parametrize(
    ("values", "what"),
    [
        (["chunk", [0, 1], 7, 1, 0, b"", 0, 0, 0, 5], "no tokens"),
        (["chunk", [0, 1], 7, 1, 0, b"", 0, 0, -1, 5], "negative tokens"),
        (["chunk", [0, 1], 7, 1, 0, b"", 0, 0, 1, 2**31], "more tokens than aux can tell"),
        (["chunk", [0, 1], 7, 1, 0, b"x" * 65, 0, 0, 1, 1], "no handle is so long"),
        (["chunk", [0, 1], 7, 1, 0, "text", 0, 0, 1, 1], "a handle is bytes"),
        (["chunk", [0, 1], 7, 1, 0, b"", 0, 0, 1, 1, 1], "one value too many"),
        (["chunk", [0, 1], -7, 1, 0, b"", 0, 0, 1, 1], "a negative room"),
        (["chunk", [2**16, 1], 7, 1, 0, b"", 0, 0, 1, 1], "no slot is so high"),
        (["request", [0, 1], 7, 1, "other", None], "no such mode"),
        (["resume", [0, 1], 7, 1, 0, None, 0, 1], "round 0 is asked for by a request"),
        (["failed", [0, 1], 7, 1, "x" * 2001], "too long a reason"),
        (["shout", [0, 1], 7, 1], "no such message"),
        (["done", [0, 1], 7, True], "a nonce is no bool"),
    ],
)
def test_a_value_out_of_range_makes_the_message_none(values: list[object], what: str) -> None:
    assert decode(msgspec.msgpack.encode(values)) is None, what


def test_a_message_that_is_too_long_is_not_even_decoded() -> None:
    assert decode(bytes(MAX_MESSAGE_BYTES + 1)) is None


def test_deeply_nested_bytes_are_none() -> None:
    assert decode(b"\x91" * MAX_MESSAGE_BYTES) is None


@given(st.binary(max_size=200))
def test_any_bytes_are_none_or_a_message_that_encodes_again(data: bytes) -> None:
    message = decode(data)
    assert message is None or decode(encode(message)) == message


@given(st.sampled_from(MESSAGES), st.data())
def test_any_changed_byte_gives_none_or_a_message_in_range(
    message: AnyMessage, data: st.DataObject
) -> None:
    encoded = bytearray(encode(message))
    index = data.draw(st.integers(0, len(encoded) - 1))
    encoded[index] = data.draw(st.integers(0, 255))
    changed = decode(encoded)
    assert changed is None or decode(encode(changed)) == changed


@given(st.text(st.characters(), max_size=3000))
def test_any_reason_can_be_sent(text: str) -> None:
    message = Failed(FROM, 1, 1, short_reason(text))
    assert decode(encode(message)) == message


def test_a_long_reason_is_cut_and_says_so() -> None:
    reason = short_reason("\U0001f600" * 5000)
    assert MAX_MESSAGE_BYTES < select.PIPE_BUF
    assert len(encode(Failed(FROM, BIG, BIG, reason))) <= MAX_MESSAGE_BYTES
    assert reason.endswith(" ...")
    assert short_reason("a path \udcff") == "a path ?"


@pytest.mark.parametrize("longest", [60, 61, 256, 1900])
def test_a_reason_is_cut_to_what_the_queue_takes(longest: int) -> None:
    failed = Failed(FROM, BIG, BIG, short_reason("\N{SNOWMAN}" * 2000))
    data = encode(failed, longest)
    cut = decode(data)
    assert longest - 4 <= len(data) <= longest
    assert isinstance(cut, Failed)
    assert cut.reason.endswith(" ...")
    assert failed.reason.startswith(cut.reason[:-4])
    short = Failed(FROM, 1, 1, "short")
    assert encode(short, longest) == encode(short)
