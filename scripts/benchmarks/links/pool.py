"""shmblocks: a payload in a pool, its handle through a channel.

- *in place*: the producer allocates, its data is written to the pool's memory (by the encoder:
  not timed), then publish, encode, send.
- *with copy*: the data lies in a tensor of the producer's own; allocate, copy, publish, encode,
  send.

The consumer's side is the same: receive, decode, open, view; release when it has read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial

from torch import Tensor

from benchmarks.link import Context, Ends, Outgoing
from benchmarks.links.buffers import OwnBuffers, unique_name
from benchmarks.links.channel import Channel, ChannelIn, ChannelOut
from benchmarks.settings import REHEARSAL_TOKENS, Settings
from shmblocks import BlockHandle, BlockPool, Field, PoolConfig
from shmblocks.lease import Lease

FIELD = "input_embeddings"
BLOCK_SIZE = 128


class NoRoomError(Exception):
    """The pool is full, though only one message is ever on its way."""


def pool_config(settings: Settings) -> PoolConfig:
    """Room for two of the largest payloads and a rehearsal, so that next fit always wraps well."""
    blocks = 2 * -(-settings.most_tokens // BLOCK_SIZE) + 2 * -(-REHEARSAL_TOKENS // BLOCK_SIZE)
    return PoolConfig(
        total_tokens=blocks * BLOCK_SIZE,
        fields=(Field(FIELD, (settings.hidden,), "bf16"),),
        block_size=BLOCK_SIZE,
    )


def allocate(pool: BlockPool, tokens: int) -> BlockHandle:
    handle = pool.alloc(tokens)
    if handle is None:
        raise NoRoomError(f"no room for {tokens} tokens: {pool.stats()}")
    return handle


class InPlaceOut:
    """Reserved blocks, to be written to."""

    def __init__(self, pool: BlockPool, channel: ChannelOut, tokens: int) -> None:
        self._pool = pool
        self._channel = channel
        self._handle = allocate(pool, tokens)
        self.payload: Tensor = pool.view(self._handle)[FIELD]

    def send(self) -> None:
        self._channel.send_bytes(self._pool.publish(self._handle).encode())


class CopyOut:
    """A tensor of the producer's own, to be copied into blocks."""

    def __init__(self, pool: BlockPool, channel: ChannelOut, payload: Tensor) -> None:
        self._pool = pool
        self._channel = channel
        self.payload = payload

    def send(self) -> None:
        handle = allocate(self._pool, len(self.payload))
        self._pool.view(handle)[FIELD].copy_(self.payload)
        self._channel.send_bytes(self._pool.publish(handle).encode())


class PoolSender:
    """Attached to the pool; hands over in place, or with a copy."""

    def __init__(self, name: str, channel: ChannelOut, hidden: int, in_place: bool) -> None:
        self._pool = BlockPool.attach(name, prefault="now", role="producer")
        self._channel = channel
        self._own = OwnBuffers(hidden)
        self._in_place = in_place

    def begin(self, tokens: int) -> Outgoing:
        if self._in_place:
            return InPlaceOut(self._pool, self._channel, tokens)
        return CopyOut(self._pool, self._channel, self._own.get(tokens))

    def close(self) -> None:
        self._channel.close()
        self._pool.close()


class PoolIn:
    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self.tensor: Tensor | None = lease[FIELD]

    def release(self) -> None:
        self.tensor = None
        self._lease.release()


class PoolReceiver:
    def __init__(self, name: str, channel: ChannelIn) -> None:
        self._pool = BlockPool.attach(name, prefault="now", role="consumer")
        self._channel = channel

    def receive(self) -> PoolIn:
        return PoolIn(self._pool.open(BlockHandle.decode(self._channel.recv_bytes())))

    def close(self) -> None:
        self._channel.close()
        self._pool.close()


@contextmanager
def connect(
    in_place: bool, channel: Channel, context: Context, settings: Settings
) -> Iterator[Ends]:
    name = unique_name("in-place" if in_place else "copy")
    receive, send = channel(context)
    with (
        closing(receive),
        closing(send),
        BlockPool.create(name, pool_config(settings), prefault="now"),
    ):
        yield Ends(
            partial(PoolSender, name, send, settings.hidden, in_place),
            partial(PoolReceiver, name, receive),
        )
