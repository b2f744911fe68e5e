"""`scripts/vllm --compare FOLDER`: what one item costs, by connector; a table, JSON, and a plot.

One item after the other goes through every connector in turn, each item new: save, look up, load,
and one read of every byte, which is what the engine's gather does. Ratios to two memcpy of the item
in the same process are what counts; a machine's microseconds are not.

Then the hooks of our scheduler with 1,000 items in the pool, by themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vllm_cases.rivals import NOTHING_FREED, Cpu, Example, Ours, Request, Rival

# Rows, width (bf16), measured items.
SIZES = ((64, 3584, 40), (2000, 3584, 20), (2000, 14336, 10), (16384, 3584, 8))
# Items before it is measured: until pages are mapped, and every store has wrapped around.
WARM = 8
# Items that a store holds. More: memory. Fewer: nothing is warm.
HELD = 5
STEPS = ("save", "look up", "load", "read")
HOOKS = ("is there", "has", "after alloc", "plan")


def rivals(width: int, item_bytes: int, folder: Path) -> list[Rival]:
    room = HELD * (item_bytes + (128 << 10))
    return [
        Ours(width, room, in_place=True),
        Ours(width, room, in_place=False),
        Example(width, folder / f"compare-{os.getpid()}"),
        Example(width, Path(f"/dev/shm/vllm-compare-{os.getpid()}-files")),
        Cpu(width, room),
    ]


def timed(call: Callable[..., Any], *arguments: object) -> tuple[float, Any]:
    began = time.perf_counter()
    result = call(*arguments)
    return time.perf_counter() - began, result


def measure(rows: int, width: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Medians in us of each step of each connector, and of a memcpy, for one size."""
    found = rivals(width, rows * width * 2, folder)
    times: dict[str, list[dict[str, float]]] = {rival.name: [] for rival in found}
    floor = []
    target = torch.empty(rows, width, dtype=torch.bfloat16)
    noise = torch.randn(rows, width).to(torch.bfloat16)
    for number in range(WARM + rounds):
        item = (noise * (number + 1)).contiguous()
        took, _ = timed(target.copy_, item)
        floor.append(took)
        # In turn, and each time another one first.
        for rival in found[number % len(found) :] + found[: number % len(found)]:
            times[rival.name].append(_one(rival, item, number, target))
    for rival in found:
        rival.close()
    return {
        "rows": rows,
        "width": width,
        "bytes": rows * width * 2,
        "memcpy": statistics.median(floor[WARM:]) * 1e6,
        "connectors": {
            name: {
                step: statistics.median(each[step] for each in taken[WARM:]) * 1e6 for step in STEPS
            }
            for name, taken in times.items()
        },
    }


def _one(rival: Rival, item: torch.Tensor, number: int, target: torch.Tensor) -> dict[str, float]:
    name = f"{number:064x}"
    loaded: dict[str, torch.Tensor] = {}
    saved, _ = timed(rival.save, {name: item}, name)
    looked_up, plan = timed(rival.look_up, Request(name, len(item)), name)
    took, _ = timed(rival.load, plan, loaded)
    read, _ = timed(target.copy_, loaded[name])
    if not torch.equal(target, item):
        raise ValueError(f"{rival.name}: it gave another item")
    loaded.clear()
    rival.forget(name)
    return dict(zip(STEPS, (saved, looked_up, took, read), strict=True))


def measure_hooks(items: int = 1000, rounds: int = 5000) -> dict[str, dict[str, float]]:
    """Median and 99th percentile in us of each hook of our scheduler; of hits and of misses."""
    ours = Ours(16, items * (64 << 10) + (64 << 20), in_place=False)
    names = [f"{number:064x}" for number in range(items)]
    for name in names:
        ours.save({name: torch.zeros(64, 16, dtype=torch.bfloat16)}, name)
    times: dict[str, list[float]] = {}
    for number in range(rounds):
        is_hit = number % 2 == 0
        name = names[number * 7919 % items] if is_hit else f"{number:063x}m"
        kind = "hit" if is_hit else "miss"
        hooks, request = ours.scheduler, Request(name, 64)
        taken = [
            timed(hooks.ensure_cache_available, request, 0)[0],
            timed(hooks.has_cache_item, name)[0],
            timed(hooks.update_state_after_alloc, request, 0)[0],
        ]
        took, plan = timed(hooks.build_connector_meta, NOTHING_FREED)
        hooks.request_finished(request)
        if is_hit:
            ours.load(plan, {})
        for hook, each in zip(HOOKS, (*taken, took), strict=True):
            times.setdefault(f"{hook}, {kind}", []).append(each)
    ours.close()
    return {
        hook: {
            "median": statistics.median(each) * 1e6,
            "p99": statistics.quantiles(each, n=100)[98] * 1e6,
        }
        for hook, each in times.items()
    }


def table(sizes: list[dict[str, Any]], hooks: dict[str, dict[str, float]]) -> str:
    """As Markdown."""
    names = list(sizes[0]["connectors"])
    lines = [
        "Save + look up + load + one read, in units of two memcpy of the item:",
        "",
        f"| bf16 | {' | '.join(names)} | a memcpy |",
        "|---" * (len(names) + 2) + "|",
    ]
    for size in sizes:
        sums = [sum(size["connectors"][name].values()) / (2 * size["memcpy"]) for name in names]
        what = f"{size['rows']} x {size['width']}, {size['bytes'] / 1e6:.2f} MB"
        figures = " | ".join(f"{each:.2f}" for each in sums)
        lines.append(f"| {what} | {figures} | {size['memcpy']:.0f} us |")
    lines += ["", "The hooks of our scheduler (1,000 items in the pool), us:", ""]
    lines += ["| hook | median | 99th percentile |", "|---|---|---|"]
    lines += [f"| {hook} | {us['median']:.0f} | {us['p99']:.0f} |" for hook, us in hooks.items()]
    return "\n".join(lines)


def plot(sizes: list[dict[str, Any]], path: Path) -> None:
    """Bars by size, stacked by step."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(sizes), figsize=(4 * len(sizes), 4))
    for place, size in zip(axes, sizes, strict=True):
        names = list(size["connectors"])
        below = [0.0] * len(names)
        for step in STEPS:
            heights = [size["connectors"][name][step] / (2 * size["memcpy"]) for name in names]
            place.bar(names, heights, bottom=below, label=step)
            below = [low + high for low, high in zip(below, heights, strict=True)]
        place.set_title(f"{size['bytes'] / 1e6:.2f} MB")
        place.tick_params(axis="x", labelrotation=70)
    axes[0].set_ylabel("units of two memcpy of the item")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/vllm --compare", description=__doc__)
    parser.add_argument("folder", type=Path, help="for the table, the figures and the plot")
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    import vllm.distributed.parallel_state as parallel

    vars(parallel)["get_tensor_model_parallel_rank"] = lambda: 0
    hooks = measure_hooks()
    sizes = [measure(*size, folder) for size in SIZES]
    (folder / "compare.json").write_text(json.dumps({"sizes": sizes, "hooks": hooks}, indent=1))
    text = table(sizes, hooks)
    (folder / "compare.md").write_text(text + "\n")
    print(text)
    plot(sizes, folder / "compare.png")


if __name__ == "__main__":
    main()
