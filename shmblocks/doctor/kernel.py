"""The kernel features that pools stand on, each tried in the real shared memory folder.

Tried and not concluded from a version number: sandboxes, seccomp filters and old kernels differ in
what they refuse. Does not go through a pool: when one of these fails, a pool could only say that
it failed, not which piece is missing.
"""

from __future__ import annotations

import mmap
import os
import platform
import tempfile
from collections.abc import Iterator

from shmblocks._os.filelock import FileLocks
from shmblocks._os.futex import Futex
from shmblocks._os.prefault import MADV_POPULATE_WRITE
from shmblocks._os.process import MACHINES, Interpreter, is_supported
from shmblocks.doctor.host import Host
from shmblocks.doctor.result import CheckResult

OLD_KERNEL = "use a newer kernel, or another sandbox: this one refuses it"


def platform_supported(host: Host) -> Iterator[CheckResult]:
    """Importing the library refuses other machines; here it is said as a finding."""
    interpreter = Interpreter.running()
    if is_supported(interpreter):
        yield CheckResult("platform", "ok", f"{interpreter}, kernel {platform.release()}")
    else:
        advice = f"use 64-bit Linux on {' or '.join(MACHINES)}"
        yield CheckResult("platform", "fail", str(interpreter), advice)


def proc_mounted(host: Host) -> Iterator[CheckResult]:
    """Descriptors are opened anew, and files given a name, through /proc/self/fd."""
    with open(os.devnull, "rb") as file:
        seen = host.path(f"/proc/self/fd/{file.fileno()}").exists()
    if seen:
        yield CheckResult("proc", "ok", "/proc shows this process's descriptors")
    else:
        yield CheckResult(
            "proc",
            "fail",
            "/proc is not mounted, or hides this process's own descriptors",
            "mount -t proc proc /proc",
        )


def ofd_locks(host: Host) -> Iterator[CheckResult]:
    """Two open file descriptions of one file: the second must see the first one's locks."""
    try:
        with tempfile.TemporaryFile(dir=host.shm) as file:
            seen = _lock_is_seen(file.fileno())
    except OSError as error:
        yield CheckResult("ofd-locks", "fail", f"F_OFD_SETLK, flock: {error.strerror}", OLD_KERNEL)
        return
    if seen:
        found = f"an open file description's lock in {host.shm} is seen by another"
        yield CheckResult("ofd-locks", "ok", found)
    else:
        found = f"a lock taken in {host.shm} is not seen through another description"
        yield CheckResult("ofd-locks", "fail", found, OLD_KERNEL)


def _lock_is_seen(fd: int) -> bool:
    holder, other = FileLocks(fd), FileLocks(fd)
    try:
        is_byte_seen = holder.try_lock(1) and other.is_locked_by_others(1)
        return is_byte_seen and holder.try_enter() and not other.try_enter()
    finally:
        holder.close()
        other.close()


def unnamed_files(host: Host) -> Iterator[CheckResult]:
    """A pool is built without a name and gets it when it is whole: O_TMPFILE, then linkat."""
    name = host.shm / f"shmblocks-doctor-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        _link_unnamed(str(host.shm), str(name))
    except OSError as error:
        yield CheckResult(
            "unnamed-files",
            "fail",
            f"O_TMPFILE and linkat in {host.shm}: {error.strerror}",
            "mount a tmpfs on /dev/shm, and see that /proc is mounted",
        )
        return
    found = f"a file without a name in {host.shm} can be given one in one step"
    yield CheckResult("unnamed-files", "ok", found)


def _link_unnamed(folder: str, name: str) -> None:
    fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        # `src_dir_fd` makes Python call linkat, which follows the /proc link; plain link does not.
        os.link(f"/proc/self/fd/{fd}", name, src_dir_fd=fd, follow_symlinks=True)
        os.unlink(name)
    finally:
        os.close(fd)


def populate_write(host: Host) -> Iterator[CheckResult]:
    """Faults the pages of a pool in at once; without it the first copies are slow."""
    try:
        with tempfile.TemporaryFile(dir=host.shm) as file:
            os.posix_fallocate(file.fileno(), 0, mmap.PAGESIZE)
            with mmap.mmap(file.fileno(), mmap.PAGESIZE) as pages:
                pages.madvise(MADV_POPULATE_WRITE)
    except OSError as error:
        yield CheckResult(
            "populate-write",
            "warn",
            f"MADV_POPULATE_WRITE: {error.strerror}: the first use of each page is slower",
            "use Linux 5.14 or newer",
        )
        return
    yield CheckResult("populate-write", "ok", "MADV_POPULATE_WRITE faults pages in at once")


def futex(host: Host) -> Iterator[CheckResult]:
    """Waking between processes: the call must be allowed on shared memory, though nobody sleeps."""
    try:
        with tempfile.TemporaryFile(dir=host.shm) as file:
            os.posix_fallocate(file.fileno(), 0, mmap.PAGESIZE)
            with mmap.mmap(file.fileno(), mmap.PAGESIZE) as pages:
                word = Futex(pages, 0)
                try:
                    word.wake()
                finally:
                    word.drop()  # or the mapping could not be closed
    except OSError as error:
        yield CheckResult("futex", "fail", f"FUTEX_WAKE: {error.strerror}", OLD_KERNEL)
        return
    yield CheckResult("futex", "ok", "sleepers on a word of shared memory can be woken")
