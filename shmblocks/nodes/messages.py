"""The messages between two nodes: what they say, and the bytes of each.

    reader                                  server
              <----  Hello{version, nonce}
    Prove{nonce, mac}  ---->
              <----  Welcome{pools, mac}        or Refused, and the connection ends
    Find{rid, key, layout, epoch}  ---->
              <----  Found{rid, handle}         or Absent{rid, epoch}
    Fetch{rid, handle, first, num, checked}  ---->
              <----  Taken{rid, num_tokens, aux}, then the raw rows, field by field, then
                     Sent{rid, checksum}
    Done{rid, keep_claim}  ---->
    Fetch ...                                   the answer may also be Refused{rid, kind, reason}
    Ping{rid}  ---->
              <----  Ping{rid}

With NIXL the rows take another way, and the server says afterwards whether they count:

    Read{rid, handle, first, num}  ---->
              <----  Granted{rid, num_tokens, aux, patience_ms, metadata, addresses}
    StillReading{rid}  ---->                    again and again, while the reader's agent reads
    Commit{rid, checked}  ---->
              <----  Sent{rid, checksum}        then Done, as above

A frame is four bytes (little-endian length) and one MessagePack array of at most 4,096 bytes. Raw
rows have no frame: the reader knows from its own config and from what it asked for how many bytes
come, and takes no length from the wire.

Bytes from a socket are untrusted: `decode` gives a message whose every value is in its range, or
raises `MalformedMessageError`. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

import msgspec

from shmblocks.config import Field, PoolConfig
from shmblocks.errors import (
    AuthenticationError,
    ForeignHandleError,
    IncompatibleConfigError,
    InvalidStateError,
    MalformedHandleError,
    MalformedMessageError,
    PeerDiedError,
    PoolTimeoutError,
    ShmBlocksError,
    StaleHandleError,
    TooManyLeasesError,
)

VERSION = 1
LENGTH_BYTES = 4
# Smaller: fewer pools per server, shorter reasons. Larger: a stranger can make us hold more.
MAX_MESSAGE_BYTES = 4096
MAX_REASON_BYTES = 2000
# Pools of one server: all of them must fit into one Welcome.
MAX_POOLS = 8
NONCE_BYTES = 32
MAC_BYTES = 32
DIGEST_BYTES = 32
AUX_BYTES = 64
KEY_LENGTHS = (16, 32)
# Of a NIXL agent: where it can be reached and what it has registered. Its devices decide, and 300
# bytes are usual for one. Smaller: servers with many devices cannot offer NIXL.
MAX_METADATA_BYTES = 2500
# As many as a pool can have.
MAX_FIELDS = 64
# Letters of a pool's description in a Welcome; the digest decides, this is for the error's text.
DESCRIPTION_LETTERS = 160

# The kind of a Refused that is no error of the library: all connections are taken.
BUSY = "Busy"
# What a server says of a handle is the reader's error too. Anything else that goes wrong over there
# is, seen from here, the death of a peer.
_ERRORS: dict[str, type[ShmBlocksError]] = {
    error.__name__: error
    for error in (
        AuthenticationError,
        ForeignHandleError,
        IncompatibleConfigError,
        InvalidStateError,
        MalformedHandleError,
        PoolTimeoutError,
        StaleHandleError,
        TooManyLeasesError,
    )
}

UInt64 = Annotated[int, msgspec.Meta(ge=0)]  # MessagePack has no integer above 2**64 - 1
Tokens = Annotated[int, msgspec.Meta(ge=0, lt=1 << 44)]
SomeTokens = Annotated[int, msgspec.Meta(ge=1, lt=1 << 44)]
Nonce = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
Mac = Annotated[bytes, msgspec.Meta(min_length=MAC_BYTES, max_length=MAC_BYTES)]
Digest = Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
AuxBytes = Annotated[bytes, msgspec.Meta(min_length=AUX_BYTES, max_length=AUX_BYTES)]
# The bytes of BlockHandle.encode(); whoever gets them decodes and judges them.
HandleBytes = Annotated[bytes, msgspec.Meta(max_length=64)]
Key = Annotated[bytes, msgspec.Meta(max_length=32)]


class Message(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=str.lower
):
    """What every message is."""


class Hello(Message, frozen=True):
    """Server: who are you?"""

    version: UInt64
    nonce: Nonce


class Prove(Message, frozen=True):
    """Reader: I know the key. `mac` covers both nonces."""

    nonce: Nonce
    mac: Mac


class ServedPool(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One pool that a server serves.

    `layout` is a digest of what must be the same on both nodes: fields (names, shapes, dtypes,
    order) and block size. `description` says the same to people, cut to a few words.
    """

    pool_id: UInt64
    name: Annotated[str, msgspec.Meta(max_length=201)]
    layout: Digest
    description: Annotated[str, msgspec.Meta(max_length=DESCRIPTION_LETTERS)]


class Welcome(Message, frozen=True):
    """Server: I know the key too. `mac` covers both nonces and the pools."""

    pools: Annotated[tuple[ServedPool, ...], msgspec.Meta(max_length=MAX_POOLS)]
    mac: Mac


class Ping(Message, frozen=True):
    """Reader: are you there? Server: the same message back."""

    rid: UInt64


class Find(Message, frozen=True):
    """Reader: what have you published under this key, in a pool of my layout and epoch?"""

    rid: UInt64
    key: Key
    layout: Digest
    epoch: UInt64

    def __post_init__(self) -> None:
        if len(self.key) not in KEY_LENGTHS:
            raise ValueError(f"key: expected 16 or 32 bytes, got {len(self.key)}")


class Found(Message, frozen=True):
    """Server: this, a moment ago. Nothing is held; fetch it."""

    rid: UInt64
    handle: HandleBytes


