"""shmblocks: a payload in a pool, its handle through a queue or a pipe.

- *in place*: the producer allocates, its data is written to the pool's memory (by the encoder:
  not timed), then publish, encode, send.
- *with copy*: the data lies in a tensor of the producer's own; allocate, copy, publish, encode,
  send.

The consumer's side is the same: receive, decode, open, view; release when it has read.

It calls only what every version of shmblocks has: `scripts/bench --against` measures others too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Protocol

from torch import Tensor

from benchmarks.settings import REHEARSAL_TOKENS, Settings
from benchmarks.transport import (
    PATIENCE,
    Context,
    Ends,
    Incoming,
    Outgoing,
    Receiver,
    Sender,
    copying_sender,
    unique_name,
)
from shmblocks import BlockHandle, BlockPool, Field, HandleQueue, PoolConfig

FIELD = "input_embeddings"
BLOCK_SIZE = 128
# Handles that a queue can hold. More: a fast producer is further ahead of its consumers.
QUEUE_LENGTH = 8


# --- what carries a handle --------------------------------------------------------------------


class BytesOut(Protocol):
    def send_bytes(self, data: bytes, /) -> None: ...

    def close(self) -> None: ...


class BytesIn(Protocol):
    def recv_bytes(self) -> bytes: ...

    def close(self) -> None: ...


# Makes both ends of what carries some 30 bytes: the same for all who need one, so that the numbers
# compare the transports and not the queues beside them.
Carrier = Callable[[Context], tuple[BytesIn, BytesOut]]


def pipe(context: Context) -> tuple[BytesIn, BytesOut]:
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


def handle_queue(spins: bool, context: Context) -> tuple[BytesIn, BytesOut]:
    """`HandleQueue`; the consumer spins for a while before it sleeps, or sleeps at once."""
    name = unique_name("queue")
    if spins:
        queue = HandleQueue.create(name, QUEUE_LENGTH)
    else:
        queue = HandleQueue.create(name, QUEUE_LENGTH, spin=0)
    return QueueEnd(queue), QueueEnd(queue)


# --- the payload ------------------------------------------------------------------------------


def pool_config(settings: Settings) -> PoolConfig:
    """As many of the largest payloads as asked, and two rehearsals, so that next fit wraps well."""
    blocks = settings.depth * -(-settings.most_tokens // BLOCK_SIZE)
    blocks += 2 * -(-REHEARSAL_TOKENS // BLOCK_SIZE)
    return PoolConfig(
        total_tokens=blocks * BLOCK_SIZE,
        fields=(Field(FIELD, (settings.hidden,), "bf16"),),
        block_size=BLOCK_SIZE,
    )


def allocate(pool: BlockPool, tokens: int) -> BlockHandle:
    """At once if there is room, as in a handoff; else wait until the consumers released some."""
    handle = pool.alloc(tokens) or pool.alloc(tokens, timeout=PATIENCE)
    if handle is None:
        raise TimeoutError(f"no free blocks for {tokens} tokens: {pool.stats()}")
    return handle


def sender(name: str, carrier: BytesOut, hidden: int, in_place: bool) -> Sender:
    pool = BlockPool.attach(name, prefault="now", role="producer")

    def close() -> None:
        carrier.close()
        pool.close()

    def publish(handle: BlockHandle) -> None:
        carrier.send_bytes(pool.publish(handle).encode())

    def begin(tokens: int) -> Outgoing:
        handle = allocate(pool, tokens)
        return Outgoing(pool.view(handle)[FIELD], partial(publish, handle))

    def copy(payload: Tensor) -> None:
        handle = allocate(pool, len(payload))
        pool.view(handle)[FIELD].copy_(payload)
        publish(handle)

    return Sender(begin, close) if in_place else copying_sender(copy, close, hidden)


def receiver(name: str, carrier: BytesIn) -> Receiver:
    pool = BlockPool.attach(name, prefault="now", role="consumer")

    def close() -> None:
        carrier.close()
        pool.close()

    def receive() -> Incoming:
        lease = pool.open(BlockHandle.decode(carrier.recv_bytes()))
        return Incoming(lease[FIELD], lease.release)

    return Receiver(receive, close)


@contextmanager
def connect(
    in_place: bool, carrier: Carrier, context: Context, settings: Settings
) -> Iterator[Ends]:
    name = unique_name("in-place" if in_place else "copy")
    receive, send = carrier(context)
    with (
        closing(receive),
        closing(send),
        BlockPool.create(name, pool_config(settings), prefault="now"),
    ):
        yield Ends(
            partial(sender, name, send, settings.hidden, in_place),
            partial(receiver, name, receive),
        )
