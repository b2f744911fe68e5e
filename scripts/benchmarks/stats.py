"""From samples to what is said of them: quantiles, not means, since the tail is another subject."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.results import Point, Sample


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
