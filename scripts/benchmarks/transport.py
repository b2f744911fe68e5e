"""What a transport has to offer to be measured, and what several of them share.

A transport carries one payload at a time from a producer's process to a consumer's:

    producer                                       consumer
    outgoing = sender.begin(tokens)  (timed)
    fill outgoing.payload                          receiver.receive() waits
    outgoing.send()                  (timed) ----> incoming = ..., incoming.tensor is readable
                                                   every byte checked
                                     <---- acknowledged
                                                   incoming.release()

`begin` is where a producer gets the memory that its data will be written to. For most it is a
buffer of its own, there from the start; a transport that hands over in place allocates here, and
pays for it.

An `Alone` transport is one process that times itself.

Neither says how often, in which order, or beside which others it is measured.
"""

from __future__ import annotations

import enum
import os
import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import ForkServerContext
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.report import Sample
from benchmarks.settings import Settings

# Every process is forked from a clean server that has imported torch and has done nothing else:
# as fresh as a spawned one, without the seconds that importing torch takes in each.
Context = ForkServerContext

# Seconds. Larger: a hang is told later. Smaller: a slow machine is taken for a hung one.
PATIENCE = 120.0


class Kind(str, enum.Enum):
    """What a transport stands for in tables and plots."""

    # What no handoff can beat on this machine.
    BASELINE = "baseline"
    OURS = "shmblocks"
    PEER = "peer"


@dataclass(slots=True)
class Outgoing:
    """One message on its way out."""

    # Where the producer's data is written to; None for a transport without data.
    payload: Tensor | None
    send: Callable[[], object]


def nothing() -> None:
    """There is nothing to send, or to give back."""


@dataclass(slots=True)
class Incoming:
    """One message that arrived."""

    tensor: Tensor | None
    # Gives back what the message held, once the tensor is gone.
    free: Callable[[], object] = nothing

    def release(self) -> None:
        self.tensor = None
        self.free()


@dataclass(slots=True)
class Sender:
    """The producer's end."""

    begin: Callable[[int], Outgoing]
    close: Callable[[], None]


@dataclass(slots=True)
class Receiver:
    """The consumer's end."""

    receive: Callable[[], Incoming]
    close: Callable[[], None]


class Solo(Protocol):
    def measure(self, size: int, count: int) -> list[Sample]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Ends:
    """What the two processes call to get their end. Both callables cross a spawn."""

    sender: Callable[[], Sender]
    receiver: Callable[[], Receiver]


# Owns, in the launcher's process, what a transport needs beside its own processes (queues, a pool,
# a semaphore), from before they start until after they ended.
Connect = Callable[[Context, Settings], AbstractContextManager[Ends]]


@dataclass(frozen=True)
class Alone:
    """A transport that needs one process only, which times itself."""

    prepare: Callable[[Settings], Solo]


@dataclass(frozen=True)
class Transport:
    """One row of the table."""

    name: str
    label: str
    kind: Kind
    how: Connect | Alone
    about: str
    # False for a bare wake, which is measured once a round and not once a size.
    carries_data: bool = True
    # Measured after the others: it brings processes of its own that would disturb them.
    apart: bool = False
    # A package that it needs and that need not be there.
    package: str | None = None


# --- what several transports share ------------------------------------------------------------


def unique_name(what: str) -> str:
    """A name in /dev/shm that no other run has.

    A caller that wants to find what a run leaves behind sets how its names begin.
    """
    prefix = os.environ.get("SHMBLOCKS_BENCH_PREFIX", "shmblocks-bench")
    return f"{prefix}-{os.getpid()}-{secrets.token_hex(4)}-{what}"


class OwnBuffers:
    """The producer's private tensors, bf16 [tokens, hidden]: one of each size, kept."""

    def __init__(self, hidden: int) -> None:
        self._hidden = hidden
        self._tensors: dict[int, Tensor] = {}

    def get(self, tokens: int) -> Tensor:
        if tokens not in self._tensors:
            self._tensors[tokens] = torch.zeros(tokens, self._hidden, dtype=torch.bfloat16)
        return self._tensors[tokens]


def copying_sender(
    send: Callable[[Tensor], object], close: Callable[[], None], hidden: int
) -> Sender:
    """Of a transport that copies what lies in a tensor of the producer's own."""
    own = OwnBuffers(hidden)

    def begin(tokens: int) -> Outgoing:
        payload = own.get(tokens)
        return Outgoing(payload, partial(send, payload))

    return Sender(begin, close)
