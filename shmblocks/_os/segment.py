"""One POSIX shared memory object: made, found, mapped, removed.

Contract
- `create_unnamed` makes the object without a name (O_TMPFILE). The caller fills it, and `link_name`
  gives it its name in one atomic step: nobody ever sees a half-made segment. The kernel drops a
  nameless file with its last descriptor, so a creator killed before the link leaves nothing.
- Where the file system has no O_TMPFILE (gVisor, old overlays), the object gets a hidden name that
  no segment can have, and `link_name` links that file. Its creator holds a lock on it (NEW_BYTE)
  while it lives; the next creator, or `remove_abandoned`, removes what has lost that lock.
- The memory is really there once `create_unnamed` returns (`posix_fallocate`): a full /dev/shm is
  an error now, not SIGBUS later.
- A mapping lives until its last user is gone; nothing here ever unmaps memory that is in use.
- Mappings are left out of core dumps (MADV_DONTDUMP). A pool is gigabytes of other requests' data;
  what a post-mortem needs of it is in the segment, which outlives the process. The kernel leaves
  named segments out by itself, but not those whose name is gone.

What it does not do: know what the bytes mean. Errors call the segment `kind`: "pool" or "queue".

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
import secrets
import stat
from pathlib import Path
from typing import NoReturn

import posix_ipc

from shmblocks._os.filelock import NEW_BYTE, lock_byte
from shmblocks._os.limits import Refusal, mapping_refusal, refusal_from, refusal_of
from shmblocks._os.prefault import MADV_POPULATE_READ, Prefault, populate_all
from shmblocks.errors import (
    IncompatiblePoolError,
    PoolClosedError,
    PoolNotFoundError,
    PoolPermissionError,
)

SHM_DIRECTORY = "/dev/shm"

# Bytes allocated per call. The kernel takes a call back that a signal interrupts, and Python calls
# again: with a periodic timer, one call for a large pool would never end. Smaller: more calls, of
# about 2 us each. Larger: slower timers can keep a call from ending (this many take 0.5 ms).
ALLOCATION_STEP = 2 << 20

# What a hidden name starts with. Its `~` is in no name of a segment.
HIDDEN = ".shmblocks~"
# Errors of a file system or kernel that has no O_TMPFILE.
_NO_UNNAMED_FILES = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)

_NAME = re.compile(r"/?([A-Za-z0-9._-]{1,200})")


# ---- names -----------------------------------------------------------------------------------


def normal_name(name: str) -> str:
    """The name with one leading slash; ValueError when it cannot be a segment's name."""
    if not isinstance(name, str):
        raise TypeError(f"name: expected a str, got {type(name).__name__}")
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


def file_identity(fd: int) -> tuple[int, int]:
    """What tells one file from every other that exists: device and inode number."""
    status = os.fstat(fd)
    return (status.st_dev, status.st_ino)


def leads_to(name: str, file: tuple[int, int]) -> bool:
    """Whether the name belongs to that file."""
    return _path_leads_to(path_of(name), file)


def _path_leads_to(path: str, file: tuple[int, int]) -> bool:
    try:
        status = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (status.st_dev, status.st_ino) == file


def unlink_file(name: str, file: tuple[int, int], kind: str = "pool") -> None:
    """Remove the name if it belongs to that file, and not to a newer one."""
    if not leads_to(name, file):
        return
    try:
        posix_ipc.unlink_shared_memory(name)
    except posix_ipc.ExistentialError:
        return
    except (posix_ipc.PermissionsError, PermissionError):
        raise PoolPermissionError(
            f"{kind} {name}: only the user who created it can remove it from {SHM_DIRECTORY} (or "
            "root); do it as that user, or choose another name"
        ) from None


# ---- an open segment -------------------------------------------------------------------------


