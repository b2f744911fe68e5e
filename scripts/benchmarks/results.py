"""What a run found: the shape of the JSON file, and of the messages between its processes.

It holds numbers and their units, and judges nothing.
"""

from __future__ import annotations

import msgspec

FORMAT = 2


class Turn(msgspec.Struct, frozen=True):
    """What the conductor tells a candidate's processes to do next."""

    size: int
    count: int
    warm_up: int
    # Number of the first message: none of a candidate's messages has a number twice.
    first: int


class Sample(msgspec.Struct, frozen=True):
    """One message."""

    latency_ns: int
    # What the consumer spent to give back what the message held. Not part of the latency.
    cleanup_ns: int = 0


class TurnDone(msgspec.Struct, frozen=True):
    samples: list[Sample]


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One candidate at one size."""

    size: int
    count: int
    p50_us: float
    p99_us: float
    min_us: float
    max_us: float
    cleanup_p50_us: float
    latencies_us: list[float]


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """One candidate."""

    name: str
    label: str
    kind: str
    about: str
    # "tokens", "blocks", or "none" for a candidate without a size (its points have size 0).
    size_unit: str
    points: list[Point]
    # Of all its processes together, over all sizes; 0: not looked at.
    peak_pss_bytes: int = 0

    def at(self, size: int) -> Point | None:
        return next((point for point in self.points if point.size == size), None)


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A promise, and what this run says of it."""

    name: str
    statement: str
    # None when the run did not measure what the target needs.
    measured: float | None
    limit: float
    unit: str
    met: bool | None
    explanation: str


class Study(msgspec.Struct, frozen=True, kw_only=True):
    """A measurement that is no handoff: a table for people, and its numbers by name."""

    name: str
    title: str
    note: str
    header: list[str]
    rows: list[list[str]]
    numbers: dict[str, float]


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    cpu: str
    cores: int
    memory_gib: float
    kernel: str
    python: str
    torch: str
    shmblocks: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One run."""

    format: int = FORMAT
    machine: Machine
    tokens: list[int]
    hidden: int
    dtype: str = "bf16"
    rounds: int
    seed: int
    rehearsals: int
    seconds: float
    series: list[Series]
    studies: list[Study]
    # Peers that were not measured, and why.
    left_out: list[str]
    targets: list[Target]

    def find(self, name: str) -> Series | None:
        return next((series for series in self.series if series.name == name), None)


def save(report: Report) -> bytes:
    return msgspec.json.format(msgspec.json.encode(report), indent=1)


def load(data: bytes) -> Report:
    """Raises `msgspec.ValidationError` for a file of another shape or format."""
    report = msgspec.json.decode(data, type=Report)
    if report.format != FORMAT:
        raise msgspec.ValidationError(f"Expected format {FORMAT}, got {report.format}")
    return report
