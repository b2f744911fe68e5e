"""A report as one picture: latency of a handoff against tokens, both logarithmic.

Floors are dashed and grey, shmblocks is thick and coloured, peers are thin; each line is named
at its right end, so nothing has to be looked up in a legend. Needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.link import Kind
from benchmarks.results import Report, Series
from benchmarks.table import duration, megabytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS_COLOURS = ("#c2410c", "#0f766e", "#f59e0b", "#15803d")
PEER_COLOURS = (
    "#2563eb",
    "#7c3aed",
    "#be185d",
    "#a16207",
    "#4d7c0f",
    "#0e7490",
    "#9f1239",
    "#4338ca",
    "#57534e",
)
FLOOR_COLOUR = "#6b7280"

# Candidates that the title names, and how.
HEADLINE = (
    ("shmblocks-in-place", "in place"),
    ("shmblocks-copy", "with a copy"),
    ("torch-queue-fd", "by torch's Queue"),
)

# Of the height of the axes: nearer than this, two labels would touch.
LABEL_GAP = 0.048


@dataclass(frozen=True)
class Line:
    """One candidate, ready to be drawn."""

    label: str
    kind: Kind
    colour: str
    sizes: list[int]
    p50_us: list[float]
    p99_us: list[float]
    # Named in the title, and drawn with its p99.
    is_headline: bool


class NothingToPlotError(ValueError):
    """The run has no handoffs."""


def save_plot(report: Report, path: Path) -> None:
    """Write the picture; the name's ending says in which format."""
    lines = lines_of(report)
    if not lines:
        raise NothingToPlotError("expected at least one candidate with sizes in tokens, got none")
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 6.6), layout="constrained")
    for line in lines:
        _draw(axes, line)
    _scales(axes, report, lines)
    _name_lines(axes, lines)
    figure.suptitle(_title(report), x=0.01, ha="left", fontsize=14, fontweight="bold")
    axes.set_title(_subtitle(report), loc="left", fontsize=9, color="#4b5563")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def lines_of(report: Report) -> list[Line]:
    ours, peers = iter(OURS_COLOURS * 4), iter(PEER_COLOURS * 4)
    colours = {Kind.OURS: ours, Kind.PEER: peers}
    lines = []
    for series in report.series:
        kind = Kind(series.kind)
        if series.size_unit != "blocks":
            colour = FLOOR_COLOUR if kind is Kind.FLOOR else next(colours[kind])
            lines.append(_line(series, kind, colour, report.tokens))
    return lines


def _line(series: Series, kind: Kind, colour: str, tokens: Sequence[int]) -> Line:
    """A candidate without sizes (a bare wake) is a level line over all of them."""
    points = series.points
    if series.size_unit == "none":
        sizes, points = list(tokens), points * len(tokens)
    else:
        sizes = [point.size for point in points]
    p50, p99 = [point.p50_us for point in points], [point.p99_us for point in points]
    is_headline = series.name in dict(HEADLINE)
    return Line(series.label, kind, colour, sizes, p50, p99, is_headline)


def _draw(axes: Axes, line: Line) -> None:
    if line.kind is Kind.FLOOR:
        axes.plot(line.sizes, line.p50_us, color=line.colour, linestyle=(0, (5, 3)), linewidth=1.4)
        return
    ours = line.kind is Kind.OURS
    axes.plot(
        line.sizes,
        line.p50_us,
        color=line.colour,
        linewidth=3.2 if ours else 1.6,
        marker="o",
        markersize=6 if ours else 4,
        zorder=3 if ours else 2,
    )
    if ours and line.is_headline:
        axes.fill_between(line.sizes, line.p50_us, line.p99_us, color=line.colour, alpha=0.12, lw=0)


def _scales(axes: Axes, report: Report, lines: Sequence[Line]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(report.tokens, [_size_label(size, report) for size in report.tokens])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: _short_duration(value))
    axes.set_ylim(bottom=min(min(line.p50_us) for line in lines) / 2)
    axes.set_xlabel(f"tokens of {report.hidden} x {report.dtype}")
    axes.set_ylabel("latency of one handoff (lower is better)")
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _name_lines(axes: Axes, lines: Sequence[Line]) -> None:
    """Labels right of the lines' ends, pushed apart where they would touch."""
    to_fraction = axes.transAxes.inverted()
    ends = [
        (
            to_fraction.transform(axes.transData.transform((line.sizes[-1], line.p50_us[-1])))[1],
            line,
        )
        for line in lines
    ]
    ends.sort(key=lambda end: float(end[0]))
    heights = spread([float(height) for height, _ in ends], LABEL_GAP)
    for height, (_, line) in zip(heights, ends, strict=True):
        axes.annotate(
            f"{line.label}  {duration(line.p50_us[-1])}",
            (1.01, height),
            xycoords="axes fraction",
            va="center",
            color=line.colour,
            fontsize=10,
            fontweight="bold" if line.kind is Kind.OURS else "normal",
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved as little as that goes, so that neighbours are `gap` apart."""
    placed: list[list[float]] = []  # groups of neighbours that touch, each kept around its middle
    for height in heights:
        group = [height]
        while placed and _top(placed[-1], gap) + gap > _bottom(group, gap):
            group = placed.pop() + group
        placed.append(group)
    return [_bottom(group, gap) + gap * place for group in placed for place in range(len(group))]


def _middle(group: Sequence[float]) -> float:
    return sum(group) / len(group)


def _bottom(group: Sequence[float], gap: float) -> float:
    return _middle(group) - gap * (len(group) - 1) / 2


def _top(group: Sequence[float], gap: float) -> float:
    return _middle(group) + gap * (len(group) - 1) / 2


def _size_label(size: int, report: Report) -> str:
    return f"{size:,}\n{megabytes(size * report.hidden * 2)}"


def _short_duration(microseconds: float) -> str:
    if microseconds < 1_000:
        return f"{microseconds:g} us"
    if microseconds < 1_000_000:
        return f"{microseconds / 1_000:g} ms"
    return f"{microseconds / 1_000_000:g} s"


def _title(report: Report) -> str:
    """The picture in one sentence, as far as the run has what it takes."""
    size = max(report.tokens)
    parts = [
        f"{duration(point.p50_us)} {words}"
        for name, words in HEADLINE
        if (series := report.find(name)) is not None and (point := series.at(size)) is not None
    ]
    what = f"{megabytes(size * report.hidden * 2)} to another process"
    return f"{what}: {', '.join(parts)}" if parts else f"Handing {what}"


def _subtitle(report: Report) -> str:
    machine = report.machine
    return (
        "Median of one handoff. Shaded: up to the p99. Dashed: floors of the machine.  "
        f"{machine.cores} cores, Python {machine.python}, torch {machine.torch}"
    )
