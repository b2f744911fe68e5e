"""What shmblocks promises of its speed, held against one run.

Nearly all are ratios of medians of the same run, so that they mean the same on any machine. A
target whose parts were not measured in the run is neither met nor missed.

It reads a report's series and studies and measures nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.link import Kind
from benchmarks.results import Point, Series, Study, Target

COPY_TOKENS = 2_000
SMALL_TOKENS = 64
LARGE_TOKENS = 16_384

IN_PLACE, ASLEEP, COPY = "shmblocks-in-place", "shmblocks-asleep", "shmblocks-copy"
MEMCPY, ALLOC = "memcpy", "alloc-free"
FUTEX = "wake-semaphore"
WAKES = ("wake-pipe", FUTEX)
TORCH_QUEUES = ("torch-queue-fd", "torch-queue-fs")


class NotMeasuredError(Exception):
    """The run left out what a target needs."""


class Found:
    """What a run measured: medians in microseconds, and the studies' numbers."""

    def __init__(self, series: Sequence[Series], studies: Sequence[Study]) -> None:
        self.series = {one.name: one for one in series}
        self._numbers = {name: value for one in studies for name, value in one.numbers.items()}

    def at(self, name: str, size: int) -> float:
        point = self._find(name).at(size)
        if point is None:
            raise NotMeasuredError(f"{name} at {size}")
        return point.p50_us

    def points(self, name: str) -> list[Point]:
        return self._find(name).points

    def all(self, name: str) -> list[float]:
        return [point.p50_us for point in self.points(name)]

    def shortest(self, names: Sequence[str], size: int) -> float:
        """Of those that were measured: the strictest to be compared with."""
        found = [self.at(name, size) for name in names if name in self.series]
        if not found:
            raise NotMeasuredError(" or ".join(names))
        return min(found)

    def number(self, name: str) -> float:
        """Of a study."""
        if name not in self._numbers:
            raise NotMeasuredError(name)
        return self._numbers[name]

    def _find(self, name: str) -> Series:
        if name not in self.series:
            raise NotMeasuredError(name)
        return self.series[name]


# The measured value, and the numbers it was made of, in words.
Measure = Callable[[Found], tuple[float, str]]


def _in_place_us(found: Found) -> tuple[float, str]:
    costs = found.all(IN_PLACE)
    return max(costs), "by size: " + _several(costs)


def _in_place_flat(found: Found) -> tuple[float, str]:
    large, small = found.at(IN_PLACE, LARGE_TOKENS), found.at(IN_PLACE, SMALL_TOKENS)
    return large / small, f"{large:.1f} us / {small:.1f} us"


def _asleep(found: Found) -> tuple[float, str]:
    asleep, wake = found.at(ASLEEP, SMALL_TOKENS), found.at(FUTEX, 0)
    return asleep / wake, f"{asleep:.1f} us / {wake:.1f} us, the whole handoff against a bare wake"


def _copy_to_floor(found: Found) -> tuple[float, str]:
    wake = found.shortest(WAKES, 0)
    ratios = {
        point.size: point.p50_us / (found.at(MEMCPY, point.size) + wake)
        for point in found.points(COPY)
        if point.size >= COPY_TOKENS
    }
    if not ratios:
        raise NotMeasuredError(f"{COPY} at {COPY_TOKENS} or more")
    words = ", ".join(f"{size:,} tokens: {ratio:.2f}" for size, ratio in ratios.items())
    return max(ratios.values()), words


def _faster_than_torch(name: str) -> Measure:
    def measure(found: Found) -> tuple[float, str]:
        ours, torch = found.at(name, COPY_TOKENS), found.shortest(TORCH_QUEUES, COPY_TOKENS)
        return torch / ours, f"{torch:.1f} us / {ours:.1f} us, its faster strategy"

    return measure


def _ahead(found: Found) -> tuple[float, str]:
    """How often a peer was ahead: in place against all; with a copy against all that copy."""
    peers = [one for one in found.series.values() if one.kind == Kind.PEER.value]
    if not peers:
        raise NotMeasuredError("any peer")
    behind = []
    for peer in peers:
        name = IN_PLACE if "in-place" in peer.name else COPY
        for point in peer.points:
            ours = found._find(name).at(point.size)
            if ours is None:
                raise NotMeasuredError(f"{name} at {point.size}")
            for quantile, mine, theirs in (
                ("p50", ours.p50_us, point.p50_us),
                ("p99", ours.p99_us, point.p99_us),
            ):
                if mine > theirs:
                    behind.append(
                        f"{peer.name} at {point.size:,}, {quantile} {theirs:.0f} < {mine:.0f} us"
                    )
    return len(behind), "; ".join(behind) or "none was"


