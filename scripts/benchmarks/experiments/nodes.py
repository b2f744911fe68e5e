"""Blocks of another node, beside raw TCP and its peers; see `benchmarks.between_nodes`."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.between_nodes.turns import OURS, RAW, Measured, measure
from benchmarks.report import Experiment

NOTE = (
    "Two processes per transport over loopback, in turns. GB/s is the median's, `of raw` its ratio"
    " to raw TCP's; CPU seconds per GB of reader + source. memcpy has no network; NIXL, Mooncake"
    " and Ray hold no lease and publish nothing."
)


def nodes(tokens: Sequence[int], rounds: int, only: Sequence[str] = ()) -> Experiment:
    """Every transport that is installed, at every size."""
    measured, left_out = measure(tokens, rounds, only)
    raw = {each.payload_bytes: each for each in measured if each.transport == RAW}
    missing = "".join(f" Not measured: {each.transport} ({each.why})." for each in left_out)
    return Experiment(
        name="nodes",
        title="Blocks of another node, over TCP",
        note=NOTE + missing,
        header=["MB", "transport", "median ms", "best ms", "GB/s", "of raw", "CPU s/GB"],
        rows=[_row(each, raw[each.payload_bytes]) for each in measured],
        numbers=dict(_numbers(measured, raw)),
    )


def _row(each: Measured, raw: Measured) -> list[str]:
    return [
        f"{each.payload_bytes / 1e6:.2f}",
        each.transport,
        f"{each.median_seconds * 1e3:.2f}",
        f"{each.best_seconds * 1e3:.2f}",
        f"{each.payload_bytes / each.median_seconds / 1e9:.2f}",
        f"{raw.median_seconds / each.median_seconds:.2f}",
        f"{each.reader_cpu:.2f} + {each.source_cpu:.2f}",
    ]


def _numbers(measured: Sequence[Measured], raw: dict[int, Measured]) -> list[tuple[str, float]]:
    found = []
    for each in measured:
        at = f"{each.transport} {each.payload_bytes / 1e6:.2f} MB"
        found += [
            (f"{at}: median ms", each.median_seconds * 1e3),
            (f"{at}: best ms", each.best_seconds * 1e3),
            (f"{at}: reader CPU s/GB", each.reader_cpu),
            (f"{at}: source CPU s/GB", each.source_cpu),
        ]
        if each.transport == OURS:
            of_raw = raw[each.payload_bytes].median_seconds / each.median_seconds
            found.append((f"{at}: of raw TCP", of_raw))
    return found
