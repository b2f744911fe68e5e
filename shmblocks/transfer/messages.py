"""The messages that two endpoints exchange, and the only way to turn bytes into one.

A room of three rounds, landing (left: language, right: embedding):

    Hello     ---->                    both sides, when they are made
              <----  Hello
    Request   ---->                    round 0: "write into these blocks"
              <----  Chunk             round 0: 1024 of 2500 tokens are in them
    Resume    ---->                    round 1: "the next ones into these"
              <----  Chunk             round 1
    Resume    ---->                    round 2
              <----  Chunk             round 2: sent_tokens + num_tokens == total_tokens
    Done      ---->

With push, Request and Resume carry no handle, Chunk carries that of published blocks, and Starved
says that a chunk has to wait for blocks. Either side ends a room early with Failed, and all rooms
with Bye.

Every message names its sender (`origin`), so that a dead one can be told by name, and every message
of a room carries the nonce that the language side drew for this attempt, so that what comes late
from an earlier room of the same id is recognised.

Bytes from a queue are untrusted: `decode` gives a message whose every number is in its range, or
`None`. What it does not do: judge whether the message fits the room, or whether a handle is good.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

UInt64 = Annotated[int, msgspec.Meta(ge=0)]  # MessagePack has no integer above 2**64 - 1
# aux holds the total length in tokens as int32, so no transfer is longer.
Tokens = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
SomeTokens = Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
# The bytes of BlockHandle.encode(); they are decoded, and judged, where they are used.
HandleBytes = Annotated[bytes, msgspec.Meta(max_length=64)]
Reason = Annotated[str, msgspec.Meta(max_length=2000)]
Mode = Literal["landing", "push"]

MAX_REASON_BYTES = 2000
# Of one encoded message; the longest is a Failed. It must stay below PIPE_BUF (4096) with whatever
# a queue adds: what is shorter goes into a pipe whole or not at all, even if its writer is killed.
MAX_MESSAGE_BYTES = MAX_REASON_BYTES + 200


class Origin(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The participant that sent a message."""

    place: Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
    incarnation: UInt64


class Message(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=str.lower
):
    """What every message has."""

    origin: Origin


class Hello(Message, frozen=True):
    """An endpoint was made, on this pool; `spill_id`: and on that one, to spill to (0: none)."""

    pool_id: UInt64
    spill_id: UInt64 = 0


class Bye(Message, frozen=True):
    """An endpoint was closed; its rooms were told before."""


class RoomMessage(Message, frozen=True):
    """What every message of a room has. `nonce` 0: the sender knows none yet."""

    room: UInt64
    nonce: UInt64


class Request(RoomMessage, frozen=True):
    """Language: begin. `handle`: the landing blocks; None with push."""

    mode: Mode
    handle: HandleBytes | None


class Chunk(RoomMessage, frozen=True):
    """Embedding: tokens `sent_tokens .. sent_tokens + num_tokens - 1` of `total_tokens` are in the
    blocks of `handle`, from token `offset` of the handle on."""

    round: Tokens
    handle: HandleBytes
    offset: Tokens
    sent_tokens: Tokens
    num_tokens: SomeTokens
    total_tokens: SomeTokens


class Resume(RoomMessage, frozen=True):
    """Language: go on at `sent_tokens`. `handle`, `offset`: where to; None and 0 with push."""

    round: SomeTokens
    handle: HandleBytes | None
    offset: Tokens
    sent_tokens: SomeTokens


class Starved(RoomMessage, frozen=True):
    """Embedding: round `round` was asked for, and waits for so many free blocks."""

    round: Tokens
    num_blocks: SomeTokens


class Done(RoomMessage, frozen=True):
    """Language: everything arrived."""


class Failed(RoomMessage, frozen=True):
    """Either side: the room has ended, and why."""

    reason: Reason


AnyMessage = Hello | Bye | Request | Chunk | Resume | Starved | Done | Failed

_CUT = " ..."

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: AnyMessage, longest: int | None = None) -> bytes:
    """The bytes that cross the queue.

    `longest` is what the queue takes. All messages are short but for the reason of a Failed, which
    is cut to fit: a short reason is better than none.
    """
    data = _encoder.encode(message)
    if longest is None or len(data) <= longest or not isinstance(message, Failed):
        return data
    reason = message.reason.encode()
    cut = _cut(reason, len(reason) - (len(data) - longest))
    return _encoder.encode(msgspec.structs.replace(message, reason=cut))


def decode(data: bytes | bytearray | memoryview) -> AnyMessage | None:
    """The message in `data`, or None for any other bytes."""
    if len(data) > MAX_MESSAGE_BYTES:
        return None
    try:
        message: AnyMessage = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return message


def short_reason(text: str) -> str:
    """`text`, cut to what a Failed may carry."""
    # A lone surrogate (from a path, say) cannot be encoded; a reason is for reading, so replace it.
    return _cut(text.encode("utf-8", "replace"), MAX_REASON_BYTES)


def _cut(text: bytes, longest: int) -> str:
    """At most so many bytes of UTF-8, cut between characters."""
    if len(text) <= longest:
        return text.decode()
    return text[: max(0, longest - len(_CUT))].decode(errors="ignore") + _CUT
