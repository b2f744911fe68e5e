"""A report as text: with rich where it is installed, plain where it is not, the same words.

It decides how a number is shown, never what is shown for which candidate.
"""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.results import Point, Report, Series, Target

METHOD = """\
One message at a time between two processes. Latency: from the producer's start of the handoff to
the consumer having read from a tensor; both stamps CLOCK_MONOTONIC, one way. Cells: p50 (p99);
with fewer than 100 messages the p99 is the maximum. Every byte of every message was compared,
outside the timed part. Peak PSS: of all processes of a row together, Python and torch included, in
a round that is not timed.\
"""

# Columns; more than any table here needs.
WIDEST = 400


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


def show(report: Report) -> None:
    """Print everything there is to say about a run."""
    print(_machine(report))
    print(METHOD)
    for grid in grids(report):
        print()
        draw(grid)
    for study in report.studies:
        print()
        draw(Grid(study.title, study.header, study.rows))
        print(textwrap.fill(study.note, 98))
    if report.left_out:
        print(f"\nnot measured: {'; '.join(report.left_out)}")
    print()
    draw(targets_grid(report.targets))
    print()
    print(*(f"{one.name}: {one.explanation}" for one in report.targets), sep="\n")


def grids(report: Report) -> list[Grid]:
    found = [_handoffs(report), _wakes(report), _allocs(report)]
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


def draw(grid: Grid) -> None:
    if importlib.util.find_spec("rich") is None:
        print(plain(grid))
    else:
        _draw_rich(grid)


def plain(grid: Grid) -> str:
    """The grid in columns as wide as they need to be, numbers to the right."""
    lines = [grid.header, *grid.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(grid.header))]
    text = [_plain_line(line, widths, grid.words) for line in lines]
    return "\n".join([grid.title, text[0], "-" * len(text[0]), *text[1:]])


def _plain_line(cells: list[str], widths: list[int], words: int) -> str:
    padded = [
        cell.ljust(width) if place < words else cell.rjust(width)
        for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded)


def _draw_rich(grid: Grid) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None)
    for place, name in enumerate(grid.header):
        table.add_column(Text(name), justify="left" if place < grid.words else "right")
    for row in grid.rows:
        table.add_row(*(Text(cell, style=_style(cell)) for cell in row))
    # As wide as the numbers need: a narrow terminal wraps lines, it must not cut into them.
    natural = max(Console(width=WIDEST).measure(table).maximum, len(grid.title))
    console = Console(width=natural)
    console.print(Text(grid.title, style="bold"))
    console.print(table)


def _style(cell: str) -> str:
    return {"met": "green", "NOT met": "bold red", "not measured": "yellow"}.get(cell, "")


def _handoffs(report: Report) -> Grid:
    bytes_per_token = report.hidden * 2
    header = [f"{size:,}: {megabytes(size * bytes_per_token)}" for size in report.tokens]
    header.append("peak PSS")
    return Grid(
        f"Latency of a handoff, by tokens of {report.hidden} x {report.dtype}",
        ["", *header],
        [
            [one.label, *_cells(one, report.tokens), megabytes(one.peak_pss_bytes)]
            for one in _with_unit(report, "tokens")
        ],
    )


def _wakes(report: Report) -> Grid:
    rows = [[one.label, *_cells(one, [0])] for one in _with_unit(report, "none")]
    return Grid("Bare wake of a sleeping process, one way", ["", "latency"], rows)


def _allocs(report: Report) -> Grid:
    series = _with_unit(report, "blocks")
    sizes = sorted({point.size for one in series for point in one.points})
    return Grid(
        "Allocator, by blocks of the pool",
        ["", *(f"{size:,}" for size in sizes)],
        [[one.label, *_cells(one, sizes)] for one in series],
    )


def _with_unit(report: Report, unit: str) -> list[Series]:
    return [one for one in report.series if one.size_unit == unit]


def _cells(series: Series, sizes: Sequence[int]) -> list[str]:
    return [_cell(series.at(size)) for size in sizes]


def _cell(point: Point | None) -> str:
    return "" if point is None else f"{duration(point.p50_us)} ({duration(point.p99_us)})"


def _measured(target: Target) -> str:
    return "" if target.measured is None else f"{target.measured:.2f} {target.unit}"


def _machine(report: Report) -> str:
    machine = report.machine
    return (
        f"{machine.cores} cores ({machine.cpu}), {machine.memory_gib:.0f} GiB, Linux "
        f"{machine.kernel}, Python {machine.python}, torch {machine.torch}, shmblocks "
        f"{machine.shmblocks}; {report.rounds} rounds, seed {report.seed}, "
        f"{report.seconds:.0f} s{'' if report.rehearsals else ', without rehearsals'}"
    )


def _three_digits(value: float) -> str:
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f}"
