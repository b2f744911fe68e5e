"""A report as text.

It decides how a number is shown, never what is shown for which transport.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.report import Point, Report, Target

METHOD = """\
One message at a time between two processes. Latency: from the producer's start of the handoff to
the consumer having read from a tensor; both stamps CLOCK_MONOTONIC, one way. Cells: p50 (p99);
with fewer than 100 messages the p99 is the maximum. Every byte of every message was compared,
outside the timed part. Peak PSS: of all processes of a row together, Python and torch included, in
a round that is not timed.\
"""


@dataclass(frozen=True)
class Grid:
    """A table before it is drawn: rows of cells, in each first words and then numbers."""

    title: str
    header: list[str]
    rows: list[list[str]]
    # How many columns are words, and stand to the left.
    words: int = 1


def duration(microseconds: float) -> str:
    """Three digits that matter: `87.2 us`, `1.69 ms`."""
    if microseconds < 1_000:
        return f"{_three_digits(microseconds)} us"
    if microseconds < 1_000_000:
        return f"{_three_digits(microseconds / 1_000)} ms"
    return f"{_three_digits(microseconds / 1_000_000)} s"


def megabytes(size: int) -> str:
    return f"{_three_digits(size / 1e6)} MB"


def cell(point: Point | None) -> str:
    """`p50 (p99)`."""
    return "" if point is None else f"{duration(point.p50_us)} ({duration(point.p99_us)})"


def show(report: Report) -> None:
    """Print everything there is to say about a run."""
    print(_machine(report))
    print(METHOD)
    for grid in grids(report):
        print(f"\n{drawn(grid)}")
    for one in report.experiments:
        print(f"\n{drawn(Grid(one.title, one.header, one.rows))}")
        print(textwrap.fill(one.note, 98))
    if report.left_out:
        print(f"\nnot measured: {'; '.join(report.left_out)}")
    print(f"\n{drawn(targets_grid(report.targets))}")


def grids(report: Report) -> list[Grid]:
    sizes = [f"{size:,}: {megabytes(size * report.hidden * 2)}" for size in report.tokens]
    handoffs = [
        [one.label, *(cell(one.at(size)) for size in report.tokens), megabytes(one.peak_pss_bytes)]
        for one in report.series
        if one.carries_data
    ]
    wakes = [[one.label, cell(one.at(0))] for one in report.series if not one.carries_data]
    found = [
        Grid(
            f"Latency of a handoff, by tokens of {report.hidden} x {report.dtype}",
            ["", *sizes, "peak PSS"],
            handoffs,
        ),
        Grid("Waking another process, without data", ["", "one way"], wakes),
    ]
    return [grid for grid in found if grid.rows]


def targets_grid(targets: Sequence[Target]) -> Grid:
    return Grid(
        "Targets",
        ["", "", "measured", ""],
        [[one.name, one.statement, _measured(one), verdict(one)] for one in targets],
        words=2,
    )


def verdict(target: Target) -> str:
    if target.met is None:
        return "not measured"
    return "met" if target.met else "NOT met"


def drawn(grid: Grid) -> str:
    """The grid in columns as wide as they need to be, numbers to the right."""
    lines = [grid.header, *grid.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(grid.header))]
    text = [_drawn_line(line, widths, grid.words) for line in lines]
    return "\n".join([grid.title, text[0], "-" * len(text[0]), *text[1:]])


def _drawn_line(cells: list[str], widths: list[int], words: int) -> str:
    padded = [
        text.ljust(width) if column < words else text.rjust(width)
        for column, (text, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded)


def _measured(target: Target) -> str:
    return "" if target.measured is None else f"{target.measured:.2f} {target.unit}"


def _machine(report: Report) -> str:
    machine = report.machine
    return (
        f"{machine.cores} cores ({machine.cpu}), {machine.memory_gib:.0f} GiB, Linux "
        f"{machine.kernel}, Python {machine.python}, torch {machine.torch}, shmblocks "
        f"{machine.shmblocks}; {report.rounds} rounds, seed {report.seed}, {report.seconds:.0f} s"
    )


def _three_digits(value: float) -> str:
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f}"
