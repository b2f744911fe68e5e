"""Draw what latency.py measured: time to the first token in parts, one panel for each result.

python -m qwen_vl.plot latency.json [MORE.json ...] --out qwen_vl/latency.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib as mpl
import msgspec

from qwen_vl.latency import KINDS, PARTS, PROMPTS, Results

mpl.use("Agg")
from matplotlib import pyplot as plt  # after the choice of what to draw with

COLOURS = ("#bbbbbb", "#4477aa", "#ee6677", "#66ccee", "#dddddd")


def draw(results: list[Results], out: Path) -> None:
    """One panel each, two in a row, bars in groups of a prompt."""
    rows = (len(results) + 1) // 2
    figure, panels = plt.subplots(rows, 2, figsize=(14, 5 * rows), squeeze=False)
    for panel, result in zip(panels.flat, results, strict=False):
        labels, bottoms = [], [0.0] * len(result.series)
        positions = [
            PROMPTS.index(each.prompt) * (len(KINDS) + 1) + KINDS.index(each.kind)
            for each in result.series
        ]
        for part, colour in zip(PARTS, COLOURS, strict=True):
            heights = [each.median(part) for each in result.series]
            panel.bar(positions, heights, bottom=bottoms, color=colour, label=part)
            bottoms = [low + high for low, high in zip(bottoms, heights, strict=True)]
        for each, position, top in zip(result.series, positions, bottoms, strict=True):
            labels.append(f"{each.kind} | {each.prompt}")
            if each.kind == KINDS[0]:
                continue  # nothing is handed over; its prefill has the vision tower in it
            panel.text(
                position, top, f"{each.median('handoff'):.1f}", ha="center", va="bottom", size=7
            )
        panel.set_xticks(positions, labels, rotation=90, size=7)
        panel.set_ylabel("ms to the first token (medians)")
        panel.set_title(f"{result.family} {result.size}, {result.dtype}, {result.device}", size=10)
        panel.legend(fontsize=8)
        panel.margins(y=0.08)
    figure.suptitle(
        "Above the bars: the handoff in ms. The unsplit model's prefill has its vision in it.",
        size=10,
    )
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("qwen_vl/latency.png"))
    args = parser.parse_args()
    draw([msgspec.json.decode(path.read_bytes(), type=Results) for path in args.json], args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
