"""Gives every transport its turns: all in one run, in rounds, nobody beside another.

A round visits every size, and at each size every transport once, in an order that is drawn anew
for each visit. Whatever else the machine does for a while hits all alike, and nobody always
follows the same neighbour. A first round of a few messages is thrown away: it faults in what has
to be faulted in once.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection

from benchmarks.pingpong import Consumer, Producer, numbers_per_message
from benchmarks.report import Done, Sample, Series, Turn, summarise
from benchmarks.settings import Settings
from benchmarks.transport import Alone, Context, Ends, Solo, Transport
from benchmarks.workers import Make, Workers, fresh_processes

# Said to the caller before each round: rounds done, rounds in all.
Progress = Callable[[int, int], None]


class Entry:
    """One transport in a run: its processes, and what was measured."""

    def __init__(self, transport: Transport, context: Context, settings: Settings) -> None:
        self.transport = transport
        self._settings = settings
        self._samples: dict[int, list[Sample]] = {}
        self._next_number = 0
        with ExitStack() as undo, ExitStack() as given_away:
            roles = [
                (f"{transport.name}: {role}", make)
                for role, make in self._roles(undo, given_away, context)
            ]
            self.workers = undo.enter_context(Workers(context, roles))
            self._resources = undo.pop_all()

    @property
    def sizes(self) -> tuple[int, ...]:
        return self._settings.tokens if self.transport.carries_data else (0,)

    def warm_up(self, size: int) -> None:
        """The turn that is not counted is the one in which memory is measured."""
        self._turn(size, 1, watches_memory=True)

    def measure(self, size: int) -> list[Sample]:
        samples = self._turn(size, self._settings.messages(size))
        self._samples.setdefault(size, []).extend(samples)
        return samples

    def series(self) -> Series:
        transport = self.transport
        return Series(
            name=transport.name,
            label=transport.label,
            kind=transport.kind.value,
            about=transport.about,
            carries_data=transport.carries_data,
            points=[summarise(size, samples) for size, samples in sorted(self._samples.items())],
            peak_pss_bytes=self.workers.peak_pss_bytes,
        )

    def close(self) -> None:
        self._resources.close()

    def _turn(self, size: int, count: int, watches_memory: bool = False) -> list[Sample]:
        settings = self._settings
        turn = Turn(count, size, settings.warm_up, self._next_number)
        self._next_number += (turn.warm_up + turn.count) * numbers_per_message(settings)
        done = self.workers.turn(turn, watches_memory=watches_memory)
        return [sample for one in done for sample in one.samples]

    def _roles(
        self, undo: ExitStack, given_away: ExitStack, context: Context
    ) -> list[tuple[str, Make]]:
        how, settings = self.transport.how, self._settings
        if isinstance(how, Alone):
            return [("its process", partial(SoloWork, how.prepare, settings))]
        ends = undo.enter_context(how(context, settings))
        acknowledgements, acknowledge = context.Pipe(duplex=False)
        # Only the children keep these, so that the producer notices when the consumer is gone.
        given_away.callback(acknowledgements.close)
        given_away.callback(acknowledge.close)
        return [
            ("consumer", partial(make_consumer, ends, acknowledge, settings)),
            ("producer", partial(make_producer, ends, acknowledgements, settings)),
        ]


class SoloWork:
    """Gives a transport of one process its turns."""

    def __init__(self, prepare: Callable[[Settings], Solo], settings: Settings) -> None:
        self._solo = prepare(settings)

    def turn(self, turn: Turn) -> Done:
        return Done(self._solo.measure(turn.size, turn.warm_up + turn.count)[turn.warm_up :])

    def close(self) -> None:
        self._solo.close()


def make_producer(ends: Ends, acknowledgements: Connection, settings: Settings) -> Producer:
    return Producer(ends.sender(), acknowledgements, settings)


def make_consumer(ends: Ends, acknowledge: Connection, settings: Settings) -> Consumer:
    return Consumer(ends.receiver(), acknowledge, settings)


def measure(transports: list[Transport], settings: Settings, progress: Progress) -> list[Series]:
    """Start all transports, measure them, end them. Nothing is left behind, also on an error.

    Those that are to be `apart` have rounds of their own, afterwards.
    """
    together = [transport for transport in transports if not transport.apart]
    groups = [together, *([transport] for transport in transports if transport.apart)]
    return [series for group in groups if group for series in _measure(group, settings, progress)]


def _measure(transports: list[Transport], settings: Settings, progress: Progress) -> list[Series]:
    with ExitStack() as stack:
        entries = start(transports, settings, stack)
        order = random.Random(settings.seed)
        for entry, size in _visits(entries, order):
            entry.warm_up(size)
        for done in range(settings.rounds):
            progress(done, settings.rounds)
            for entry, size in _visits(entries, order):
                entry.measure(size)
        progress(settings.rounds, settings.rounds)
        return [entry.series() for entry in entries]


def start(transports: list[Transport], settings: Settings, stack: ExitStack) -> list[Entry]:
    """Every transport with its processes ready; `stack` ends them."""
    context = fresh_processes()
    entries = []
    for transport in transports:
        entry = Entry(transport, context, settings)
        stack.callback(entry.close)
        entries.append(entry)
    for entry in entries:
        entry.workers.wait_ready()
    return entries


def _visits(entries: list[Entry], order: random.Random) -> Iterator[tuple[Entry, int]]:
    for size in sorted({size for entry in entries for size in entry.sizes}):
        there = [entry for entry in entries if size in entry.sizes]
        order.shuffle(there)
        for entry in there:
            yield entry, size
