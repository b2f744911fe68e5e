"""SIGKILL at every store into shared memory, and every call of the kernel, of the compiled core.

The operations, scenes and judges are those of the suites that kill at every line: here they get
`kill_at_every_store` in place of `kill_at_every_line`. Run in a fresh interpreter with the build
that dies where it is told to (`SHMBLOCKS_CORE=faults`).

The survivor goes on with the core at every other point, and without it at the others: what one
implementation left half made, the other completes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar
from unittest import mock

from shmblocks._state import lifetime
from shmblocks.testing import Coverage, Point, Step, run_forked
from shmblocks.testing.everyline import Operation, Setup, Verify
from shmblocks.testing.points import end_point

S = TypeVar("S")

SUITES = {
    "pool": "tests.crash.judge",
    "channel": "tests.channel.every_line",
    "cache": "tests.cache.every_line",
    "queue": "tests.queue.every_line",
}


def kill(suite: str, name: str) -> Coverage:
    """Kill one case of a suite at every store of the core."""
    module = importlib.import_module(SUITES[suite])
    with mock.patch.object(module, "kill_at_every_line", _kill_at_every_store):
        coverage: Coverage = module.kill(name)
    return coverage


def _faults() -> ModuleType:
    return importlib.import_module("shmblocks._core._faults")


def _kill_at_every_store(
    setup: Setup[S],
    operation: Operation[S],
    verify: Verify[S],
    **_: Any,  # noqa: ANN401 - what is said of lines means nothing here
) -> Coverage:
    points = []
    with setup() as scene:
        ending = run_forked(functools.partial(_child, operation, scene, 0))
        assert ending.exit_code == 0, ending
        count = int(ending.told)
    for at in range(1, count + 2):
        with setup() as scene:
            ending = run_forked(functools.partial(_child, operation, scene, at))
            assert ending.was_killed == (at <= count), (at, count, ending)
            point = Point(at, "shmblocks/_core", at, "store", 0)
            if at % 2:
                _leave_to_python()
            verify(scene, point if at <= count else end_point(at))
        if at <= count:
            points.append(point)
    return Coverage(operation.__name__, "killed", Step.LINE, tuple(points), len(points))


def _child(
    operation: Callable[[S], Callable[[], object]],
    scene: S,
    at: int,
    tell: Callable[[bytes], None],
) -> None:
    call = operation(scene)
    _faults().die_at(at)
    result: object = None
    with contextlib.suppress(Exception):  # what it raises is the other suites' business
        result = call()
    tell(str(_faults().die_at(0)).encode())
    del result


def _leave_to_python() -> None:
    """From here on this process uses no core on the segments that it has."""
    for segment in lifetime._segments:
        compiled = getattr(segment, "_compiled", None)
        if compiled is not None:
            compiled.forget()
            vars(segment)["_compiled"] = None
