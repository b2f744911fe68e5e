"""What shmblocks promises of its speed, held against one run.

Nearly all are ratios of medians of the same run, so that they mean the same on any machine. A
target whose parts were not measured in the run is neither met nor missed.

It reads a report's series and experiments and measures nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.report import Experiment, Point, Series, Target
from benchmarks.transport import Kind

COPY_TOKENS = 2_000
SMALL_TOKENS = 64
LARGE_TOKENS = 16_384

# The shortest path that there is: a channel, with the compiled core where there is one.
IN_PLACE, ASLEEP, COPY = (
    "shmblocks-channel",
    "shmblocks-channel-asleep",
    "shmblocks-channel-copy",
)
PYTHON = "shmblocks-channel-python"
FLOOR, SLEEP = "wake-spin", "wake-sleep"
MEMCPY = "memcpy"
WAKES = ("wake-pipe", "wake-semaphore")
TORCH_QUEUES = ("torch-queue-fd", "torch-queue-fs")


class NotMeasuredError(Exception):
    """The run left out what a target needs."""


class Found:
    """What a run measured: medians in microseconds, and the experiments' numbers."""

    def __init__(self, series: Sequence[Series], experiments: Sequence[Experiment]) -> None:
        self.series = {one.name: one for one in series}
        self.numbers = {name: value for one in experiments for name, value in one.numbers.items()}

    def point(self, name: str, size: int) -> Point:
        point = self.series[name].at(size) if name in self.series else None
        if point is None:
            raise NotMeasuredError(f"{name} at {size}")
        return point

    def at(self, name: str, size: int) -> float:
        return self.point(name, size).p50_us

    def points(self, name: str) -> list[Point]:
        if name not in self.series:
            raise NotMeasuredError(name)
        return self.series[name].points

    def shortest(self, names: Sequence[str], size: int) -> float:
        """Of those that were measured: the strictest to be compared with."""
        found = [self.at(name, size) for name in names if name in self.series]
        if not found:
            raise NotMeasuredError(" or ".join(names))
        return min(found)

    def number(self, name: str) -> float:
        """Of an experiment."""
        if name not in self.numbers:
            raise NotMeasuredError(name)
        return self.numbers[name]

    def several(self, beginning: str) -> list[float]:
        """The numbers whose names begin so."""
        found = [value for name, value in self.numbers.items() if name.startswith(beginning)]
        if not found:
            raise NotMeasuredError(beginning)
        return found


Measure = Callable[[Found], float]


def _ratio(name: str, other: str) -> Measure:
    """The largest ratio of two rows, of all sizes."""
    return lambda found: max(
        point.p50_us / found.at(other, point.size) for point in found.points(name)
    )


def _in_place_flat(found: Found) -> float:
    return found.at(IN_PLACE, LARGE_TOKENS) / found.at(IN_PLACE, SMALL_TOKENS)


def _copy_to_baseline(is_meant: Callable[[int], bool]) -> Measure:
    """The largest ratio to memcpy and a wake, of the sizes that are meant."""

    def measure(found: Found) -> float:
        wake = found.shortest(WAKES, 0)
        ratios = [
            point.p50_us / (found.at(MEMCPY, point.size) + wake)
            for point in found.points(COPY)
            if is_meant(point.size)
        ]
        if not ratios:
            raise NotMeasuredError(f"{COPY} at these sizes")
        return max(ratios)

    return measure


def _faster_than_torch(name: str) -> Measure:
    """Than its faster strategy."""
    return lambda found: found.shortest(TORCH_QUEUES, COPY_TOKENS) / found.at(name, COPY_TOKENS)


def _ahead(found: Found) -> float:
    """How often a peer was ahead: in place against all; with a copy against all that copy."""
    peers = [one for one in found.series.values() if one.kind == Kind.PEER.value]
    if not peers:
        raise NotMeasuredError("any peer")
    behind = 0
    for peer in peers:
        name = IN_PLACE if "in-place" in peer.name else COPY
        for point in peer.points:
            ours = found.point(name, point.size)
            behind += (ours.p50_us > point.p50_us) + (ours.p99_us > point.p99_us)
    return behind


def _alloc_cost(found: Found) -> float:
    return max(found.several("pair in a pool of "))


