"""The segments of this process: after a fork, when their object is dropped, and at the end.

    dropped    the last reference to a pool or queue goes: it is left at once, by this thread, or by
               a helper thread when the collector runs inside a transaction
    the end    whatever is still open is left; then what dead processes left behind is removed
    fork       each segment is reset by itself in the child

When the end is:

- `atexit` in a process that never imported multiprocessing, and in a plain forked child.
- After multiprocessing has ended its daemon children, otherwise: a daemon still has the segment
  open when it is terminated, so that whoever leaves before that is not the last one. Finalizers of
  `multiprocessing.util` with a negative priority run then. A child of multiprocessing ends with
  `os._exit` and runs nothing but these; it clears them when it starts, so they are registered
  again behind that (`register_after_fork`).
- A process that is killed, or ends with `os._exit`, needs no end: the kernel drops its locks, and
  others reap what it held. If it was the last one, its segment stays as a leftover.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import weakref
from collections import deque
from typing import Protocol

from shmblocks._os.filelock import FileLocks
from shmblocks._os.segment import file_identity, leads_to, open_existing
from shmblocks._state.mutex import is_inside
from shmblocks._state.naming import unlink_dead
from shmblocks.errors import ShmBlocksError

# Finalizers of multiprocessing with a priority below 0 run after the daemon children have ended.
_BEHIND_THE_DAEMONS = -100
# Segments that this process has left and others have not, at most.
_MOST_LEFT = 256


class Leaves(Protocol):
    """A segment of this process."""

    @property
    def is_closed(self) -> bool: ...

    def leave(self) -> None:
        """Leave in an orderly way, any number of times."""
        ...

    def close(self) -> None:
        """Let go of it as a death does."""
        ...

    def reset_after_fork(self) -> None:
        """In a forked child: hold nothing of the parent's."""
        ...


class _Marker:
    """Something that multiprocessing can refer to weakly."""


_segments: weakref.WeakSet[Leaves] = weakref.WeakSet()
# Which file had which name; the oldest are forgotten.
_left: deque[tuple[tuple[int, int], str]] = deque(maxlen=_MOST_LEFT)
_marker = _Marker()
# The process for which multiprocessing runs `_end`.
_watched_pid = 0


def register(segment: Leaves) -> None:
    """From now on a fork resets it and the end of the process leaves it."""
    _segments.add(segment)


def leave_when_dropped(owner: object, segment: Leaves) -> weakref.finalize[..., object]:
    """Leave `segment` when `owner` is collected; `detach()` takes that back."""
    finalizer = weakref.finalize(owner, _leave_dropped, segment)
    finalizer.atexit = False  # `_end` does it, at the right moment
    return finalizer


def _leave_dropped(segment: Leaves) -> None:
    """Closing waits: for the segment's lock, or for streams of a GPU. The garbage collector can run
    while its own thread holds that lock; a helper thread closes the segment then."""
    if segment.is_closed:
        return
    if not is_inside():
        _leave(segment)
        return
    helper = threading.Thread(target=_leave, args=(segment,), name="shmblocks-leaving", daemon=True)
    try:
        helper.start()
    except RuntimeError:  # no thread is to be had, or the interpreter is ending
        segment.close()


def _leave(segment: Leaves) -> None:
    try:
        segment.leave()
    except ShmBlocksError:
        segment.close()  # as a death does: others reap what it held


# ---- the end of the process ------------------------------------------------------------------


def remember_left(name: str, file: tuple[int, int]) -> None:
    """This process has left a segment that others still use; at its end it removes the leftover,
    should they have been terminated by then."""
    _left.append((file, name))


def watch_exit() -> None:
    """Make sure that the end of this process is noticed; called by whoever joins a segment."""
    global _watched_pid  # noqa: PLW0603
    if "multiprocessing.util" not in sys.modules or _watched_pid == os.getpid():
        return
    from multiprocessing import util

    util.Finalize(None, _end, exitpriority=_BEHIND_THE_DAEMONS)
    util.register_after_fork(_marker, _watch_again)
    _watched_pid = os.getpid()


def _watch_again(marker: _Marker) -> None:
    """In a child of multiprocessing, after it has cleared the finalizers that there were."""
    global _watched_pid  # noqa: PLW0603
    _watched_pid = 0
    watch_exit()


def _at_exit() -> None:
    # Otherwise multiprocessing has run `_end`, or is going to.
    if _watched_pid != os.getpid():
        _end()


def _end() -> None:
    for segment in list(_segments):
        if not segment.is_closed:
            _leave(segment)
    for file, name in list(_left):
        with contextlib.suppress(ShmBlocksError, OSError):
            _remove_leftover(name, file)


def _remove_leftover(name: str, file: tuple[int, int]) -> None:
    if not leads_to(name, file):
        return
    with open_existing(name) as found, contextlib.closing(FileLocks(found.fileno())) as locks:
        if file_identity(found.fileno()) == file:
            unlink_dead(found.fileno(), locks, name, 0.0)


atexit.register(_at_exit)


# ---- fork ------------------------------------------------------------------------------------


def _reset_all() -> None:
    _left.clear()  # the parent's to remove
    segments = list(_segments)
    for segment in segments:
        segment.reset_after_fork()
    if segments:
        watch_exit()


os.register_at_fork(after_in_child=_reset_all)

# Where multiprocessing came first, which is so in each of its children.
watch_exit()
