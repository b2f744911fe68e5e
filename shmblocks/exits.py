"""Leaving a segment when its owner is dropped or its process ends in an orderly way.

Three ways out, each with its own hook: the object is collected or the interpreter exits
(`weakref.finalize`), or the process is a child of `multiprocessing`, which ends with `os._exit` and
runs only the finalizers of `multiprocessing.util`. A process that is killed needs none: the kernel
drops its locks.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from typing import Protocol

from shmblocks.errors import InvalidStateError, ShmBlocksError


class Leaves(Protocol):
    """Something that can be left, any number of times."""

    def leave(self) -> None: ...

    def abandon(self) -> None:
        """Let go of it as a death does, and wait for nothing."""
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
    try:
        shared.leave()
    except InvalidStateError:
        # The collector ran in the middle of an operation of this thread on the same segment,
        # through another object, which is there to give back what we held and to leave last.
        shared.abandon()
