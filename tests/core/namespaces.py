"""Namespaces of the kernel, as containers have them, for a forked child of a test.

Each function changes the calling process for good, so call it only in a child. `why_not()` tells
why it is not allowed here; tests are then skipped with that reason. Everything by `unshare(2)` and
`mount(2)` through the C library: Python has `os.unshare` from 3.12 on only.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable

from tests.support.children import ChildError, run_in_fork

CLONE_NEWNS = 0x00020000
CLONE_NEWPID = 0x20000000
CLONE_NEWTIME = 0x00000080
MS_RDONLY = 1
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 0x4000
MS_PRIVATE = 1 << 18

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(what: str, result: int) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise PermissionError(error, f"{what}: {os.strerror(error)}")


def _mount(source: str, target: str, kind: str, flags: int, data: str) -> None:
    arguments = (source.encode(), target.encode(), kind.encode(), flags, data.encode())
    _checked(f"mount {kind or 'flags'} on {target}", _libc.mount(*arguments))


def enter_own_mounts() -> None:
    """A mount namespace of our own: what is mounted from now on, nobody else sees."""
    _checked("unshare(CLONE_NEWNS)", _libc.unshare(CLONE_NEWNS))
    _mount("none", "/", "", MS_REC | MS_PRIVATE, "")


def shrink_shared_memory(mebibytes: int) -> None:
    """An empty /dev/shm of that size, as a container without --shm-size has one of 64 MiB."""
    enter_own_mounts()
    _mount("tmpfs", "/dev/shm", "tmpfs", 0, f"size={mebibytes}m")


def make_shared_memory_read_only() -> None:
    """/dev/shm with what is in it, and nobody may write there."""
    enter_own_mounts()
    _mount("/dev/shm", "/dev/shm", "", MS_BIND, "")
    _mount("none", "/dev/shm", "", MS_REMOUNT | MS_BIND | MS_RDONLY, "")


def take_shared_memory_away() -> None:
    """A /dev without shm."""
    enter_own_mounts()
    _mount("tmpfs", "/dev", "tmpfs", 0, "")


def set_monotonic_offset(seconds: int) -> None:
    """A time namespace for the children of this process: their monotonic clock is that far off."""
    _checked("unshare(CLONE_NEWTIME)", _libc.unshare(CLONE_NEWTIME))
    with open("/proc/self/timens_offsets", "w") as file:
        file.write(f"monotonic {seconds} 0")


def run_as_first_process(body: Callable[[], None]) -> None:
    """`body()` as pid 1 of a pid namespace of its own with its own /proc; waits for its end."""
    _checked("unshare(CLONE_NEWPID)", _libc.unshare(CLONE_NEWPID))
    child = os.fork()
    if child == 0:
        enter_own_mounts()
        _mount("proc", "/proc", "proc", 0, "")
        try:
            body()
        finally:
            os._exit(0)
    os.waitpid(child, 0)


@functools.cache
def why_no_mounts() -> str:
    """Why a mount namespace cannot be had here; empty when it can."""
    return _why_not(lambda: shrink_shared_memory(1))


@functools.cache
def why_no_pids() -> str:
    """Why a pid namespace cannot be had here; empty when it can."""
    return _why_not(lambda: run_as_first_process(lambda: None))


@functools.cache
def why_no_time() -> str:
    """Why a time namespace cannot be had here; empty when it can."""
    return _why_not(lambda: set_monotonic_offset(1))


def _why_not(attempt: Callable[[], None]) -> str:
    def answer() -> str:
        try:
            attempt()
        except OSError as error:
            return f"namespaces are not allowed here: {error}"
        return ""

    try:
        return run_in_fork(answer)
    except ChildError as error:
        return f"namespaces do not work here: {error}"
