"""Runs a function in a fresh interpreter that has imported no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

from tests.support.children import Channel, spawn

P = ParamSpec("P")
T = TypeVar("T")

# Seconds for all points of one operation, on a machine that does other things too.
LONGEST = 540.0


def run_in_fresh_interpreter(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of `function(*args, **kwargs)`, called over there."""
    with spawn(_call, function, args, kwargs) as child:
        return cast("T", child.result(timeout=LONGEST))


def _call(
    _: Channel, function: Callable[..., T], args: tuple[object, ...], kwargs: dict[str, object]
) -> T:
    return function(*args, **kwargs)
