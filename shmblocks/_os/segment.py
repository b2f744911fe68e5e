"""One POSIX shared memory object: made, found, mapped, prefaulted, removed.

Contract
- `create` makes the object without a name (O_TMPFILE), lets the caller fill it, and only then links
  it to its name, in one atomic step: nobody ever sees a half-made segment, and a creator killed
  before the link leaves nothing, since the kernel drops a nameless file with its last descriptor.
- The memory is really there once `create` returns (`posix_fallocate`): a full /dev/shm is told now,
  not by SIGBUS later.
- `open_existing` opens by name (`shm_open`) and checks identity and size before anything is mapped.
- A mapping lives until its last user is gone; nothing here ever unmaps under one.

It knows the identity words of the header (layout.py), and nothing of what lies behind them.

Linux keeps POSIX shared memory objects as files in /dev/shm (shm_overview(7)); `posix_ipc` opens
and unlinks them, and linking a nameless one needs its path (open(2), O_TMPFILE).
"""

from __future__ import annotations

import contextlib
import errno
import grp
import io
import mmap
import os
import re
import stat
import threading

import posix_ipc

from shmblocks.errors import (
    IncompatiblePoolError,
    PoolNotFoundError,
    PoolPermissionError,
    SharedMemoryFullError,
)

SHM_DIRECTORY = "/dev/shm"
MIB = 1 << 20

# madvise(2), Linux 5.14; not every Python names it.
MADV_POPULATE_WRITE = 23
# Populated per call. Smaller: more calls. Larger: closing waits longer for the background thread.
PREFAULT_STEP = 64 * MIB

_LARGEST_FILE = (1 << 63) - 1

_NAME = re.compile(r"/?([A-Za-z0-9._-]{1,200})")


def normal_name(name: str) -> str:
    """The name with one leading slash; ValueError when it cannot be a pool's name."""
    match = _NAME.fullmatch(name)
    if match is None or match[1] in (".", ".."):
        raise ValueError(
            "pool name: expected 1 to 200 of the letters A-Z a-z 0-9 . _ - (a leading slash is "
            f"allowed), got {name!r}"
        )
    return "/" + match[1]


def path_of(name: str) -> str:
    """The file that the kernel keeps for the segment `name`."""
    return SHM_DIRECTORY + normal_name(name)


class Segment:
    """An open segment: descriptor and mapping. Owns both; removes nothing by itself."""

    def __init__(self, fd: int, size: int, name: str) -> None:
        self.name = name
        self.size_bytes = size
        self._file = file_identity(fd)
        # The mapping keeps a descriptor of its own (Python duplicates it), so that this one can go.
        self.mapping = mmap.mmap(fd, size)
        self.memory = memoryview(self.mapping)
        self.words = self.memory.cast("Q")
        # The description that is mapped, for the lock that falls only when the mapping is gone.
        self._mapped: io.FileIO | None = io.FileIO(os.dup(fd), "rb+", closefd=True)
        self._prefault: _Prefault | None = None

    @property
    def has_name(self) -> bool:
        """Whether the name still leads to this segment."""
        return leads_to(self.name, self._file)

    def unlink(self) -> None:
        """Remove the name, if it is still this segment's and this user may: /dev/shm is sticky,
        what is shared with a group stays as a leftover for its owner. The memory lives on while
        mapped."""
        with contextlib.suppress(PoolPermissionError):
            unlink_file(self.name, self._file)

    def prefault(self, how: str) -> None:
        """Map every page now: `"now"`, `"background"` (a thread) or `"off"`."""
        if how == "now":
            _populate(self.mapping, threading.Event())
        elif how == "background":
            self._prefault = _Prefault(self.mapping)

    def stop_prefault(self) -> None:
        """End the background thread, if one still runs."""
        running, self._prefault = self._prefault, None
        if running is not None:
            running.stop()

    def drop(self) -> None:
        """Let go of the mapping: it goes at once, or with the last tensor or view that uses it."""
        self.words.release()
        self.memory.release()
        del self.mapping
        self._forget_mapped()

    def forget_prefault(self) -> None:
        """In a forked child: the thread stayed in the parent."""
        self._prefault = None

    @property
    def mapped_fd(self) -> int:
        """A descriptor of the description that this process has mapped; -1 when it has not.

        A forked child has none: what it has mapped is its parent's.
        """
        return -1 if self._mapped is None else self._mapped.fileno()

    def forget_parent(self) -> None:
        """In a forked child: leave to the parent what is the parent's."""
        self.forget_prefault()
        self._forget_mapped()

    def _forget_mapped(self) -> None:
        mapped, self._mapped = self._mapped, None
        if mapped is not None:
            mapped.close()


