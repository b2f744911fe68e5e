"""What a run found: the JSON file, the messages between its processes, and its quantiles.

It holds numbers and their units, and judges nothing.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import msgspec

FORMAT = 3


class Turn(msgspec.Struct, frozen=True):
    """What a worker does next."""

    count: int = 0
    # Tokens of each message.
    size: int = 0
    # Messages that are carried first and not counted.
    warm_up: int = 0
    # Number of the first message: none of a transport's messages has a number twice.
    first: int = 0
    # For work that is repeated for a time, and not `count` times.
    seconds: float = 0.0
    # Whether throughput is not timed, but every byte filled and compared.
    checks: bool = False


class Sample(msgspec.Struct, frozen=True):
    """One message."""

    latency_ns: int
    # What the consumer spent to give back what the message held. Not part of the latency.
    cleanup_ns: int = 0


class Done(msgspec.Struct, frozen=True):
    """What a worker did in a turn; times are CLOCK_MONOTONIC."""

    samples: list[Sample] = []
    steps: int = 0
    began_ns: int = 0
    ended_ns: int = 0
    # The longest single step.
    longest_ns: int = 0


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One transport at one size."""

    size: int
    count: int
    p50_us: float
    p99_us: float
    min_us: float
    max_us: float
    cleanup_p50_us: float
    latencies_us: list[float]


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """One transport. A transport without data has one point, of size 0."""

    name: str
    label: str
    kind: str
    about: str
    carries_data: bool
    points: list[Point]
    # Of all its processes together, over all sizes; 0: not measured.
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


class Experiment(msgspec.Struct, frozen=True, kw_only=True):
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
    seconds: float
    series: list[Series]
    experiments: list[Experiment]
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


def quantile(values: Sequence[float], fraction: float) -> float:
    """The nearest-rank quantile: always a value that was measured.

    The 0.99 quantile of fewer than 100 values is their maximum.
    """
    if not values:
        raise ValueError("expected at least one value, got none")
    ordered = sorted(values)
    rank = max(1, math.ceil(fraction * len(ordered)))
    return ordered[rank - 1]


def summarise(size: int, samples: Sequence[Sample]) -> Point:
    latencies = [sample.latency_ns / 1_000 for sample in samples]
    return Point(
        size=size,
        count=len(samples),
        p50_us=quantile(latencies, 0.5),
        p99_us=quantile(latencies, 0.99),
        min_us=min(latencies),
        max_us=max(latencies),
        cleanup_p50_us=quantile([sample.cleanup_ns / 1_000 for sample in samples], 0.5),
        latencies_us=latencies,
    )


def this_machine() -> Machine:
    """What the numbers were made on. Numbers without it say little."""
    import torch

    return Machine(
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        kernel=platform.release(),
        python=platform.python_version(),
        torch=str(torch.__version__),
        shmblocks=_version("shmblocks"),
    )


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
