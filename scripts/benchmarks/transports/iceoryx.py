"""Peer: iceoryx2, publish-subscribe with an event to wake the subscriber.

- *in place*: the producer's data is written into a loaned sample, which is then sent.
- *with copy*: the data lies in a tensor of the producer's own and is copied into a loaned sample.

Samples are slices of bytes, of the largest payload's size at most; the subscriber sleeps in its
listener, as every consumer here sleeps until it is told, or polls.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import iceoryx2 as iox2
import torch
from torch import Tensor

from benchmarks.settings import REHEARSAL_TOKENS, Settings
from benchmarks.transport import Context, Ends, Incoming, Outgoing, Receiver, Sender, copying_sender

ALIGNMENT = 64
# Samples on their way, and held by the subscriber. The publisher's segment has room for all of
# them.
MESSAGES = 16


class Port:
    """This process's node, and the services that both ends use."""

    def __init__(self, name: str, folder: str) -> None:
        iox2.set_log_level(iox2.LogLevel.Error)
        config = iox2.config.default()
        # Files and segments of this run alone, so that its owner finds all that is left of them.
        config.global_cfg.root_path = iox2.Path.new(folder)
        config.global_cfg.prefix = iox2.FileName.new(name)
        self.node = iox2.NodeBuilder.new().config(config).create(iox2.ServiceType.Ipc)
        self.samples = (
            self.node.service_builder(iox2.ServiceName.new(f"{name}/samples"))
            .publish_subscribe(iox2.Slice[ctypes.c_uint8])
            .payload_alignment(iox2.Alignment.new(ALIGNMENT))
            .max_publishers(1)
            .max_subscribers(1)
            .subscriber_max_buffer_size(MESSAGES)
            .subscriber_max_borrowed_samples(MESSAGES)
            .enable_safe_overflow(False)
            .open_or_create()
        )
        self.events = (
            self.node.service_builder(iox2.ServiceName.new(f"{name}/events"))
            .event()
            .open_or_create()
        )


def as_tensor(slice_: iox2.Slice[ctypes.c_uint8], hidden: int) -> Tensor:
    """bf16 [tokens, hidden] over a sample's bytes."""
    return torch.frombuffer(slice_.as_memory_view(), dtype=torch.bfloat16).view(-1, hidden)


def sender(name: str, folder: str, hidden: int, most_bytes: int, in_place: bool) -> Sender:
    port = Port(name, folder)
    publisher = port.samples.publisher_builder().initial_max_slice_len(most_bytes).create()
    notifier = port.events.notifier_builder().create()

    def close() -> None:
        publisher.delete()
        notifier.delete()

    def send(sample: iox2.SampleMutUninit) -> None:
        sample.assume_init().send()
        notifier.notify()

    def begin(tokens: int) -> Outgoing:
        sample = publisher.loan_slice_uninit(tokens * hidden * 2)
        return Outgoing(as_tensor(sample.payload(), hidden), partial(send, sample))

    def copy(payload: Tensor) -> None:
        sample = publisher.loan_slice_uninit(payload.nbytes)
        as_tensor(sample.payload(), hidden).copy_(payload)
        send(sample)

    return Sender(begin, close) if in_place else copying_sender(copy, close, hidden)


def receiver(name: str, folder: str, hidden: int, polls: bool) -> Receiver:
    port = Port(name, folder)
    subscriber = port.samples.subscriber_builder().create()
    listener = port.events.listener_builder().create()

    def close() -> None:
        subscriber.delete()
        listener.delete()

    def receive() -> Incoming:
        while (sample := subscriber.receive()) is None:
            if polls:
                os.sched_yield()
            else:
                listener.blocking_wait()
        return Incoming(as_tensor(sample.payload(), hidden), sample.delete)

    return Receiver(receive, close)


@contextmanager
def connect(in_place: bool, polls: bool, context: Context, settings: Settings) -> Iterator[Ends]:
    # Short, whatever TMPDIR says: folder, name and some 90 characters of iceoryx2's are the path of
    # a Unix socket, which has 108 at most (unix(7)).
    name = f"iox{secrets.token_hex(4)}-"
    most = settings.payload_bytes(max(settings.most_tokens, REHEARSAL_TOKENS))
    folder = tempfile.mkdtemp(prefix="iox-", dir="/tmp")
    try:
        yield Ends(
            partial(sender, name, folder, settings.hidden, most, in_place),
            partial(receiver, name, folder, settings.hidden, polls),
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for left in Path("/dev/shm").glob(f"{name}*"):
            left.unlink(missing_ok=True)
