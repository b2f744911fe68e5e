"""Peer: one `multiprocessing.shared_memory.SharedMemory` object per message.

    producer: create, copy in, send name and size, close          consumer: attach, read,
                                                                  close, unlink (as clean-up)

The name goes through the same channel as a handle of shmblocks does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from multiprocessing.shared_memory import SharedMemory

import torch
from torch import Tensor

from benchmarks.link import Context, Ends
from benchmarks.links.buffers import OwnBuffers
from benchmarks.links.channel import Channel, ChannelIn, ChannelOut
from benchmarks.settings import Settings


class SegmentOut:
    def __init__(self, channel: ChannelOut, payload: Tensor) -> None:
        self._channel = channel
        self.payload = payload

    def send(self) -> None:
        segment = SharedMemory(create=True, size=self.payload.nbytes)
        copy = as_tensor(segment, self.payload.shape[1], len(self.payload))
        copy.copy_(self.payload)
        self._channel.send_bytes(f"{segment.name} {len(copy)}".encode())
        del copy  # the segment cannot be closed under it
        segment.close()


class SegmentIn:
    def __init__(self, segment: SharedMemory, tensor: Tensor) -> None:
        self._segment = segment
        self.tensor: Tensor | None = tensor

    def release(self) -> None:
        self.tensor = None  # the segment cannot be closed under it
        self._segment.close()
        self._segment.unlink()


class SegmentSender:
    def __init__(self, channel: ChannelOut, hidden: int) -> None:
        self._channel = channel
        self._own = OwnBuffers(hidden)

    def begin(self, tokens: int) -> SegmentOut:
        return SegmentOut(self._channel, self._own.get(tokens))

    def close(self) -> None:
        self._channel.close()


class SegmentReceiver:
    def __init__(self, channel: ChannelIn, hidden: int) -> None:
        self._channel = channel
        self._hidden = hidden

    def receive(self) -> SegmentIn:
        name, tokens = self._channel.recv_bytes().decode().split()
        segment = SharedMemory(name)
        return SegmentIn(segment, as_tensor(segment, self._hidden, int(tokens)))

    def close(self) -> None:
        self._channel.close()


def as_tensor(segment: SharedMemory, hidden: int, tokens: int) -> Tensor:
    """A view of the payload. The segment may be larger: its size is whole pages."""
    values = torch.frombuffer(segment.buf, dtype=torch.bfloat16, count=tokens * hidden)
    return values.view(tokens, hidden)


@contextmanager
def connect(channel: Channel, context: Context, settings: Settings) -> Iterator[Ends]:
    receive, send = channel(context)
    with closing(receive), closing(send):
        yield Ends(
            partial(SegmentSender, send, settings.hidden),
            partial(SegmentReceiver, receive, settings.hidden),
        )
