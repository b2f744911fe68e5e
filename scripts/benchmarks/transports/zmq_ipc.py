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

from benchmarks.settings import Settings
from benchmarks.transport import Context, Ends, Incoming, Receiver, Sender, copying_sender

# The consumer only reads; a copy that torch could write to would be one more than pyzmq needs.
warnings.filterwarnings("ignore", message="The given buffer is not writable")

# On their way at most; without, a fast producer of large messages would fill the memory.
MESSAGES = 8


def sender(address: str, hidden: int, copy: bool) -> Sender:
    context = zmq.Context()
    socket = context.socket(zmq.PUSH)
    socket.sndhwm = MESSAGES
    socket.bind(address)

    def send(payload: Tensor) -> None:
        data: memoryview[int] = payload.view(torch.uint8).numpy().data
        if copy:
            socket.send(data, copy=True)
        else:
            socket.send(data, copy=False)

    return copying_sender(send, partial(close, context, socket), hidden)


def receiver(address: str, hidden: int, copy: bool) -> Receiver:
    context = zmq.Context()
    socket = context.socket(zmq.PULL)
    socket.connect(address)

    def receive() -> Incoming:
        data = socket.recv() if copy else socket.recv(copy=False).buffer
        return Incoming(torch.frombuffer(data, dtype=torch.bfloat16).view(-1, hidden))

    return Receiver(receive, partial(close, context, socket))


def close(context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes]) -> None:
    socket.close(linger=0)
    context.term()


@contextmanager
def connect(copy: bool, context: Context, settings: Settings) -> Iterator[Ends]:
    folder = tempfile.mkdtemp(prefix="bench-zmq-")
    address = f"ipc://{folder}/socket"
    try:
        yield Ends(
            partial(sender, address, settings.hidden, copy),
            partial(receiver, address, settings.hidden, copy),
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
