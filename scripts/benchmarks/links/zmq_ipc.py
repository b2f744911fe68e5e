"""Peer: the payload's bytes through a pyzmq PUSH/PULL pair over an ipc:// socket.

With `copy`, pyzmq copies what is sent into a message of its own and what arrives into `bytes`.
Without, the message refers to the producer's tensor, and the consumer's tensor lies in the message
that arrived. The kernel copies both into the socket and out of it.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import zmq
from torch import Tensor

from benchmarks.link import Context, Ends
from benchmarks.links.buffers import Held, OwnBuffers
from benchmarks.settings import Settings

# The consumer only reads; a copy that torch could write to would be one more than pyzmq needs.
warnings.filterwarnings("ignore", message="The given buffer is not writable")

# On their way at most; without, a fast producer of large messages would fill the memory.
MESSAGES = 8


class BytesOut:
    def __init__(self, socket: zmq.Socket[bytes], payload: Tensor, copy: bool) -> None:
        self._socket = socket
        self._copy = copy
        self.payload = payload

    def send(self) -> None:
        data: memoryview[int] = self.payload.view(torch.uint8).numpy().data
        if self._copy:
            self._socket.send(data, copy=True)
        else:
            self._socket.send(data, copy=False)


class SocketSender:
    def __init__(self, address: str, hidden: int, copy: bool) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.sndhwm = MESSAGES
        self._socket.bind(address)
        self._own = OwnBuffers(hidden)
        self._copy = copy

    def begin(self, tokens: int) -> BytesOut:
        return BytesOut(self._socket, self._own.get(tokens), self._copy)

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()


class SocketReceiver:
    def __init__(self, address: str, hidden: int, copy: bool) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.connect(address)
        self._hidden = hidden
        self._copy = copy

    def receive(self) -> Held:
        data = self._socket.recv() if self._copy else self._socket.recv(copy=False).buffer
        values = torch.frombuffer(data, dtype=torch.bfloat16)
        return Held(values.view(-1, self._hidden))

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()


@contextmanager
def connect(copy: bool, context: Context, settings: Settings) -> Iterator[Ends]:
    folder = tempfile.mkdtemp(prefix="bench-zmq-")
    address = f"ipc://{folder}/socket"
    try:
        yield Ends(
            partial(SocketSender, address, settings.hidden, copy),
            partial(SocketReceiver, address, settings.hidden, copy),
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
