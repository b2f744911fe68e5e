"""Gives every candidate its turns: all in one run, in rounds, nobody beside another.

A round visits every size, and at each size every candidate once, in an order that is drawn anew
for each visit. Whatever else the machine does for a while hits all alike, and nobody always
follows the same neighbour. A first round of a few messages is thrown away: it faults in what has
to be faulted in once.
"""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

from benchmarks.crew import Crew
from benchmarks.link import Candidate, Context, SoloPlan
from benchmarks.memory import PeakPss
from benchmarks.pingpong import numbers_per_message
from benchmarks.results import Sample, Series, Turn
from benchmarks.settings import Settings
from benchmarks.stats import summarise

# Said to the caller before each round: rounds done, rounds in all.
Progress = Callable[[int, int], None]


@dataclass
class Entry:
    """One candidate in a run."""

    crew: Crew
    settings: Settings
    samples: dict[int, list[Sample]] = field(default_factory=dict)
    next_number: int = 0
    memory: PeakPss = field(default_factory=PeakPss)

    @property
    def sizes(self) -> tuple[int, ...]:
        how = self.crew.candidate.how
        if isinstance(how, SoloPlan):
            return how.sizes(self.settings)
        return self.settings.tokens if self.crew.candidate.carries_data else (0,)

    @property
    def size_unit(self) -> str:
        how = self.crew.candidate.how
        if isinstance(how, SoloPlan):
            return how.size_unit
        return "tokens" if self.crew.candidate.carries_data else "none"

    def warm_up(self, size: int) -> None:
        """The turn that is not counted is the one in which memory is looked at."""
        self._turn(size, 1, self.memory.look)

    def measure(self, size: int) -> None:
        self.samples.setdefault(size, []).extend(self._turn(size, self._count(size)))

    def series(self) -> Series:
        candidate = self.crew.candidate
        return Series(
            name=candidate.name,
            label=candidate.label,
            kind=candidate.kind.value,
            about=candidate.about,
            size_unit=self.size_unit,
            points=[summarise(size, samples) for size, samples in sorted(self.samples.items())],
            peak_pss_bytes=self.memory.peak,
        )

    def _count(self, size: int) -> int:
        how = self.crew.candidate.how
        if isinstance(how, SoloPlan):
            return how.count(self.settings, size)
        return self.settings.messages(size)

    def _turn(
        self, size: int, count: int, watch: Callable[[list[int]], None] | None = None
    ) -> list[Sample]:
        turn = Turn(size, count, self.settings.warm_up, self.next_number)
        self.next_number += (turn.warm_up + turn.count) * numbers_per_message(self.settings)
        return self.crew.turn(turn, watch)


def measure(candidates: list[Candidate], settings: Settings, progress: Progress) -> list[Series]:
    """Start all candidates, measure them, end them. Nothing is left behind, also on an error.

    Those that are to be `apart` have rounds of their own, afterwards.
    """
    together = [candidate for candidate in candidates if not candidate.apart]
    groups = [together, *([candidate] for candidate in candidates if candidate.apart)]
    return [series for group in groups if group for series in _measure(group, settings, progress)]


def fresh_processes() -> Context:
    """Where every candidate's processes come from: a server that has imported torch, no more."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    return context


def _measure(candidates: list[Candidate], settings: Settings, progress: Progress) -> list[Series]:
    context = fresh_processes()
    with ExitStack() as crews:
        entries = []
        for candidate in candidates:
            crew = Crew(candidate, context, settings)
            crews.callback(crew.close)
            entries.append(Entry(crew, settings))
        for entry in entries:
            entry.crew.wait_ready()
        _rounds(entries, settings, progress)
        return [entry.series() for entry in entries]


def _rounds(entries: list[Entry], settings: Settings, progress: Progress) -> None:
    order = random.Random(settings.seed)
    for entry, size in _visits(entries, order):
        entry.warm_up(size)
    for done in range(settings.rounds):
        progress(done, settings.rounds)
        for entry, size in _visits(entries, order):
            entry.measure(size)
    progress(settings.rounds, settings.rounds)


def _visits(entries: list[Entry], order: random.Random) -> Iterator[tuple[Entry, int]]:
    """Sizes of one kind only are visited together: 512 blocks have nothing to do with 512 tokens,
    and a loop of microseconds must not stand between payloads that sweep the caches."""
    for unit, size in sorted(
        {(entry.size_unit, size) for entry in entries for size in entry.sizes}
    ):
        there = [entry for entry in entries if entry.size_unit == unit and size in entry.sizes]
        order.shuffle(there)
        for entry in there:
            yield entry, size
