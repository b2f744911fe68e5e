"""Draws what `scripts/sglang --handover --json FILE` has measured: `python -m sglang_cases.plot`.

Needs matplotlib, which the environment of SGLang does not have: run it with the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import NamedTuple

KINDS = ("bytes", "handle", "view")
LABELS = {
    "bytes": "bytes over TCP (SGLang)",
    "handle": "handle, SGLang copies once",
    "view": "handle, read in place",
}
COLORS = {"bytes": "#888888", "handle": "#3b76af", "view": "#2f8f5b"}
MEGABYTE = 1e6
ROW_BYTES = 3584 * 2


class Measured(NamedTuple):
    """Medians of one size and number of ranks, in milliseconds, by kind."""

    megabytes: float
    ranks: int
    milliseconds: dict[str, float]


def read(path: Path) -> list[Measured]:
    """What was measured, by ranks and size."""
    found = [
        Measured(
            row["rows"] * ROW_BYTES / MEGABYTE,
            row["ranks"],
            {
                kind: statistics.median(sample[0] for sample in row["samples"][kind])
                for kind in KINDS
            },
        )
        for row in json.loads(path.read_text())
    ]
    return sorted(found, key=lambda each: (each.ranks, each.megabytes))


def draw(measured: list[Measured], target: Path) -> None:
    """One panel for each number of ranks."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    ranks = sorted({each.ranks for each in measured})
    figure, axes = plt.subplots(
        1, len(ranks), figsize=(3.6 * len(ranks), 3.4), sharey=True, squeeze=False
    )
    for axis, count in zip(axes[0], ranks, strict=True):
        rows = [each for each in measured if each.ranks == count]
        for kind in KINDS:
            axis.plot(
                [each.megabytes for each in rows],
                [each.milliseconds[kind] for each in rows],
                marker="o",
                color=COLORS[kind],
                label=LABELS[kind],
            )
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(f"{count} rank{'s' if count > 1 else ''}")
        axis.set_xlabel("embedding, MB")
        axis.grid(visible=True, which="major", alpha=0.3)
    axes[0][0].set_ylabel("ms to the last rank assembled")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=130)


def main() -> None:
    """Read, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measured", type=Path)
    parser.add_argument("image", type=Path)
    arguments = parser.parse_args()
    draw(read(arguments.measured), arguments.image)


if __name__ == "__main__":
    main()