def file_identity(fd: int) -> tuple[int, int]:
    """What tells one file from every other that exists: device and inode number."""
    status = os.fstat(fd)
    return (status.st_dev, status.st_ino)


def leads_to(name: str, file: tuple[int, int]) -> bool:
    """Whether the name belongs to that file."""
    try:
        status = os.stat(path_of(name), follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (status.st_dev, status.st_ino) == file


def unlink_file(name: str, file: tuple[int, int]) -> None:
    """Remove the name if it belongs to that file, and not to a newer one."""
    if not leads_to(name, file):
        return
    try:
        posix_ipc.unlink_shared_memory(name)
    except posix_ipc.ExistentialError:
        return
    except (posix_ipc.PermissionsError, PermissionError):
        raise PoolPermissionError(
            f"pool {name}: only the user who created it can remove it from {SHM_DIRECTORY} (or "
            "root); do it as that user, or choose another name"
        ) from None


class _Prefault:
    """The thread that maps the pages of one mapping."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=_populate, args=(mapping, self._stop), name="shmblocks-prefault", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def _populate(mapping: mmap.mmap, stop: threading.Event) -> None:
    """Map page after page without changing a byte; does nothing where the kernel is too old."""
    size = len(mapping)
    for start in range(0, size, PREFAULT_STEP):
        if stop.is_set():
            return
        try:
            mapping.madvise(MADV_POPULATE_WRITE, start, min(PREFAULT_STEP, size - start))
        except OSError as error:
            # Before Linux 5.14 the advice is unknown (EINVAL): pages are then mapped as they are
            # touched. Anything else (no memory) would come back at the first touch as well.
            if error.errno == errno.EINVAL:
                return
            raise


def create_unnamed(size: int, name: str, group: str | None) -> io.FileIO:
    """New, zeroed, allocated shared memory that has no name yet; the caller closes it.

    A file object and no bare descriptor, here and below: lost to an interrupt, it closes itself.
    """
    flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
    with contextlib.ExitStack() as undo:
        file = undo.enter_context(io.FileIO(os.open(SHM_DIRECTORY, flags, 0o600), "r+b"))
        _allow(file.fileno(), group)
        _allocate(file.fileno(), size, name)
        undo.pop_all()
        return file


def _allow(fd: int, group: str | None) -> None:
    if group is None:
        os.fchmod(fd, 0o600)
        return
    try:
        group_id = grp.getgrnam(group).gr_gid
    except KeyError:
        raise ValueError(f"group: expected the name of a Unix group, got {group!r}") from None
    try:
        os.fchown(fd, -1, group_id)
    except PermissionError:
        raise PoolPermissionError(
            f"group: this user is not in the group {group!r}; give one that `id` lists"
        ) from None
    os.fchmod(fd, 0o660)


def _allocate(fd: int, size: int, name: str) -> None:
    space = os.statvfs(SHM_DIRECTORY)
    free = space.f_bavail * space.f_frsize
    try:
        if size > space.f_blocks * space.f_frsize > 0 or size > _LARGEST_FILE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT):
            raise
        needs = -(-size // MIB)
        raise SharedMemoryFullError(
            f"pool {name}: needs {needs} MiB, {SHM_DIRECTORY} has {free // MIB} MiB free "
            f"({os.strerror(error.errno)}): start the container with --shm-size={needs + 64}m or "
            "more, remove leftovers (`shmblocks reap --all`), or make the pool smaller"
        ) from error


def link_name(fd: int, name: str) -> bool:
    """Give a nameless segment its name, atomically; False when the name is taken."""
    try:
        # Any directory descriptor makes Python call linkat(2), which can follow /proc/self/fd; the
        # kernel does not look at it, since both paths are absolute.
        os.link(f"/proc/self/fd/{fd}", path_of(name), src_dir_fd=fd, follow_symlinks=True)
    except FileExistsError:
        return False
    return True


def open_existing(name: str) -> io.FileIO:
    """The segment `name`; the caller closes it."""
    name = normal_name(name)
    try:
        file = io.FileIO(posix_ipc.SharedMemory(name).fd, "r+b")
    except posix_ipc.ExistentialError:
        raise PoolNotFoundError(
            f"pool {name}: there is no such pool on this node; start its creator first, or give "
            "`attach` a timeout"
        ) from None
    except (posix_ipc.PermissionsError, PermissionError):
        raise PoolPermissionError(
            f"pool {name}: it belongs to another user; run as that user, or create it with "
            "PoolConfig(group=...)"
        ) from None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        raise _no_shared_memory(name) from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise _no_shared_memory(name)
    return file


def _no_shared_memory(name: str) -> IncompatiblePoolError:
    return IncompatiblePoolError(
        f"pool {name}: {path_of(name)} is a directory, link, pipe or socket, not a pool; remove "
        "it, or choose another name"
    )