class Segment:
    """An open segment: descriptor and mappings. Owns both; removes nothing by itself."""

    def __init__(self, fd: int, size: int, name: str, kind: str = "pool") -> None:
        """Map `size` bytes of the file behind `fd`, which stays the caller's."""
        self.name = name
        self.kind = kind
        self.size_bytes = size
        self.identity = file_identity(fd)
        # The description that is mapped: for more mappings, and for the lock that falls only when
        # the mapping is gone.
        self._file = io.FileIO(os.dup(fd), "rb+", closefd=True)
        # In a forked child the description, like the mapping, is its parent's too.
        self._is_parents = False
        try:
            self.mapping = self._map(0, size, mmap.ACCESS_WRITE)
        except BaseException:
            self._file.close()
            raise
        self.memory = memoryview(self.mapping)
        self.words = self.memory.cast("Q")
        # By offset and length, in bytes.
        self._readonly: dict[tuple[int, int], mmap.mmap] = {}
        self._how_prefault = "off"
        self._prefaults: list[Prefault] = []

    @property
    def has_name(self) -> bool:
        """Whether the name still leads to this segment."""
        return leads_to(self.name, self.identity)

    def unlink(self) -> None:
        """Remove the name, if it is still this segment's and this user may.

        /dev/shm is sticky: what is shared with a group stays as a leftover for its owner. The
        memory lives on while it is mapped.
        """
        with contextlib.suppress(PoolPermissionError):
            unlink_file(self.name, self.identity, self.kind)

    # ---- mappings ----------------------------------------------------------------------------

    def readonly_mapping(self, offset: int, length: int) -> mmap.mmap:
        """`length` bytes from `offset` (a multiple of the page size) on, mapped once more, to read.

        A write through it is a fault (SIGSEGV). Made at the first call, the same one afterwards,
        in forked children too. It goes with the segment, or with its last view.
        """
        key = (offset, length)
        mapping = self._readonly.get(key)
        if mapping is None:
            made = self._map(offset, length, mmap.ACCESS_READ)
            mapping = self._readonly.setdefault(key, made)  # two threads get the same
            if mapping is made:
                self._map_ahead(mapping, MADV_POPULATE_READ)
        return mapping

    def private_mapping(self, offset: int, length: int) -> mmap.mmap:
        """As `readonly_mapping`, but writable, copy-on-write (MAP_PRIVATE), and the caller's own.

        What the caller writes, nobody else sees. What others write shows in the pages that the
        caller has not written.
        """
        return self._map(offset, length, mmap.ACCESS_COPY)

    def _map(self, offset: int, length: int, access: int) -> mmap.mmap:
        try:
            fd = self._file.fileno()
        except ValueError:
            raise PoolClosedError(
                f"{self.kind} {self.name}: closed in this process; attach it again"
            ) from None
        try:
            mapping = mmap.mmap(fd, length, access=access, offset=offset)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            _raise(mapping_refusal(length), self.name, self.kind, error)
        with contextlib.suppress(OSError):  # only an advice; gVisor has no such
            mapping.madvise(mmap.MADV_DONTDUMP)
        return mapping

    # ---- mapping ahead -----------------------------------------------------------------------

    def prefault(self, how: str) -> None:
        """Map every page ahead: `"now"`, in the `"background"` (by a thread), or `"off"`.

        Read-only mappings that are made later are treated alike.
        """
        self._how_prefault = how
        if how == "now":
            populate_all(self.mapping)
        elif how == "background":
            self._prefaults.append(Prefault(self.mapping))

    def _map_ahead(self, mapping: mmap.mmap, advice: int) -> None:
        if self._how_prefault == "now":
            populate_all(mapping, advice)
        elif self._how_prefault == "background":
            self._prefaults.append(Prefault(mapping, advice))

    def stop_prefault(self) -> None:
        """End the threads that map ahead, if any still run."""
        running, self._prefaults = self._prefaults, []
        for prefault in running:
            prefault.stop()

    # ---- the end -----------------------------------------------------------------------------

    def drop(self) -> None:
        """Let go of the mappings. Each goes at once, or with the last tensor or view of it.

        Idempotent, also after it was interrupted.
        """
        self.words.release()
        self.memory.release()
        self._readonly.clear()
        vars(self).pop("mapping", None)
        self._prefaults.clear()
        self._file.close()

    @property
    def mapped_fd(self) -> int:
        """A descriptor of the description that this process has mapped; -1 when it has not.

        A forked child has none: what it has mapped is its parent's.
        """
        return -1 if self._is_parents or self._file.closed else self._file.fileno()

    def forget_parent(self) -> None:
        """In a forked child: leave to the parent what is the parent's."""
        self._prefaults = []  # its threads stayed in the parent
        self._is_parents = True


# ---- making ----------------------------------------------------------------------------------


def create_unnamed(size: int, name: str, group: str | None, kind: str = "pool") -> io.FileIO:
    """New, zeroed, allocated shared memory that has no name yet; the caller closes it.

    A file object and not a bare descriptor, here and below: lost to an interrupt, it closes itself.
    """
    shm = Path(SHM_DIRECTORY)
    refusal = refusal_of(size, shm)
    if refusal is not None:
        _raise(refusal, name, kind)
    with contextlib.ExitStack() as undo:
        try:
            file = undo.enter_context(_new_file())
            _allow(file.fileno(), group)
            for start in range(0, size, ALLOCATION_STEP):
                os.posix_fallocate(file.fileno(), start, min(ALLOCATION_STEP, size - start))
        except PoolPermissionError:
            raise
        except OSError as error:
            refusal = refusal_from(error, size, shm)
            if refusal is None:
                raise
            _raise(refusal, name, kind, error)
        undo.pop_all()
        return file


