"""Closing servers and readers when their owner is dropped, and before the process leaves its pools.

At the end of a process its pools are left (`_state/lifetime.py`), and other processes use their
blocks. Threads that still receive into them must have ended before: `weakref.finalize` runs before
that in any process, and a finalizer of `multiprocessing.util` with this priority in a child of
multiprocessing, which runs nothing else.
"""

from __future__ import annotations

import sys
import threading
import weakref
from typing import Protocol

from shmblocks._state.mutex import is_inside

_BEFORE_POOLS_ARE_LEFT = 20


class Closes(Protocol):
    """Something that can be closed, any number of times."""

    def close(self) -> None: ...


class AllOf:
    """Closes one after the other; borrows them."""

    def __init__(self, *each: Closes | None) -> None:
        self._each = [closes for closes in each if closes is not None]

    def close(self) -> None:
        for closes in self._each:
            closes.close()


def close_at_exit(owner: object, closes: Closes) -> weakref.finalize[..., object]:
    """Close it when `owner` is collected or the process ends; `detach()` takes that back."""
    if "multiprocessing.util" in sys.modules:
        from multiprocessing import util

        # Of `closes`: the entry goes when that does, and there is nothing left to do then.
        util.Finalize(
            closes, _close_if_there, (weakref.ref(closes),), exitpriority=_BEFORE_POOLS_ARE_LEFT
        )
    return weakref.finalize(owner, _close_dropped, closes)


def _close_dropped(closes: Closes) -> None:
    """Closing waits for threads that use the pool; the garbage collector can run while its own
    thread holds the pool's lock. A helper thread closes it then."""
    if is_inside():
        threading.Thread(target=closes.close, name="shmblocks-closing", daemon=True).start()
    else:
        closes.close()


def _close_if_there(reference: weakref.ref[Closes]) -> None:
    closes = reference()
    if closes is not None:
        closes.close()
