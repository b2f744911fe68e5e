"""What shmblocks promises of its speed, held against one run.

All but one are ratios of medians of the same run, so that they mean the same on any machine. A
target whose parts were not measured in the run is neither met nor missed.

It reads a report's series and measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.results import Series, Target

COPY_TOKENS = 2_000
SMALL_TOKENS = 64
LARGE_TOKENS = 16_384

FLAT_IN_PLACE = 1.2
COPY_TO_FLOOR = 1.3
FASTER_THAN_TORCH = 4.0
ALLOC_US = 25.0
FLAT_ALLOC = 1.5

IN_PLACE, COPY = "shmblocks-in-place", "shmblocks-copy"
MEMCPY, ALLOC = "memcpy", "alloc-free"
WAKES = ("wake-pipe", "wake-semaphore")
TORCH_QUEUES = ("torch-queue-fd", "torch-queue-fs")


class NotMeasuredError(Exception):
    """The run left out what a target needs."""


class Medians:
    """The p50 of every candidate at every size, in microseconds."""

    def __init__(self, series: Sequence[Series]) -> None:
        self._series = {one.name: one for one in series}

    def at(self, name: str, size: int) -> float:
        point = self._find(name).at(size)
        if point is None:
            raise NotMeasuredError(f"{name} at {size}")
        return point.p50_us

    def all(self, name: str) -> list[float]:
        return [point.p50_us for point in self._find(name).points]

    def shortest(self, names: Sequence[str], size: int) -> float:
        """Of those that were measured: the strictest to be compared with."""
        found = [self.at(name, size) for name in names if name in self._series]
        if not found:
            raise NotMeasuredError(" or ".join(names))
        return min(found)

    def _find(self, name: str) -> Series:
        if name not in self._series:
            raise NotMeasuredError(name)
        return self._series[name]


# The measured value, and the numbers it was made of, in words.
Measure = Callable[[Medians], tuple[float, str]]


def judge(series: Sequence[Series]) -> list[Target]:
    medians = Medians(series)
    return [
        _at_most(
            "in-place-flat",
            f"handoff in place: {LARGE_TOKENS:,} tokens against {SMALL_TOKENS}, under",
            FLAT_IN_PLACE,
            medians,
            _flat_in_place,
            strictly=True,
        ),
        _at_most(
            "copy-to-floor",
            f"handoff with copy at {COPY_TOKENS:,} tokens against memcpy + wake, at most",
            COPY_TO_FLOOR,
            medians,
            _copy_to_floor,
        ),
        _at_least(
            "copy-to-torch",
            f"handoff with copy at {COPY_TOKENS:,} tokens, faster than torch's Queue by",
            FASTER_THAN_TORCH,
            medians,
            _copy_to_torch,
        ),
        _at_most(
            "alloc-cost",
            "alloc + free in the slowest pool, at most",
            ALLOC_US,
            medians,
            _alloc_cost,
            unit="us",
        ),
        _at_most(
            "alloc-flat",
            "alloc + free, slowest against fastest pool, under",
            FLAT_ALLOC,
            medians,
            _alloc_flat,
            strictly=True,
        ),
    ]


def _flat_in_place(medians: Medians) -> tuple[float, str]:
    large, small = medians.at(IN_PLACE, LARGE_TOKENS), medians.at(IN_PLACE, SMALL_TOKENS)
    return large / small, f"{large:.1f} us / {small:.1f} us"


def _copy_to_floor(medians: Medians) -> tuple[float, str]:
    copy, memcpy = medians.at(COPY, COPY_TOKENS), medians.at(MEMCPY, COPY_TOKENS)
    wake = medians.shortest(WAKES, 0)
    return copy / (memcpy + wake), f"{copy:.1f} us / ({memcpy:.1f} us + {wake:.1f} us)"


def _copy_to_torch(medians: Medians) -> tuple[float, str]:
    copy = medians.at(COPY, COPY_TOKENS)
    torch = medians.shortest(TORCH_QUEUES, COPY_TOKENS)
    return torch / copy, f"{torch:.1f} us / {copy:.1f} us, its faster strategy"


def _alloc_cost(medians: Medians) -> tuple[float, str]:
    costs = medians.all(ALLOC)
    return max(costs), "pools: " + ", ".join(f"{cost:.1f} us" for cost in costs)


def _alloc_flat(medians: Medians) -> tuple[float, str]:
    costs = medians.all(ALLOC)
    return max(costs) / min(costs), f"{max(costs):.1f} us / {min(costs):.1f} us"


def _at_most(
    name: str,
    words: str,
    limit: float,
    medians: Medians,
    measure: Measure,
    *,
    unit: str = "x",
    strictly: bool = False,
) -> Target:
    def meets(value: float) -> bool:
        return value < limit if strictly else value <= limit

    return _target(name, words, limit, unit, medians, measure, meets)


def _at_least(name: str, words: str, limit: float, medians: Medians, measure: Measure) -> Target:
    return _target(name, words, limit, "x", medians, measure, lambda value: value >= limit)


def _target(
    name: str,
    words: str,
    limit: float,
    unit: str,
    medians: Medians,
    measure: Measure,
    meets: Callable[[float], bool],
) -> Target:
    measured: float | None
    met: bool | None
    try:
        measured, explanation = measure(medians)
        met = meets(measured)
    except NotMeasuredError as missing:
        measured, met, explanation = None, None, f"not measured in this run: {missing}"
    return Target(
        name=name,
        statement=f"{words} {limit:g} {unit}",
        measured=measured,
        limit=limit,
        unit=unit,
        met=met,
        explanation=explanation,
    )