def _alloc_cost(found: Found) -> tuple[float, str]:
    costs = found.all(ALLOC)
    return max(costs), "by blocks of the pool: " + _several(costs)


def _alloc_flat(found: Found) -> tuple[float, str]:
    costs = found.all(ALLOC)
    return max(costs) / min(costs), f"{max(costs):.1f} us / {min(costs):.1f} us"


def _number(name: str, scale: float = 1.0) -> Measure:
    def measure(found: Found) -> tuple[float, str]:
        return found.number(name) * scale, name

    return measure


def _several(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.1f} us" for value in values)


@dataclass(frozen=True)
class Goal:
    """One promise."""

    name: str
    words: str
    limit: float
    unit: str
    measure: Measure
    meets: Callable[[float, float], bool] = operator.le


GOALS = (
    Goal("in-place", "handoff in place, both awake, at most", 40.0, "us", _in_place_us),
    Goal(
        "in-place-flat",
        f"handoff in place: {LARGE_TOKENS:,} tokens against {SMALL_TOKENS}, under",
        1.1,
        "x",
        _in_place_flat,
        operator.lt,
    ),
    Goal("asleep", "handoff in place to a sleeper against a bare wake, at most", 1.5, "x", _asleep),
    Goal(
        "copy-to-floor",
        f"handoff with copy from {COPY_TOKENS:,} tokens on against memcpy + wake, at most",
        1.1,
        "x",
        _copy_to_floor,
    ),
    Goal(
        "in-place-to-torch",
        f"handoff in place at {COPY_TOKENS:,} tokens, faster than torch's Queue by",
        100.0,
        "x",
        _faster_than_torch(IN_PLACE),
        operator.ge,
    ),
    Goal(
        "copy-to-torch",
        f"handoff with copy at {COPY_TOKENS:,} tokens, faster than torch's Queue by",
        6.0,
        "x",
        _faster_than_torch(COPY),
        operator.ge,
    ),
    Goal("ahead", "times that a peer is ahead, of all sizes, p50 and p99, at most", 0, "", _ahead),
    Goal("put-get", "put + get in one process, at most", 12.0, "us", _number("put + get")),
    Goal("alloc-cost", "alloc + free in the slowest pool, at most", 12.0, "us", _alloc_cost),
    Goal(
        "alloc-flat",
        "alloc + free, slowest against fastest pool, under",
        1.5,
        "x",
        _alloc_flat,
        operator.lt,
    ),
    Goal(
        "journal",
        "alloc + free against the same without the journal, at most",
        1.2,
        "x",
        _number("price of the journal"),
    ),
    Goal(
        "contention",
        "8 processes, alloc + free against the bare lock with as many stores, at least",
        0.8,
        "x",
        _number("share of the bare lock, 8 processes"),
        operator.ge,
    ),
    Goal(
        "contention-words",
        "the same against the bare lock with as many words written, at least",
        0.8,
        "x",
        _number("share of the bare lock by words, 8 processes"),
        operator.ge,
    ),
    Goal(
        "fairness",
        "8 processes, largest share against smallest, at most",
        1.5,
        "x",
        _number("unfairness, 8 processes"),
    ),
    Goal("attach", "attach to 8 GiB, under", 20.0, "ms", _number("attach, 8 GiB", 1e-3)),
)


def judge(series: Sequence[Series], studies: Sequence[Study]) -> list[Target]:
    """Every goal, met, missed or not measured."""
    found = Found(series, studies)
    return [_target(goal, found) for goal in GOALS]


def _target(goal: Goal, found: Found) -> Target:
    measured: float | None
    met: bool | None
    try:
        measured, explanation = goal.measure(found)
        met = goal.meets(measured, goal.limit)
    except NotMeasuredError as missing:
        measured, met, explanation = None, None, f"not measured in this run: {missing}"
    return Target(
        name=goal.name,
        statement=f"{goal.words} {goal.limit:g} {goal.unit}".rstrip(),
        measured=measured,
        limit=goal.limit,
        unit=goal.unit,
        met=met,
        explanation=explanation,
    )
