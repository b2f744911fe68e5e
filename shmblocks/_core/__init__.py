"""The compiled core, where there is one: the hot operations of pools and queues in C.

Contract
- Everything works without it, with the same bytes: the Python of `_state` is its specification.
  Processes with and without it share one pool.
- Whatever is out of the ordinary it leaves to Python, before its first store (`core.h`).
- It is built where there is a compiler (`setup.py`). `SHMBLOCKS_CORE=0` in the environment does as
  if it were not there.

What it does not do: raise an error of this library, or know what a pool is for.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import shmblocks._core._native as _native

# The setting, and what there is of it. "faults": the build that dies at a given store, for tests.
SETTING = os.environ.get("SHMBLOCKS_CORE", "1")


def _load() -> tuple[ModuleType | None, str]:
    """The extension, or why there is none."""
    if SETTING == "0":
        return None, "switched off by SHMBLOCKS_CORE=0"
    name = "_faults" if SETTING == "faults" else "_native"
    try:
        return importlib.import_module(f"shmblocks._core.{name}"), ""
    except ImportError as error:
        return None, f"not built for this Python ({error})"


_loaded, why_not = _load()


def switch_off(why: str) -> None:
    """Pools and queues that this process opens from here on do without it."""
    global _loaded, why_not
    _loaded, why_not = None, why


def use(layout_version: int) -> None:
    """Only an extension that was built for this layout is used."""
    if _loaded is not None and layout_version != _loaded.LAYOUT_VERSION:
        built = _loaded.LAYOUT_VERSION
        switch_off(f"built for layout {built}, this is {layout_version}; install again")


def is_used() -> bool:
    """Whether pools and queues of this process use it."""
    return _loaded is not None


def know(what: str, kind: type) -> None:
    """Tell it a class whose objects it reads and makes; what it cannot reach switches it off."""
    if _loaded is not None and not _loaded.know(what, kind):
        switch_off(f"the slots of {kind.__name__} are not where it can reach them")


def pool_core(
    mapping: object, inside: dict[int, list[int]], hints: object, numbers: tuple[int, ...]
) -> _native.PoolCore | None:
    """The operations on one pool; `numbers` in the order of `core_init` in module.c."""
    return None if _loaded is None else _loaded.PoolCore(mapping, inside, hints, numbers)


def queue_core(
    mapping: object, inside: dict[int, list[int]], numbers: tuple[int, ...]
) -> _native.QueueCore | None:
    """The operations on one queue; `numbers` as in `queue_init`."""
    return None if _loaded is None else _loaded.QueueCore(mapping, inside, numbers)


def tensors() -> type[_native.Tensors] | None:
    """What makes tensors of a field's rows."""
    return None if _loaded is None else _loaded.Tensors
