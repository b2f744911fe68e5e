"""What a candidate has to offer to be measured.

A *link* carries one payload at a time from a producer's process to a consumer's:

    producer                                       consumer
    outgoing = sender.begin(tokens)  (timed)
    fill outgoing.payload                          receiver.receive() waits
    outgoing.send()                  (timed) ----> incoming = ..., incoming.tensor is readable
                                                   every byte checked
                                     <---- acknowledged
                                                   incoming.release()

`begin` is where a producer gets the memory that its data will be written to. For most it is a
buffer of its own, there from the start; who hands over in place allocates here, and pays for it.

A *solo* candidate is one process that times itself.

Neither says how often, in which order, or beside whom it is measured.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from typing import Protocol

from torch import Tensor

from benchmarks.results import Sample
from benchmarks.settings import Settings

# Every process is forked from a clean server that has imported torch and has done nothing else:
# as fresh as a spawned one, without the seconds that importing torch takes in each.
Context = ForkServerContext


class Kind(str, enum.Enum):
    """What a candidate stands for in tables and plots."""

    FLOOR = "floor"
    OURS = "shmblocks"
    PEER = "peer"


class Outgoing(Protocol):
    """One message on its way out."""

    @property
    def payload(self) -> Tensor | None:
        """Where the producer's data is written to; None for a link that carries no data."""
        ...

    def send(self) -> None: ...


class Incoming(Protocol):
    """One message that arrived."""

    @property
    def tensor(self) -> Tensor | None: ...

    def release(self) -> None:
        """Give back what the message held. The tensor is not used any more."""
        ...


class Sender(Protocol):
    def begin(self, tokens: int) -> Outgoing: ...

    def close(self) -> None: ...


class Receiver(Protocol):
    def receive(self) -> Incoming: ...

    def close(self) -> None: ...


class Solo(Protocol):
    def measure(self, size: int, count: int) -> list[Sample]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Ends:
    """What the two processes call to get their end. Both callables cross a spawn."""

    sender: Callable[[], Sender]
    receiver: Callable[[], Receiver]


# Owns, in the conductor's process, what a candidate needs beside its own processes (queues, a
# pool, a semaphore), from before they start until after they ended.
Connect = Callable[[Context, Settings], AbstractContextManager[Ends]]
Prepare = Callable[[Settings], Callable[[], Solo]]


@dataclass(frozen=True)
class Candidate:
    """One line of the table."""

    name: str
    label: str
    kind: Kind
    about: str
    how: Connect | SoloPlan
    # False for a bare wake, which is measured once a round and not once a size.
    carries_data: bool = True
    # Measured after the others: it brings processes of its own that would disturb them.
    apart: bool = False
    # A package that it needs and that need not be there.
    package: str | None = None


@dataclass(frozen=True)
class SoloPlan:
    """How a candidate that needs one process only is measured."""

    prepare: Prepare
    sizes: Callable[[Settings], tuple[int, ...]]
    count: Callable[[Settings, int], int]
    size_unit: str = "tokens"
