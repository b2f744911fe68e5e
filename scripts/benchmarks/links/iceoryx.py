"""Peer: iceoryx2, publish-subscribe with an event to wake the subscriber.

- *in place*: the producer's data is written into a loaned sample, which is then sent.
- *with copy*: the data lies in a tensor of the producer's own and is copied into a loaned sample.

Samples are slices of bytes, of the largest payload's size at most; the subscriber sleeps in its
listener, as every consumer here sleeps until it is told.
"""

from __future__ import annotations

import ctypes
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

from benchmarks.link import Context, Ends
from benchmarks.links.buffers import OwnBuffers
from benchmarks.settings import REHEARSAL_TOKENS, Settings

ALIGNMENT = 64
# Samples on their way, and held by the subscriber: as many as the throughput's window allows. The
# publisher's segment has room for all of them.
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


class SampleOut:
    """A loaned sample, or a tensor to be copied into one."""

    def __init__(self, sender: SampleSender, tokens: int, own: Tensor | None) -> None:
        self._sender = sender
        self._own = own
        self._sample = None if own is not None else sender.loan(tokens)
        self.payload = own if own is not None else sender.tensor(self._sample)

    def send(self) -> None:
        sample = self._sample
        if sample is None:
            sample = self._sender.loan(len(self.payload))
            self._sender.tensor(sample).copy_(self.payload)
        sample.assume_init().send()
        self._sender.notifier.notify()


class SampleSender:
    def __init__(
        self, name: str, folder: str, hidden: int, most_bytes: int, in_place: bool
    ) -> None:
        self._port = Port(name, folder)
        self._hidden = hidden
        self._publisher = (
            self._port.samples.publisher_builder().initial_max_slice_len(most_bytes).create()
        )
        self.notifier = self._port.events.notifier_builder().create()
        self._own = None if in_place else OwnBuffers(hidden)

    def begin(self, tokens: int) -> SampleOut:
        return SampleOut(self, tokens, None if self._own is None else self._own.get(tokens))

    def loan(self, tokens: int) -> iox2.SampleMutUninit:
        return self._publisher.loan_slice_uninit(tokens * self._hidden * 2)

    def tensor(self, sample: iox2.SampleMutUninit) -> Tensor:
        return as_tensor(sample.payload(), self._hidden)

    def close(self) -> None:
        self._publisher.delete()
        self.notifier.delete()


class SampleIn:
    def __init__(self, sample: iox2.Sample, hidden: int) -> None:
        self._sample = sample
        self.tensor: Tensor | None = as_tensor(sample.payload(), hidden)

    def release(self) -> None:
        self.tensor = None
        self._sample.delete()


class SampleReceiver:
    def __init__(self, name: str, folder: str, hidden: int) -> None:
        self._port = Port(name, folder)
        self._hidden = hidden
        self._subscriber = self._port.samples.subscriber_builder().create()
        self._listener = self._port.events.listener_builder().create()

    def receive(self) -> SampleIn:
        while (sample := self._subscriber.receive()) is None:
            self._listener.blocking_wait()
        return SampleIn(sample, self._hidden)

    def close(self) -> None:
        self._subscriber.delete()
        self._listener.delete()


@contextmanager
def connect(in_place: bool, context: Context, settings: Settings) -> Iterator[Ends]:
    # Short, whatever TMPDIR says: folder, name and some 90 characters of iceoryx2's are the path of
    # a Unix socket, which has 108 at most (unix(7)).
    name = f"iox{secrets.token_hex(4)}-"
    most = settings.payload_bytes(max(settings.most_tokens, REHEARSAL_TOKENS))
    folder = tempfile.mkdtemp(prefix="iox-", dir="/tmp")
    try:
        yield Ends(
            partial(SampleSender, name, folder, settings.hidden, most, in_place),
            partial(SampleReceiver, name, folder, settings.hidden),
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for left in Path("/dev/shm").glob(f"{name}*"):
            left.unlink(missing_ok=True)