class Absent(Message, frozen=True):
    """Server: nothing. `epoch`: of my pool of that layout; when it is another one than the
    reader's, nothing is looked up."""

    rid: UInt64
    epoch: UInt64


class Fetch(Message, frozen=True):
    """Reader: send me `num_tokens` tokens of the handle, from `first_token` on; `checked`: with
    their checksum."""

    rid: UInt64
    handle: HandleBytes
    first_token: Tokens
    num_tokens: SomeTokens
    checked: bool


class Taken(Message, frozen=True):
    """Server: I hold a lease on it, and send the rows now."""

    rid: UInt64
    num_tokens: SomeTokens
    aux: AuxBytes


class Read(Message, frozen=True):
    """Reader: let my NIXL agent read `num_tokens` tokens of the handle, from `first_token` on."""

    rid: UInt64
    handle: HandleBytes
    first_token: Tokens
    num_tokens: SomeTokens


class Granted(Message, frozen=True):
    """Server: I hold a lease on it, and my agent lets yours read.

    `addresses`: where the rows of each field begin, in the memory of my agent. `patience_ms`: I
    give the lease back when I hear nothing for so long.
    """

    rid: UInt64
    num_tokens: SomeTokens
    aux: AuxBytes
    patience_ms: UInt64
    metadata: Annotated[bytes, msgspec.Meta(max_length=MAX_METADATA_BYTES)]
    addresses: Annotated[tuple[UInt64, ...], msgspec.Meta(max_length=MAX_FIELDS)]


class StillReading(Message, frozen=True):
    """Reader: my agent still reads. Nothing is answered."""

    rid: UInt64


class Commit(Message, frozen=True):
    """Reader: my agent has read all of it. Was your lease open until now? `checked`: and what is
    the checksum?"""

    rid: UInt64
    checked: bool


class Sent(Message, frozen=True):
    """Server: those were the rows, and my lease was open until the last byte had left.

    `checksum`: of what was asked for, aux and rows (`rows.Checksum`); 0 when it was not asked for.
    """

    rid: UInt64
    checksum: UInt64


class Done(Message, frozen=True):
    """Reader: I have it. `keep_claim`: more of it is to be fetched, so my claim is not used up."""

    rid: UInt64
    keep_claim: bool


class Refused(Message, frozen=True):
    """Server: no. `kind` is the name of an error class, or `BUSY`; `rid` 0: in the handshake."""

    rid: UInt64
    kind: Annotated[str, msgspec.Meta(max_length=64)]
    reason: Annotated[str, msgspec.Meta(max_length=MAX_REASON_BYTES)]


AnyMessage = (
    Hello
    | Prove
    | Welcome
    | Ping
    | Find
    | Found
    | Absent
    | Fetch
    | Taken
    | Read
    | Granted
    | StillReading
    | Commit
    | Sent
    | Done
    | Refused
)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: Message) -> bytes:
    """The frame of a message."""
    data = _encoder.encode(message)
    return len(data).to_bytes(LENGTH_BYTES, "little") + data


def frame_length(header: bytes | bytearray) -> int:
    """The length that a frame announces; `MalformedMessageError` when no message has it."""
    length = int.from_bytes(header, "little")
    if not 0 < length <= MAX_MESSAGE_BYTES:
        raise MalformedMessageError(
            f"expected a message of 1 to {MAX_MESSAGE_BYTES} bytes, its frame says {length}"
        )
    return length


def decode(data: bytes | bytearray, expected: tuple[type[Message], ...]) -> Message:
    """The message in `data`, one of the expected; `MalformedMessageError` for anything else."""
    try:
        message: Message = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessageError(f"bytes that are not a message of a node: {error}") from error
    if not isinstance(message, expected):
        names = " or ".join(kind.__name__ for kind in expected)
        raise MalformedMessageError(f"expected {names}, got {type(message).__name__}")
    return message


def refusal(rid: int, error: ShmBlocksError) -> Refused:
    """How a server says that an error stopped it."""
    return refused(rid, type(error).__name__, str(error))


def refused(rid: int, kind: str, reason: str) -> Refused:
    """A `Refused` whose reason is cut to what one may carry."""
    # A lone surrogate (from a path, say) cannot be encoded; a reason is for reading, so replace it.
    cut = reason.encode("utf-8", "replace")[:MAX_REASON_BYTES].decode(errors="ignore")
    return Refused(rid, kind, cut)


def error_of(answer: Refused, what: str) -> ShmBlocksError:
    """The error that a reader raises for a refusal; `what` begins its text."""
    return _ERRORS.get(answer.kind, PeerDiedError)(f"{what}: {answer.reason}")


# ---- layouts -------------------------------------------------------------------------------------


def served(config: PoolConfig, pool_id: int, name: str) -> ServedPool:
    """What a server says of one of its pools."""
    return ServedPool(pool_id, name, layout_of(config), describe_layout(config))


def layout_of(config: PoolConfig) -> bytes:
    """The digest of what must be the same in two pools that exchange rows."""
    return hashlib.sha256(msgspec.msgpack.encode((config.block_size, config.fields))).digest()


def describe_layout(config: PoolConfig) -> str:
    """`blocks of 128 tokens; input_embeddings bf16[3584], fill_ids int32[]`, cut when long."""
    fields = ", ".join(map(_describe_field, config.fields))
    text = f"blocks of {config.block_size} tokens; {fields or 'no fields'}"
    if len(text) <= DESCRIPTION_LETTERS:
        return text
    return text[: DESCRIPTION_LETTERS - 4] + " ..."


def _describe_field(field: Field) -> str:
    shape = ",".join(map(str, field.shape))
    return f"{field.name} {field.dtype}[{shape}]{' transposed' if field.transposed else ''}"
