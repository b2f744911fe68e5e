"""What this process and its agent process (`agent_process.py`) say to each other.

    this process                       agent process
    Setup{agent, name, regions}  ---->
              <----  Ready{metadata, addresses}     or Ended{0, problem}, and its end
    Begin{number, metadata, rows}  ---->            any number of them at a time
              <----  Ended{number, problem, was_begun}   no problem: all rows are here

One datagram of a socket pair (SOCK_SEQPACKET) each, so that borders need no framing. When either
end closes it, or dies, the other one ends.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

# Of one message. The largest is a Begin: metadata of a server and one entry per field.
MAX_BYTES = 16384

T = TypeVar("T")


class Region(msgspec.Struct, frozen=True, array_like=True):
    """`size` bytes from byte `start` of an inherited descriptor's file: the fields of one pool."""

    fd: int
    start: int
    size: int
    is_writable: bool


class Setup(msgspec.Struct, frozen=True, array_like=True):
    """Map these, and make an agent of that class (`module:Class`) and name."""

    agent: str
    name: str
    regions: tuple[Region, ...]


class Rows(msgspec.Struct, frozen=True, array_like=True):
    """`size` bytes: to byte `offset` of the first region, from `address` of the other agent."""

    offset: int
    address: int
    size: int


class Begin(msgspec.Struct, frozen=True, array_like=True):
    """Read rows of the agent that has this metadata."""

    number: int
    metadata: bytes
    rows: tuple[Rows, ...]


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The agent is there; `addresses`: where each region lies in its memory."""

    metadata: bytes
    addresses: tuple[int, ...]


class Ended(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A read is over. `problem` empty: all rows are here, and nothing more comes. Else something
    may come until the agent process has ended. Number 0: there is no agent.

    `was_begun` False: the agent did not even begin, as one whose connection was lost before.
    """

    number: int
    problem: str
    was_begun: bool = True


_encoder = msgspec.msgpack.Encoder()


def pack(message: Setup | Begin | Ready | Ended) -> bytes:
    """The datagram of a message."""
    return _encoder.encode(message)


def unpack(data: bytes, kind: type[T]) -> T:
    """The message in a datagram. Raises msgspec.DecodeError for any other bytes."""
    return msgspec.msgpack.decode(data, type=kind)


def unpack_answer(data: bytes) -> Ready | Ended:
    """What an agent process says."""
    answer: Ready | Ended = _answers.decode(data)
    return answer


_answers = msgspec.msgpack.Decoder(Ready | Ended)
