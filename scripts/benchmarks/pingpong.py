"""How a transport is measured: one message at a time from a producer's process to a consumer's.

Latency runs from the producer's start of the handoff to the moment the consumer has read one
value of a tensor of the right shape. Both stamps are CLOCK_MONOTONIC, which is one clock for
all processes of a Linux system, so no half of a round trip is assumed.

    producer                                            consumer
    t0  begin                                           (asleep in receive)
    t1  fill, not timed
        rehearsals, not timed: small messages there, acknowledgements back; a short pause
    t2  send                             ------------>  receive, read one value: t3
                                                        check every byte, not timed
                                                        release, timed apart
        wait                             <------------  acknowledge (t3, release)

    latency = (t1 - t0) + (t3 - t2)

Rehearsals stand before `begin` too. Why: to fill and check 117 MB takes tens of milliseconds. In
that time the other side's processor falls asleep ever deeper, and both lose the code of the
transport from their caches. On a virtual machine a bare wake costs several times as much after 10
ms of idleness as after 50 us; so what a handoff costs would depend on the size of the payload for a
reason that is not the handoff's. The small messages put both sides into the same state before every
timed part, for every transport, baselines included: code in the caches, the consumer just gone to
sleep. Without them the sizes are not comparable with each other.

It measures no throughput: there is never more than one message on its way.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

from torch import Tensor

from benchmarks.payload import Pattern
from benchmarks.report import Done, Sample, Turn
from benchmarks.settings import REHEARSAL_TOKENS, Settings
from benchmarks.transport import Outgoing, Receiver, Sender

# CLOCK_MONOTONIC in nanoseconds: time.monotonic_ns reads no other clock on Linux.
now = time.monotonic_ns

# When the consumer held the tensor, and how long the release took: both nanoseconds.
_ACKNOWLEDGEMENT = struct.Struct("<qq")

# How long the producer waits after rehearsals for the consumer to go to sleep again. Shorter: it
# may be caught on its way, and what is measured is no wake. Longer: its processor sleeps deeper
# (Linux guests poll for 200 us first).
SETTLE_NS = 50_000


def numbers(turn: Turn, settings: Settings) -> range:
    """The numbers of a turn's messages; those between are their rehearsals'."""
    step = numbers_per_message(settings)
    return range(turn.first, turn.first + (turn.warm_up + turn.count) * step, step)


def numbers_per_message(settings: Settings) -> int:
    """How many numbers a counted message uses up: its own and those of its rehearsals."""
    return 1 + 2 * settings.rehearsals


class Producer:
    """The producer's side of a transport."""

    def __init__(self, sender: Sender, acknowledgements: Connection, settings: Settings) -> None:
        self._sender = sender
        self._acknowledgements = acknowledgements
        self._settings = settings
        self._pattern = Pattern(settings.hidden, settings.seed)

    def turn(self, turn: Turn) -> Done:
        samples = [self._message(turn.size, number) for number in numbers(turn, self._settings)]
        return Done(samples[turn.warm_up :])

    def close(self) -> None:
        self._sender.close()

    def _message(self, tokens: int, number: int) -> Sample:
        rehearsals = self._settings.rehearsals
        self._rehearse(range(number + 1, number + 1 + rehearsals))
        start = now()
        outgoing = self._sender.begin(tokens)
        begun = now() - start
        self._fill(outgoing, number)
        self._rehearse(range(number + 1 + rehearsals, number + 1 + 2 * rehearsals))
        sent = now()
        outgoing.send()
        held, cleanup = self._acknowledged()
        return Sample(latency_ns=begun + held - sent, cleanup_ns=cleanup)

    def _rehearse(self, numbers: range) -> None:
        for number in numbers:
            outgoing = self._sender.begin(REHEARSAL_TOKENS)
            self._fill(outgoing, number)
            outgoing.send()
            self._acknowledged()
        if numbers:
            spin(SETTLE_NS)

    def _fill(self, outgoing: Outgoing, number: int) -> None:
        payload = outgoing.payload
        if payload is not None:
            self._pattern.fill(payload, number)

    def _acknowledged(self) -> tuple[int, int]:
        held, cleanup = _ACKNOWLEDGEMENT.unpack(self._acknowledgements.recv_bytes())
        return held, cleanup


class Consumer:
    """The consumer's side of a transport."""

    def __init__(self, receiver: Receiver, acknowledge: Connection, settings: Settings) -> None:
        self._receiver = receiver
        self._acknowledge = acknowledge
        self._settings = settings
        self._pattern = Pattern(settings.hidden, settings.seed)

    def turn(self, turn: Turn) -> Done:
        for number, tokens in self._expected(turn):
            self._message(number, tokens)
        return Done()

    def close(self) -> None:
        self._receiver.close()

    def _expected(self, turn: Turn) -> Iterator[tuple[int, int]]:
        rehearsals = 2 * self._settings.rehearsals
        for number in numbers(turn, self._settings):
            for rehearsal in range(number + 1, number + 1 + rehearsals):
                yield rehearsal, REHEARSAL_TOKENS
            yield number, turn.size

    def _message(self, number: int, tokens: int) -> None:
        incoming = self._receiver.receive()
        tensor = incoming.tensor
        if tensor is not None:
            touch(tensor)
        held = now()
        if tensor is not None:
            self._pattern.check(tensor, number, tokens)
        del tensor  # or what the tensor lies in could not be given back
        cleanup = elapsed(incoming.release)
        self._acknowledge.send_bytes(_ACKNOWLEDGEMENT.pack(held, cleanup))


def spin(nanoseconds: int) -> None:
    """Pass the time without giving up the processor."""
    end = now() + nanoseconds
    while now() < end:
        pass


def touch(tensor: Tensor) -> None:
    """Read the last value: a tensor that cannot be read is not yet held."""
    tensor[-1, -1].item()


def elapsed(call: Callable[[], None]) -> int:
    """Nanoseconds that `call` took."""
    start = now()
    call()
    return now() - start
