"""The messages that two endpoints exchange, and the only way to turn bytes into one.

A room of three rounds with landing (left: language side, right: embedding side):

    Hello     ---->                    both sides, when they are made
              <----  Hello
    Request   ---->                    round 0: "write into these blocks"
              <----  Chunk             round 0: 1024 of 2500 tokens are in them
    Resume    ---->                    round 1: "write the next tokens into these"
              <----  Chunk             round 1
    Resume    ---->                    round 2
              <----  Chunk             round 2: sent_tokens + num_tokens == total_tokens
    Done      ---->

With push, Request and Resume carry no handle, Chunk carries the handle of published blocks, and
Starved says that a chunk has to wait for free blocks. Failed ends one room early, Bye all rooms;
either side may send them.

Every message names its sender, so that an endpoint can tell by name which process died. Every
message of a room carries a nonce, which the language side draws for each attempt. It tells late
messages of an earlier room of the same number from those of the present one.

Bytes from a queue are untrusted: `decode` gives a message whose every number is in its range, or
`None`. What it does not do: check that the message fits the room, or that a handle is valid.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import msgspec

from shmblocks import BlockHandle, ParticipantId

UInt64 = Annotated[int, msgspec.Meta(ge=0)]  # MessagePack has no integer above 2**64 - 1
# aux[0] holds the total length in tokens as an int32, so no transfer is longer.
Tokens = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
SomeTokens = Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
# BlockHandle.encode(); whoever uses the handle decodes and checks it.
HandleBytes = Annotated[bytes, msgspec.Meta(max_length=64)]
Reason = Annotated[str, msgspec.Meta(max_length=2000)]
Mode = Literal["landing", "push"]

MAX_REASON_BYTES = 2000
# Bytes of one encoded message; the longest is a Failed. Together with what a queue adds it must
# stay below PIPE_BUF (4096): a pipe takes such a message as a whole or not at all, even when its
# writer is killed.
MAX_MESSAGE_BYTES = MAX_REASON_BYTES + 200


class Grant(NamedTuple):
    """Where the next chunk may go: into these blocks, from token `offset` on. Push: no handle."""

    handle: BlockHandle | None
    offset: int

    @classmethod
    def decode(cls, handle: bytes | None, offset: int = 0) -> Grant:
        """The grant of a Request or Resume; MalformedHandleError for a bad handle."""
        return cls(None if handle is None else BlockHandle.decode(handle), offset)

    @property
    def handle_bytes(self) -> bytes | None:
        """The handle as messages carry it."""
        return None if self.handle is None else self.handle.encode()


class SenderId(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The participant that sent a message."""

    slot: Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
    incarnation: UInt64

    @property
    def participant(self) -> ParticipantId:
        """The same, as the pool names it."""
        return ParticipantId(self.slot, self.incarnation)


class Message(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=str.lower
):
    """What every message has."""

    sender: SenderId


class Hello(Message, frozen=True):
    """An endpoint was made on the pool `pool_id`, with the spill pool `spill_id` (0: none)."""

    pool_id: UInt64
    spill_id: UInt64 = 0


class Bye(Message, frozen=True):
    """An endpoint was closed, after it had failed its rooms."""


class RoomMessage(Message, frozen=True):
    """What every message of a room has. `nonce` 0: the sender does not know it yet."""

    room: UInt64
    nonce: UInt64


class Request(RoomMessage, frozen=True):
    """Language: begin. `handle`: the landing blocks; None with push."""

    mode: Mode
    handle: HandleBytes | None


class Chunk(RoomMessage, frozen=True):
    """Embedding: tokens `sent_tokens .. sent_tokens + num_tokens - 1` of `total_tokens` are in the
    blocks of `handle`, from token `offset` of these blocks on."""

    round: Tokens
    handle: HandleBytes
    offset: Tokens
    sent_tokens: Tokens
    num_tokens: SomeTokens
    total_tokens: SomeTokens


class Resume(RoomMessage, frozen=True):
    """Language: send round `round`, from token `sent_tokens` on, to `handle` and `offset`.

    With push: None and 0.
    """

    round: SomeTokens
    handle: HandleBytes | None
    offset: Tokens
    sent_tokens: SomeTokens


class Starved(RoomMessage, frozen=True):
    """Embedding: the chunk of round `round` waits for `num_blocks` free blocks."""

    round: Tokens
    num_blocks: SomeTokens


class Done(RoomMessage, frozen=True):
    """Language: everything arrived."""


class Failed(RoomMessage, frozen=True):
    """Either side: the room has failed, and why."""

    reason: Reason


AnyMessage = Hello | Bye | Request | Chunk | Resume | Starved | Done | Failed

_CUT = " ..."
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: AnyMessage, limit: int | None = None) -> bytes:
    """The bytes that cross the queue, which takes at most `limit` of them (None: any number).

    Only a Failed can be too long: its reason is cut to fit.
    """
    data = _encoder.encode(message)
    if limit is None or len(data) <= limit or not isinstance(message, Failed):
        return data
    reason = message.reason.encode()
    cut = _cut(reason, len(reason) - (len(data) - limit))
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
    # UTF-8 cannot encode a lone surrogate (from a path, say): replace it, people read the reason.
    return _cut(text.encode("utf-8", "replace"), MAX_REASON_BYTES)


def _cut(text: bytes, limit: int) -> str:
    """At most `limit` bytes of UTF-8, cut between characters."""
    if len(text) <= limit:
        return text.decode()
    return text[: max(0, limit - len(_CUT))].decode(errors="ignore") + _CUT
