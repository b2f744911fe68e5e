"""What carries a handle (or a name) of some 30 bytes from producer to consumer.

Links that move their payload by mapping use one of these, all of them the same one, so that the
numbers compare what the links do and not the queues beside them. Every channel is a function
that makes both ends; another queue is another function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from benchmarks.link import Context
from benchmarks.links.buffers import unique_name
from shmblocks import HandleQueue


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


class QueueEnd:
    """One end of a `HandleQueue` of bytes. It crosses a spawn: the other process attaches."""

    def __init__(self, queue: HandleQueue[bytes]) -> None:
        self._queue = queue

    def send_bytes(self, data: bytes) -> None:
        self._queue.put(data)

    def recv_bytes(self) -> bytes:
        return self._queue.get()

    def close(self) -> None:
        self._queue.close()


def handle_queue(spins: bool, context: Context) -> tuple[ChannelIn, ChannelOut]:
    """`HandleQueue`; the consumer spins for a while before it sleeps, or sleeps at once."""
    name = unique_name("queue")
    queue = HandleQueue.create(name) if spins else HandleQueue.create(name, spin=0)
    return QueueEnd(queue), QueueEnd(queue)
