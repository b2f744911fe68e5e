"""Measurements that are no handoffs. A new one is a module here and an entry in `EXPERIMENTS`.

Each module has one function that measures and gives an `Experiment`: a table, what it means, and
the numbers behind it by name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import cast

from benchmarks.report import Experiment
from benchmarks.settings import HIDDEN

GIB = 1 << 30
# Ray is the last: its daemons are neighbours that nobody else has.
CACHES = ("shmblocks", "safetensors in /dev/shm", "Redis, Unix socket", "Ray object store")
# Those that every machine has.
QUICK_NODES = ("memcpy", "raw TCP", "raw TCP, MSG_WAITALL", "shmblocks.nodes")

# Name -> arguments of the module's function of that name: for numbers, and to show that it works.
EXPERIMENTS: dict[str, tuple[tuple[object, ...], tuple[object, ...]]] = {
    "steps": ((4_000,), (20,)),
    "throughput": (((1, 2, 8), 2_000, HIDDEN, 80), ((1, 2), 64, 64, 20)),
    "contention": (((1, 2, 4, 8, 16), 2.0), ((1, 2), 0.05)),
    "pool_sizes": (
        ((512, 8_192, 65_536, 1_048_576), 2_000, (GIB, 2 * GIB, 4 * GIB, 8 * GIB)),
        ((512, 8_192), 20, (GIB // 64,)),
    ),
    "lock_time": (((512, 65_536, 1_048_576), (100, 1_000), 9), ((512, 4_096), (100, 1_000), 1)),
    "fragmentation": ((512, 60), (256, 2)),
    "hit_rates": ((1_000, 6_000, 1), (40, 100, 1)),
    "cache_costs": (((100, 1_000, 10_000, 100_000), 3_000), ((20, 200), 20)),
    "cache_peers": (((64, 2_000, 16_384), 60, CACHES), ((64,), 2, CACHES[:2])),
    "cache_processes": (((1, 2, 4, 8, 16), 2.0, 30), ((1, 2), 0.05, 1)),
    "nodes": (((64, 1_984, 16_384, 34_880), 30), ((2, 64), 2, QUICK_NODES)),
}


def experiment(name: str, quick: bool) -> Experiment:
    """Make one of them. `quick` shows that it works, not numbers."""
    arguments = EXPERIMENTS[name][int(quick)]
    function = getattr(importlib.import_module(f"benchmarks.experiments.{name}"), name)
    return cast("Callable[..., Experiment]", function)(*arguments)


def experiments(names: Sequence[str], quick: bool) -> list[Experiment]:
    """Those of `names`, one after the other."""
    return [experiment(name, quick) for name in EXPERIMENTS if name in names]
