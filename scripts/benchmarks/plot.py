"""A report as one picture: latency of a handoff against tokens, both logarithmic.

Baselines are dashed and grey, shmblocks is thick and coloured, peers are thin; each line is named
at its right end, so nothing has to be looked up in a legend. Needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.report import Report, Series
from benchmarks.table import duration, megabytes
from benchmarks.transport import Kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS_COLOURS = ("#c2410c", "#0f766e", "#f59e0b", "#15803d")
PEER_COLOURS = (
    "#2563eb", "#7c3aed", "#be185d", "#a16207", "#4d7c0f", "#0e7490", "#9f1239", "#4338ca",
    "#57534e",
)  # fmt: skip
BASELINE_COLOUR = "#6b7280"

# Transports that the title names, and how.
HEADLINE = (
    ("shmblocks-channel", "in place"),
    ("shmblocks-channel-copy", "with a copy"),
    ("torch-queue-fd", "by torch's Queue"),
)

# A picture of more than a dozen lines cannot be read: what differs little from another line is in
# the table alone.
ONLY_IN_TABLES = {
    "wake-pipe",
    "wake-semaphore",
    "wake-sleep",
    "shmblocks-in-place",
    "shmblocks-in-place-pipe",
    "shmblocks-asleep",
    "shmblocks-copy",
    "shared-memory",
    "torch-queue-fs",
    "zmq-copy",
}

# Of the height of the axes: nearer than this, two labels would touch.
LABEL_GAP = 0.048


class End(NamedTuple):
    """The last point of a line, and how it is named there."""

    size: int
    p50_us: float
    label: str
    colour: str
    weight: str


class NothingToPlotError(ValueError):
    """The run has no handoffs."""


def save_plot(report: Report, path: Path) -> None:
    """Write the picture; the name's ending says in which format."""
    if not report.series:
        raise NothingToPlotError("expected at least one transport, got none")
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 6.6), layout="constrained")
    colours = {Kind.OURS: iter(OURS_COLOURS), Kind.PEER: iter(PEER_COLOURS)}
    shown = [one for one in report.series if one.name not in ONLY_IN_TABLES] or report.series
    ends = [_draw(axes, one, report.tokens, colours) for one in shown]
    _scales(axes, report, shown)
    _name_lines(axes, ends)
    figure.suptitle(_title(report), x=0.01, ha="left", fontsize=14, fontweight="bold")
    axes.set_title(_subtitle(report), loc="left", fontsize=9, color="#4b5563")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw(
    axes: Axes, series: Series, tokens: Sequence[int], colours: Mapping[Kind, Iterator[str]]
) -> End:
    """A transport without sizes (a bare wake) is a level line over all of them."""
    kind = Kind(series.kind)
    is_ours = kind is Kind.OURS
    repeats = 1 if series.carries_data else len(tokens)
    sizes = [point.size for point in series.points] if series.carries_data else list(tokens)
    p50 = [point.p50_us for point in series.points] * repeats
    if kind is Kind.BASELINE:
        colour = BASELINE_COLOUR
        axes.plot(sizes, p50, color=colour, linestyle=(0, (5, 3)), linewidth=1.4)
    else:
        colour = next(colours[kind], BASELINE_COLOUR)
        width, size, order = (3.2, 6, 3) if is_ours else (1.6, 4, 2)
        axes.plot(sizes, p50, color=colour, lw=width, marker="o", markersize=size, zorder=order)
    if is_ours and series.name in dict(HEADLINE):
        p99 = [point.p99_us for point in series.points]
        axes.fill_between(sizes, p50, p99, color=colour, alpha=0.12, lw=0)
    return End(sizes[-1], p50[-1], series.label, colour, "bold" if is_ours else "normal")


def _scales(axes: Axes, report: Report, shown: Sequence[Series]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(report.tokens, [_size_label(size, report) for size in report.tokens])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: _short_duration(value))
    axes.set_ylim(bottom=min(point.p50_us for one in shown for point in one.points) / 2)
    axes.set_xlabel(f"tokens of {report.hidden} x {report.dtype}")
    axes.set_ylabel("latency of one handoff (lower is better)")
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _name_lines(axes: Axes, ends: Sequence[End]) -> None:
    """Labels right of the lines' ends, pushed apart where they would touch."""
    to_fraction = axes.transAxes.inverted()

    def height(end: End) -> float:
        return float(to_fraction.transform(axes.transData.transform((end.size, end.p50_us)))[1])

    ordered = sorted(ends, key=height)
    for end, at in zip(ordered, spread([height(end) for end in ordered], LABEL_GAP), strict=True):
        axes.annotate(
            f"{end.label}  {duration(end.p50_us)}",
            (1.01, at),
            xycoords="axes fraction",
            va="center",
            color=end.colour,
            fontsize=10,
            fontweight=end.weight,
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved as little as that goes, so that neighbours are `gap` apart."""
    placed: list[list[float]] = []  # groups of neighbours that touch, each kept around its middle
    for height in heights:
        group = [height]
        while placed and _top(placed[-1], gap) + gap > _bottom(group, gap):
            group = placed.pop() + group
        placed.append(group)
    return [_bottom(group, gap) + gap * index for group in placed for index in range(len(group))]


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
        "Median of one handoff. Shaded: up to the p99. Dashed: baselines of the machine.  "
        f"{machine.cores} cores, Python {machine.python}, torch {machine.torch}"
    )
