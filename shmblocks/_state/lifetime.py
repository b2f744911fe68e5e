"""Leaving a segment when its owner is dropped or its process ends in an orderly way.

Three ways out, each with its own hook: the object is collected or the interpreter exits
(`weakref.finalize`), or the process is a child of `multiprocessing`, which ends with `os._exit` and
runs only the finalizers of `multiprocessing.util`. A process that is killed needs none: the kernel
drops its locks.

The collector may run in the middle of an operation of its thread. Leaving waits, for the lock of
the segment or for streams of a GPU, and what it waits for may wait for that operation: so it is
left to another thread then.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from typing import Protocol

from shmblocks._state.mutex import is_inside
from shmblocks.errors import ShmBlocksError


class Leaves(Protocol):
    """Something that can be left, any number of times."""

    def leave(self) -> None: ...

    def close(self) -> None:
        """Let go of it as a death does."""
        ...


def leave_at_exit(owner: object, shared: Leaves) -> weakref.finalize[..., object]:
    """Leave `shared` when `owner` is collected or the process ends; `detach()` takes it back."""
    if "multiprocessing.util" in sys.modules:
        from multiprocessing import util

        # Of `shared`: the entry goes when that does, and there is nothing left to do then.
        util.Finalize(shared, _leave_if_there, args=(weakref.ref(shared),), exitpriority=10)
    return weakref.finalize(owner, _leave, shared)


def _leave_if_there(reference: weakref.ref[Leaves]) -> None:
    shared = reference()
    if shared is not None:
        with contextlib.suppress(ShmBlocksError):
            _leave(shared)


def _leave(shared: Leaves) -> None:
    if is_inside():
        threading.Thread(
            target=_leave_from_aside, args=(shared,), name="shmblocks-leaving", daemon=True
        ).start()
    else:
        shared.leave()


def _leave_from_aside(shared: Leaves) -> None:
    try:
        shared.leave()
    except ShmBlocksError:
        shared.close()  # as a death does: others reap what it held
