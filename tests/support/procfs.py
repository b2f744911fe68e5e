"""What the kernel says about processes, descriptors and mappings, read from `/proc`.

Everything here is a look at one moment: a process can end while it is looked at, and then it is
simply not in the answer. Python's own bookkeeping is not asked, because a leak is precisely what
Python's bookkeeping has lost.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SHARED_MEMORY = "/dev/shm/"
# In /dev/shm too, but multiprocessing's: semaphores, and the arenas that it keeps for its Values.
OTHERS = (f"{SHARED_MEMORY}sem.", f"{SHARED_MEMORY}pym-")
PR_SET_CHILD_SUBREAPER = 36

# multiprocessing starts these once per process and keeps them to its end.
SERVANTS = (b"multiprocessing.resource_tracker", b"multiprocessing.forkserver")


class Process(NamedTuple):
    """A process. `started` (clock ticks since boot) tells a reused pid from the one before it."""

    pid: int
    started: int

    @property
    def stat(self) -> list[str] | None:
        """The fields of /proc/PID/stat from the state on; None when this process is gone."""
        fields = _stat(self.pid)
        return fields if fields is not None and int(fields[19]) == self.started else None

    @property
    def is_running(self) -> bool:
        """False for a zombie: it holds no memory, lock or descriptor any more."""
        fields = self.stat
        return fields is not None and fields[0] not in "ZX"

    @property
    def is_servant(self) -> bool:
        command = _read(self.pid, "cmdline")
        return any(name in command for name in SERVANTS)

    @property
    def parent(self) -> int:
        fields = self.stat
        return 0 if fields is None else int(fields[1])

    def __str__(self) -> str:
        command = _read(self.pid, "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
        state = (self.stat or ["gone"])[0]
        return f"pid {self.pid} (parent {self.parent}, state {state}): {command[:200]}"


class Descriptor(NamedTuple):
    """An open file descriptor of this process and what it is open on."""

    number: int
    target: str

    @property
    def is_segment(self) -> bool:
        """On shared memory, also when it never had a name or lost it."""
        return _is_segment(self.target)

    def __str__(self) -> str:
        return f"{self.number} -> {self.target}"


def process(pid: int) -> Process | None:
    fields = _stat(pid)
    return None if fields is None else Process(pid, int(fields[19]))


def all_processes() -> Iterator[Process]:
    for name in os.listdir("/proc"):
        if name.isdigit() and (found := process(int(name))) is not None:
            yield found


def descendants(pid: int) -> Iterator[Process]:
    """Children, their children and so on, zombies included."""
    waiting = [pid]
    while waiting:
        for child in _children(waiting.pop()):
            if (found := process(child)) is not None:
                yield found
                waiting.append(child)


def ancestors(pid: int) -> Iterator[int]:
    """The process itself, its parent and so on up to the first."""
    while pid > 0:
        yield pid
        found = process(pid)
        pid = 0 if found is None else found.parent


def processes_with(variable: str, value: str) -> Iterator[Process]:
    """Running processes that were started with this in their environment, whoever owns them now."""
    wanted = f"{variable}={value}".encode()
    for each in all_processes():
        if wanted in _read(each.pid, "environ").split(b"\0") and each.is_running:
            yield each


def descriptors() -> Iterator[Descriptor]:
    for name in os.listdir("/proc/self/fd"):
        try:
            yield Descriptor(int(name), os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue  # the descriptor of the listing itself, or closed meanwhile


def mapped_segments(part_of_path: str = "") -> Iterator[str]:
    """Paths of the shared memory that this process has mapped.

    What was made without a name is `#INODE (deleted)` for its maker for ever, even if it got a name
    later: to find such a one, compare what is mapped before and after.
    """
    for line in Path("/proc/self/maps").read_text().splitlines():
        *_, path = line.split(maxsplit=5)
        if _is_segment(path) and part_of_path in path:
            yield path


def segments(part_of_name: str) -> Iterator[str]:
    """Names in /dev/shm that contain `part_of_name`."""
    return (name for name in os.listdir(SHARED_MEMORY) if part_of_name in name)


def adopt_orphans() -> None:
    """Make this process the parent of every orphan below it, so that none is overlooked."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"prctl(PR_SET_CHILD_SUBREAPER): {os.strerror(errno)}")


def _is_segment(path: str) -> bool:
    return path.startswith((SHARED_MEMORY, "/memfd:")) and not path.startswith(OTHERS)


def _children(pid: int) -> Iterator[int]:
    # The kernel's own list (each thread has one), because a look at every process takes some 10 ms.
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except FileNotFoundError:
        return
    for thread in threads:
        yield from map(int, _read(pid, f"task/{thread}/children").split())


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return b""


def _stat(pid: int) -> list[str] | None:
    # The second field is the command in parentheses, and may itself contain any character.
    _, closed, fields = _read(pid, "stat").rpartition(b")")
    return fields.decode().split() if closed else None
