"""Every study there is, and how long each takes. A new one is a line here."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.results import Study
from benchmarks.settings import HIDDEN
from benchmarks.studies.attach import GIB, attaching
from benchmarks.studies.budget import budget
from benchmarks.studies.contention import contention
from benchmarks.studies.fragmentation import fragmentation
from benchmarks.studies.throughput import throughput

TOKENS = 2_000


NAMES = ("budget", "throughput", "contention", "attach", "fragmentation")


def study(names: Sequence[str], quick: bool) -> list[Study]:
    """Those of `names`, one after the other. `quick` shows that they work, not numbers."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    made: dict[str, Callable[[], Study]]
    if quick:
        made = {
            "budget": partial(budget, 20),
            "throughput": partial(throughput, context, (1, 2), 64, 64, 20),
            "contention": partial(contention, context, (1, 2), 0.05),
            "attach": partial(attaching, (GIB // 64,)),
            "fragmentation": partial(fragmentation, 256, 2),
        }
    else:
        made = {
            "budget": partial(budget, 4_000),
            "throughput": partial(throughput, context, (1, 2, 8), TOKENS, HIDDEN, 80),
            "contention": partial(contention, context, (1, 2, 4, 8, 16), 2.0),
            "attach": partial(attaching, (GIB, 2 * GIB, 4 * GIB, 8 * GIB)),
            "fragmentation": partial(fragmentation, 512, 60),
        }
    return [made[name]() for name in NAMES if name in names]
