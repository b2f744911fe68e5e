"""Finds what a test, or a whole run, leaves behind: segments, mappings, processes, threads, fds.

- A `Snapshot` before and a comparison after; what was there before is nobody's leak.
- What is still on its way out gets `GRACE_SECONDS` to go; only then is it left behind.
- A descriptor on shared memory is always a leak. Of other descriptors, those are forgiven that
  appeared in a test that imported something for the first time: libraries open sockets, pipes and
  /dev/urandom when they start, and keep them.
- It does *not* see memory that is merely never freed.

`python -m tests.support.leaks PREFIX` looks for leftovers of a whole run, prints them, removes them
and ends with 1 when there were any.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import naming, procfs

# Smaller: a feeder thread or a child that is just ending is called a leak on a loaded machine.
# Larger: each real leak costs that much longer to report.
GRACE_SECONDS = float(os.environ.get("SHMBLOCKS_TEST_GRACE", "3"))
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Leak:
    """One thing left behind. `kind` is segment, mapping, process, thread or descriptor."""

    kind: str
    what: str
    segment: str | None = None
    process: procfs.Process | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}"

    def remove(self) -> None:
        """So that the next test starts clean. Threads and descriptors cannot be taken away."""
        if self.segment is not None:
            Path(procfs.SHARED_MEMORY, self.segment).unlink(missing_ok=True)
        if self.process is not None and self.process.is_running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGKILL)


@dataclass(frozen=True)
class Snapshot:
    """What this process and its run have at one moment."""

    part_of_name: str
    segments: frozenset[str]
    mappings: frozenset[str]
    processes: frozenset[procfs.Process]
    threads: frozenset[threading.Thread]
    descriptors: frozenset[procfs.Descriptor]
    modules: int = field(default_factory=lambda: len(sys.modules))

    @classmethod
    def take(cls, part_of_name: str) -> Snapshot:
        return cls(
            part_of_name=part_of_name,
            segments=frozenset(procfs.segments(part_of_name)),
            mappings=frozenset(procfs.mapped_segments()),
            processes=frozenset(procfs.descendants(os.getpid())),
            threads=frozenset(threading.enumerate()),
            descriptors=frozenset(procfs.descriptors()),
        )

    def leaks_since(self) -> list[Leak]:
        """What is there now and was not then."""
        now = Snapshot.take(self.part_of_name)
        return [
            *(_segment_leak(name) for name in sorted(now.segments - self.segments)),
            *(Leak("mapping", name) for name in sorted(now.mappings - self.mappings)),
            *_process_leaks(now.processes - self.processes),
            *(_thread_leak(thread) for thread in now.threads - self.threads),
            *self._descriptor_leaks(now),
        ]

    def _descriptor_leaks(self, now: Snapshot) -> list[Leak]:
        imported = now.modules > self.modules
        return [
            Leak("descriptor", str(each))
            for each in sorted(now.descriptors - self.descriptors)
            if each.is_segment or not imported
        ]

    def leaks_after_grace(self) -> list[Leak]:
        """What is left once everything on its way out has gone; at once when there is nothing."""
        if not self.leaks_since():
            return []
        deadline = time.monotonic() + GRACE_SECONDS
        while (leaks := self.leaks_since()) and time.monotonic() < deadline:
            gc.collect()  # a reference cycle is no leak, nor is one that a thread leaves at its end
            time.sleep(POLL_SECONDS)
        return leaks


def left_behind_by_run(prefix: str) -> list[Leak]:
    """Segments and processes of a whole run. Call it in the process that started the run."""
    own = set(procfs.ancestors(os.getpid()))
    processes = procfs.processes_with(naming.PREFIX_VARIABLE, prefix)
    return [
        *(_segment_leak(name) for name in sorted(procfs.segments(prefix))),
        *_process_leaks(each for each in processes if each.pid not in own),
    ]


def left_behind_after_grace(prefix: str) -> list[Leak]:
    deadline = time.monotonic() + GRACE_SECONDS
    while (leaks := left_behind_by_run(prefix)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return leaks


def describe(leaks: list[Leak]) -> str:
    return "\n".join(f"  {leak}" for leak in leaks)


def remove(leaks: list[Leak]) -> None:
    for leak in leaks:
        leak.remove()


def reap_orphans(before: Snapshot) -> None:
    """Take note of the end of children that nobody waited for, orphans we adopted among them."""
    for each in frozenset(procfs.descendants(os.getpid())) - before.processes:
        if each.parent == os.getpid() and not each.is_running:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(each.pid, os.WNOHANG)


def _segment_leak(name: str) -> Leak:
    try:
        size = Path(procfs.SHARED_MEMORY, name).stat().st_size
    except FileNotFoundError:
        return Leak("segment", f"{name} (just removed)")
    return Leak("segment", f"{procfs.SHARED_MEMORY}{name} ({size} bytes)", segment=name)


def _process_leaks(processes: Iterable[procfs.Process]) -> list[Leak]:
    return [
        Leak("process", str(each), process=each)
        for each in sorted(processes)
        if each.is_running and not each.is_servant
    ]


def _thread_leak(thread: threading.Thread) -> Leak:
    frame = sys._current_frames().get(thread.ident or 0)
    stack = "".join(traceback.format_stack(frame)) if frame else "    (has just ended)"
    return Leak("thread", f"{thread.name}{' (daemon)' if thread.daemon else ''} at\n{stack}")


def main(arguments: list[str]) -> int:
    leaks = left_behind_after_grace(arguments[0])
    if leaks:
        print(f"left behind by this run of the tests:\n{describe(leaks)}", file=sys.stderr)
        remove(leaks)
    return 1 if leaks else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
