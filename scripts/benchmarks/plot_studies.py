"""Studies as pictures: throughput by consumers, contention by processes, fragmentation by policy.

It reads the numbers of a report by their names. Needs matplotlib.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.plot import FLOOR_COLOUR, LABEL_GAP, OURS_COLOURS, PEER_COLOURS, spread
from benchmarks.results import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RATE = re.compile(r"(.+), (\d+) consumers, messages a second")
_PAIRS = re.compile(r"(.+), (\d+) processes, pairs a second")
_FILL = re.compile(r"(.+): in use at the first refusal")

Lines = dict[str, dict[int, float]]


def save_study_plots(report: Report, folder: Path) -> None:
    """A picture for each study that the report has, under the study's name."""
    draw: dict[str, Callable[[Axes, Mapping[str, float]], None]] = {
        "throughput": _throughput,
        "contention": _contention,
        "fragmentation": _fragmentation,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for study in report.studies:
        if study.name in draw:
            _save(folder / f"{study.name}.png", study.title, draw[study.name], study.numbers)


def _save(
    path: Path,
    title: str,
    draw: Callable[[Axes, Mapping[str, float]], None],
    numbers: Mapping[str, float],
) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.8), layout="constrained")
    draw(axes, numbers)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_title(title, loc="left", fontweight="bold")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _throughput(axes: Axes, numbers: Mapping[str, float]) -> None:
    lines = _lines(_RATE, numbers)
    axes.set_yscale("log")
    axes.set_xlabel("consumers of one queue")
    axes.set_ylabel("messages a second (higher is better)")
    _draw(axes, lines, lambda value: f"{value:,.0f}/s")


def _contention(axes: Axes, numbers: Mapping[str, float]) -> None:
    axes.set_xlabel("processes at once")
    axes.set_ylabel("pairs a second, all together (higher is better)")
    lines = _lines(_PAIRS, numbers)
    axes.set_ylim(0, 1.1 * max(max(line.values()) for line in lines.values()))
    _draw(axes, lines, lambda value: f"{value / 1000:,.0f} k/s")


def _fragmentation(axes: Axes, numbers: Mapping[str, float]) -> None:
    found = {match[1]: value for name, value in numbers.items() if (match := _FILL.match(name))}
    bars = axes.barh(list(found), [100 * value for value in found.values()])
    for bar, name in zip(bars, found, strict=True):
        bar.set_color(OURS_COLOURS[1] if "used" in name else FLOOR_COLOUR)
    axes.bar_label(bars, [f"{value:.1%}" for value in found.values()], padding=4)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the pool in use at the first refusal (higher is better)")


def _lines(pattern: re.Pattern[str], numbers: Mapping[str, float]) -> Lines:
    lines: Lines = {}
    for name, value in numbers.items():
        match = pattern.fullmatch(name)
        if match:
            lines.setdefault(match[1], {})[int(match[2])] = value
    return lines


def _draw(axes: Axes, lines: Lines, say: Callable[[float], str]) -> None:
    """Each line is named beside its last point; one of a single point is a dot."""
    places = sorted({place for line in lines.values() for place in line})
    axes.set_xticks(range(len(places)), [str(place) for place in places])
    ours, peers = iter(OURS_COLOURS), iter(PEER_COLOURS * 3)
    ends = []
    for name, line in lines.items():
        is_ours = name.startswith(("shmblocks", "alloc", "put"))
        floor = name.startswith("bare")
        colour = FLOOR_COLOUR if floor else next(ours if is_ours else peers)
        at = [places.index(place) for place in line]
        style = "--" if floor else "-"
        axes.plot(
            at, list(line.values()), style, marker="o", color=colour, lw=3 if is_ours else 1.6
        )
        last = list(line.values())[-1]
        alone = "" if len(line) == len(places) else f" ({max(line)} only)"
        ends.append((last, f"{name}{alone}  {say(last)}", colour))
    _name(axes, sorted(ends))


def _name(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    axes.get_ylim()  # settles the limits, which the places below depend on
    to_fraction = axes.transAxes.inverted()
    heights = [
        float(to_fraction.transform(axes.transData.transform((0, value)))[1])
        for value, _, _ in ends
    ]
    placed = spread(heights, LABEL_GAP * 1.2)
    for height, (_, label, colour) in zip(placed, ends, strict=True):
        axes.annotate(
            label, (1.01, height), xycoords="axes fraction", va="center", color=colour, fontsize=9
        )