def _alloc_flat(found: Found) -> float:
    costs = found.several("pair in a pool of ")
    return max(costs) / min(costs)


def _find_get(found: Found) -> float:
    """Of few entries: by their number is another question."""
    return found.number("find us, 100 entries") + found.number("get + release us, 100 entries")


def _number(name: str, scale: float = 1.0) -> Measure:
    return lambda found: found.number(name) * scale


@dataclass(frozen=True)
class Goal:
    """One promise."""

    name: str
    words: str
    limit: float
    unit: str
    measure: Measure
    meets: Callable[[float, float], bool] = operator.le


# fmt: off
GOALS = (
    Goal("in-place-to-floor",
         "handoff in place, both awake, against spinning on a word and a tensor, at most",
         1.3, "x", _ratio(IN_PLACE, FLOOR)),
    Goal("in-place-to-python", "handoff in place against the same by Python alone, at most",
         0.3, "x", _ratio(IN_PLACE, PYTHON)),
    Goal("in-place-flat",
         f"handoff in place: {LARGE_TOKENS:,} tokens against {SMALL_TOKENS}, under",
         1.15, "x", _in_place_flat, operator.lt),
    Goal("asleep", "handoff in place to a sleeper against a semaphore and a tensor, at most",
         1.5, "x", _ratio(ASLEEP, SLEEP)),
    Goal("copy-to-baseline",
         f"handoff with copy from {COPY_TOKENS:,} tokens on against memcpy + wake, at most",
         1.05, "x", _copy_to_baseline(lambda size: size >= COPY_TOKENS)),
    Goal("small-copy-to-baseline",
         f"handoff with copy below {COPY_TOKENS:,} tokens against memcpy + wake, at most",
         1.2, "x", _copy_to_baseline(lambda size: size < COPY_TOKENS)),
    Goal("in-place-to-torch",
         f"handoff in place at {COPY_TOKENS:,} tokens, faster than torch's Queue by",
         100.0, "x", _faster_than_torch(IN_PLACE), operator.ge),
    Goal("copy-to-torch",
         f"handoff with copy at {COPY_TOKENS:,} tokens, faster than torch's Queue by",
         6.0, "x", _faster_than_torch(COPY), operator.ge),
    Goal("ahead", "times that a peer is ahead, of all sizes, p50 and p99, at most", 0, "", _ahead),
    Goal("put-get", "put + get in one process, at most", 2.5, "us", _number("put + get")),
    Goal("alloc-cost", "alloc + free in the slowest pool, at most", 2.0, "us", _alloc_cost),
    Goal("find-get", "find + get + release of a key, at most", 4.0, "us", _find_get),
    Goal("alloc-flat", "alloc + free, slowest against fastest pool, under",
         1.5, "x", _alloc_flat, operator.lt),
    Goal("journal", "alloc + free against the same without the journal, at most",
         1.2, "x", _number("price of the journal")),
    Goal("lock-time", "the longest that any operation but check() holds the lock, at most",
         0.5, "ms", _number("longest hold but check", 1e-3)),
    Goal("contention",
         "8 processes, alloc + free against the bare lock with as many stores, at least",
         0.8, "x", _number("share of the bare lock, 8 processes"), operator.ge),
    Goal("fairness", "8 processes, largest share against smallest, at most",
         1.5, "x", _number("unfairness, 8 processes")),
    Goal("attach", "attach to 8 GiB, under", 20.0, "ms", _number("attach, 8 GiB", 1e-3)),
)
# fmt: on


def judge(series: Sequence[Series], experiments: Sequence[Experiment]) -> list[Target]:
    """Every goal, met, missed or not measured."""
    found = Found(series, experiments)
    return [_target(goal, found) for goal in GOALS]


def _target(goal: Goal, found: Found) -> Target:
    try:
        measured = goal.measure(found)
    except NotMeasuredError:
        measured = None
    return Target(
        name=goal.name,
        statement=f"{goal.words} {goal.limit:g} {goal.unit}".rstrip(),
        measured=measured,
        limit=goal.limit,
        unit=goal.unit,
        met=None if measured is None else goal.meets(measured, goal.limit),
    )
