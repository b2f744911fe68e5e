"""Runs a function in a fresh interpreter that has imported no torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast
from unittest import mock

from tests.support.children import Channel, spawn

P = ParamSpec("P")
T = TypeVar("T")

# Seconds for all points of one operation, on a machine that does other things too.
LONGEST = 540.0


def run_in_fresh_interpreter(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of `function(*args, **kwargs)`, called over there."""
    with spawn(_call, function, args, kwargs) as child:
        return cast("T", child.result(timeout=LONGEST))


def run_without_core(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """As `run_in_fresh_interpreter`, by the Python alone: where every line is a point."""
    with mock.patch.dict(os.environ, {"SHMBLOCKS_CORE": "0"}):
        return run_in_fresh_interpreter(function, *args, **kwargs)


def run_with_faults(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """As `run_in_fresh_interpreter`, with the compiled core that dies where it is told to."""
    with mock.patch.dict(os.environ, {"SHMBLOCKS_CORE": "faults"}):
        return run_in_fresh_interpreter(function, *args, **kwargs)


def _call(
    _: Channel, function: Callable[..., T], args: tuple[object, ...], kwargs: dict[str, object]
) -> T:
    return function(*args, **kwargs)
