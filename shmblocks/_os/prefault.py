"""Mapping the pages of a segment ahead of their first use: at once, or by a thread.

Contract
- No byte changes. Pages that are not mapped ahead are mapped when they are touched, which is slower
  (a first copy into a pool: 22.7 ms instead of 1.7 ms for 14.3 MB).
- Where no thread can be had (a limit on processes, an interpreter that ends), nothing is mapped
  ahead, and that is no error.
- No such thread runs while its process forks: Python warns of a fork with threads since 3.12. The
  thread is stopped before the fork and goes on in the parent; the child has none.

What it does not do: allocate memory. The pages are in the segment already.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
import weakref

# madvise(2), Linux 5.14; not every Python names them.
MADV_POPULATE_READ = 22
MADV_POPULATE_WRITE = 23
# Bytes populated per call. Smaller: more calls. Larger: a fork or a close waits longer for the
# thread (about 5 ms for this many).
STEP = 64 << 20
# Seconds that a fork waits for the kernel to end a thread that Python has ended. Smaller: a warning
# of Python on a busy machine. Larger: a fork could be held up longer.
GONE_PATIENCE = 0.1


def populate(mapping: mmap.mmap, advice: int, start: int) -> int:
    """Map one step of pages from the offset `start` on; where to go on, `len(mapping)` at the end.

    Before Linux 5.14 the advice is unknown: the answer is the end at once.
    """
    size = len(mapping)
    step = min(STEP, size - start)
    try:
        if step > 0:
            mapping.madvise(advice, start, step)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return size
        raise
    return start + step


def populate_all(mapping: mmap.mmap, advice: int = MADV_POPULATE_WRITE) -> None:
    """Map every page now."""
    position = 0
    while position < len(mapping):
        position = populate(mapping, advice, position)


class Prefault:
    """A thread that maps the pages of one mapping; holds the mapping until it is done."""

    def __init__(self, mapping: mmap.mmap, advice: int = MADV_POPULATE_WRITE) -> None:
        self._mapping: mmap.mmap | None = mapping
        self._advice = advice
        self._position = 0
        self._is_stopping = False
        self._pauses = 0
        self._thread: threading.Thread | None = None
        _running.add(self)
        self._start()

    @property
    def is_over(self) -> bool:
        """Whether every page is mapped, or it was stopped for good."""
        return self._mapping is None

    def stop(self) -> None:
        """End the thread, if it still runs. Idempotent."""
        _running.discard(self)
        self._stop_thread()
        self._mapping = None

    def pause(self) -> None:
        """Before a fork: stop the thread until `resume`, down to the kernel's thread."""
        self._pauses += 1
        thread = self._stop_thread()
        if thread is not None:
            _wait_until_gone(thread)

    def resume(self) -> None:
        """After a fork, in the parent. Of two threads that fork at once, the last one resumes."""
        if self._pauses > 0:
            self._pauses -= 1
            if self._pauses == 0:
                self._start()

    def forget(self) -> None:
        """In a forked child: the thread stayed in the parent."""
        self._thread = self._mapping = None

    def _start(self) -> None:
        if self.is_over:
            return
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="shmblocks-prefault", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # "can't start new thread", also while the interpreter ends
            self._thread = self._mapping = None

    def _stop_thread(self) -> threading.Thread | None:
        thread, self._thread = self._thread, None
        if thread is None or thread.ident is None:
            return None  # (an interrupt may have come before it was started)
        self._is_stopping = True
        thread.join()
        return thread

    def _run(self) -> None:
        mapping = self._mapping
        while mapping is not None and not self._is_stopping:
            try:
                self._position = populate(mapping, self._advice, self._position)
            except OSError:
                break  # the first use of these pages will say the same
            if self._position >= len(mapping):
                break
        else:
            return
        self._mapping = None


def _wait_until_gone(thread: threading.Thread) -> None:
    """Until the kernel has ended a joined thread, which may be a moment after Python has."""
    deadline = time.monotonic() + GONE_PATIENCE
    while os.path.exists(f"/proc/self/task/{thread.native_id}") and time.monotonic() < deadline:
        os.sched_yield()


# For the fork handlers.
_running: weakref.WeakSet[Prefault] = weakref.WeakSet()


def _before_fork() -> None:
    for prefault in list(_running):
        prefault.pause()


def _after_fork_in_parent() -> None:
    for prefault in list(_running):
        prefault.resume()


def _after_fork_in_child() -> None:
    for prefault in list(_running):
        prefault.forget()
    _running.clear()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