def _raise(refusal: Refusal, name: str, kind: str, cause: OSError | None = None) -> NoReturn:
    raise refusal.error(f"{kind} {name}: {refusal}") from cause


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


def _new_file() -> io.FileIO:
    try:
        return io.FileIO(_open_unnamed(), "r+b")
    except OSError as error:
        if error.errno not in _NO_UNNAMED_FILES:
            raise
    remove_abandoned()
    return _new_hidden_file()


def _open_unnamed() -> int:
    return os.open(SHM_DIRECTORY, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)


def link_name(fd: int, name: str) -> bool:
    """Give a segment that has no name its name, atomically; False when the name is taken."""
    hidden = _hidden_path(fd)
    try:
        if hidden is not None:
            os.link(hidden, path_of(name))
        else:
            # Any directory descriptor makes Python call linkat(2), which can follow /proc/self/fd;
            # the kernel ignores it, since both paths are absolute.
            os.link(f"/proc/self/fd/{fd}", path_of(name), src_dir_fd=fd, follow_symlinks=True)
    except FileExistsError:
        return False
    if hidden is not None:
        # Killed before this line, the segment has two names. It lives and dies by the other one;
        # this one is removed as any that its creator abandoned.
        os.unlink(hidden)
    return True


# ---- making without O_TMPFILE ----------------------------------------------------------------
#
#   1  create a file with a hidden name, and lock its byte
#   2  look whether the file still has that name: between the two, another creator may have locked
#      the byte and removed the file, which it took for abandoned; then go to 1
#   3  fill it; link it to its name; unlink the hidden name
#
# The lock falls with the creator, so that a hidden name with a free byte is a dead creator's, or
# one between 1 and 2, which will see that it is gone.


class _HiddenFile(io.FileIO):
    """A new file with a hidden name. Closing it removes that name, in the process that made it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._process = os.getpid()
        super().__init__(path, "x+b", opener=_open_private)

    def close(self) -> None:
        is_ours = not self.closed and self._process == os.getpid()
        if is_ours and _path_leads_to(self._path, file_identity(self.fileno())):
            os.unlink(self._path)
        super().close()


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _new_hidden_file() -> io.FileIO:
    while True:
        file = _HiddenFile(f"{SHM_DIRECTORY}/{HIDDEN}{secrets.token_hex(8)}")
        if lock_byte(file.fileno(), NEW_BYTE) and _hidden_path(file.fileno()) is not None:
            return file
        file.close()


def _hidden_path(fd: int) -> str | None:
    """The hidden name of a file; None when it has none (any more)."""
    path = os.readlink(f"/proc/self/fd/{fd}")
    is_hidden = os.path.basename(path).startswith(HIDDEN)
    return path if is_hidden and _path_leads_to(path, file_identity(fd)) else None


def remove_abandoned() -> int:
    """Remove the hidden files of creators that were killed; how many there were."""
    removed = 0
    for entry in os.listdir(SHM_DIRECTORY):
        if entry.startswith(HIDDEN):
            # What goes at this moment, or is another user's, is left alone.
            with contextlib.suppress(OSError):
                removed += _remove_if_abandoned(f"{SHM_DIRECTORY}/{entry}")
    return removed


def _remove_if_abandoned(path: str) -> bool:
    with io.FileIO(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC), "r+b") as file:
        if not lock_byte(file.fileno(), NEW_BYTE):
            return False
        os.unlink(path)
        return True


# ---- finding ---------------------------------------------------------------------------------


def open_existing(name: str, kind: str = "pool") -> io.FileIO:
    """The segment `name`; the caller closes it."""
    name = normal_name(name)
    try:
        file = io.FileIO(posix_ipc.SharedMemory(name).fd, "r+b")
    except posix_ipc.ExistentialError:
        raise PoolNotFoundError(
            f"{kind} {name}: there is no such {kind} on this node; start its creator first, or "
            "give `attach` a timeout"
        ) from None
    except (posix_ipc.PermissionsError, PermissionError):
        raise PoolPermissionError(
            f"{kind} {name}: it belongs to another user; run as that user, or create it with "
            f"{'PoolConfig(group=...)' if kind == 'pool' else 'group=...'}"
        ) from None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ELOOP, errno.ENXIO):
            refusal = refusal_from(error, 0, Path(SHM_DIRECTORY))
            if refusal is None:
                raise
            _raise(refusal, name, kind, error)
        raise _not_a_segment(name, kind) from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise _not_a_segment(name, kind)
    return file


def _not_a_segment(name: str, kind: str) -> IncompatiblePoolError:
    return IncompatiblePoolError(
        f"{kind} {name}: {path_of(name)} is a directory, link, pipe or socket, not a {kind}; "
        "remove it, or choose another name"
    )
