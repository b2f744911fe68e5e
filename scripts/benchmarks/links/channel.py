"""What carries a handle (or a name) of some 30 bytes from producer to consumer.

Links that move their payload by mapping use one of these, all of them the same one, so that the
numbers compare what the links do and not the queues beside them. Every channel is a function
that makes both ends; another queue is another function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from benchmarks.link import Context


class ChannelOut(Protocol):
    def send_bytes(self, data: bytes, /) -> None: ...

    def close(self) -> None: ...


class ChannelIn(Protocol):
    def recv_bytes(self) -> bytes: ...

    def close(self) -> None: ...


Channel = Callable[[Context], tuple[ChannelIn, ChannelOut]]


def pipe(context: Context) -> tuple[ChannelIn, ChannelOut]:
    """`multiprocessing.Pipe`: the shortest way of the standard library, and nothing is pickled."""
    return context.Pipe(duplex=False)
