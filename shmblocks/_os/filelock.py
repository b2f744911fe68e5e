"""Locks on an open file description: the kernel's proof of who is inside, and who lives.

    flock       on the whole file: the mutex, since it costs half of what a byte lock does, however
                many bytes are locked
    OFD locks   on single bytes: who lives (others can ask who holds one without taking it)

The two kinds never meet: neither sees the other.

Contract
- A lock belongs to the open file description, not to a thread, a pid or a pid namespace: it is
  right for threads, under pid reuse and between containers that share /dev/shm.
- The kernel drops it when the last descriptor of the description is closed, also at SIGKILL.
- The description is opened here and never mapped. A mapping keeps its description alive, and a
  forked child inherits the mapping, so that a lock on a mapped description would outlive its
  process for as long as the child lives.
- A forked child shares the description until it calls `close`, which each owner must arrange with
  `os.register_at_fork`; the close in the child takes nothing from the parent.

What it does not do: wait, or keep threads of one process apart (they share the description).

Sources: flock(2); fcntl(2), section "Open file description locks", Linux 3.15.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import struct

_FLOCK = struct.Struct("@hhqqi")

# Which bytes are locked. The same in every layout version: see layout.py.
# Held on a file that has a hidden name only, by its creator, while that lives; see segment.py.
NEW_BYTE = 0
# The first of the bytes of participants' slots, and how many there are.
PLACE_BYTE = 64
PLACE_BYTES = 65536 - PLACE_BYTE
# Held by those who use a GPU, on the description that they have mapped; see participants.py.
GPU_BYTE = 65536
# Held, each with the others, by processes that write into blocks for a participant, on descriptions
# that they have mapped; see participants.py.
WRITER_BYTE = 2 * GPU_BYTE

# Operations of flock, for the mutex's hot path.
ENTER = fcntl.LOCK_EX | fcntl.LOCK_NB
LEAVE = fcntl.LOCK_UN


def _request(kind: int, start: int, length: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, start, length, 0)


class FileLocks:
    """Locks on the file behind `fd` and on its bytes, through a description of their own."""

    def __init__(self, fd: int) -> None:
        # Public, for the mutex's hot path: flock takes the file itself.
        self.file = _open_again(fd)
        status = os.fstat(fd)
        # Which file it is, also when closed: the same for every description of it.
        self.inode = (status.st_dev, status.st_ino)

    @property
    def fd(self) -> int:
        """The descriptor that holds the locks; -1 once closed."""
        file = self.file
        return -1 if file.closed else file.fileno()

    def try_enter(self) -> bool:
        """Lock the whole file; False when another description has."""
        try:
            fcntl.flock(self.file, ENTER)
        except BlockingIOError:
            return False
        return True

    def leave(self) -> None:
        """Unlock the whole file; nothing happens when it is not locked."""
        fcntl.flock(self.file, LEAVE)

    def try_lock(self, byte: int) -> bool:
        """Lock a byte for writing; False when another description holds it."""
        return try_set(self.file.fileno(), _request(fcntl.F_WRLCK, byte, 1))

    def unlock(self, byte: int) -> None:
        """Unlock a byte; nothing happens when it is not locked."""
        fcntl.fcntl(self.file.fileno(), fcntl.F_OFD_SETLK, _request(fcntl.F_UNLCK, byte, 1))

    def is_locked_by_others(self, byte: int, length: int = 1) -> bool:
        """Whether another description holds any of the bytes (never True for our own locks)."""
        request = _request(fcntl.F_WRLCK, byte, length)
        answer = fcntl.fcntl(self.file.fileno(), fcntl.F_OFD_GETLK, request)
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)

    def open_again(self, mode: str = "r+b") -> io.FileIO:
        """A new description of the file, with none of the locks; the caller closes it."""
        return _open_again(self.file.fileno(), mode)

    def reopen_after_fork(self) -> None:
        """In a forked child: open a description of our own, and close the parent's."""
        parents = self.file
        if not parents.closed:
            try:
                self.file = _open_again(parents.fileno())
            finally:
                parents.close()

    def close(self) -> None:
        """Close the descriptor. Every lock falls, unless a forked child shares it. Idempotent."""
        self.file.close()


def _open_again(fd: int, mode: str = "r+b") -> io.FileIO:
    """A new open file description of the file behind `fd`.

    A file object, since it closes and forgets its descriptor in one step that no interrupt can
    split, and closes when it is lost. By /proc, which reaches the inode whatever has become of its
    name.
    """
    return io.FileIO(f"/proc/self/fd/{fd}", mode)


def try_set(fd: int, request: bytes) -> bool:
    """One attempt at a prepared lock request; False when another description holds the bytes."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def lock_byte(fd: int, byte: int) -> bool:
    """Lock a byte through this descriptor's description; False when another one holds it."""
    return try_set(fd, _request(fcntl.F_WRLCK, byte, 1))


def share_byte(fd: int, byte: int) -> bool:
    """Lock a byte for reading, which others may do too; False when somebody has it to himself."""
    return try_set(fd, _request(fcntl.F_RDLCK, byte, 1))


def unlock_byte(fd: int, byte: int) -> None:
    """Unlock a byte; nothing happens when it is not locked."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _request(fcntl.F_UNLCK, byte, 1))
