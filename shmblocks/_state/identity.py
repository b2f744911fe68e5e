"""What the first words of a segment say it is: a pool or a queue, and of which layout version.

Contract
- `Identity` is read from the file, before anything is mapped, and checked against the file's size.
- `is_ours` and `is_pool` are right for every layout version: the first words never change place.

What it does not do: check anything behind the first words (the config, the state).
"""

from __future__ import annotations

import os
import stat

from shmblocks._state.layout import HEADER_BYTES, IDENTITY, LAYOUT_VERSION, MAGIC, QUEUE_MAGIC
from shmblocks.errors import DamagedPoolError, IncompatiblePoolError


class Identity:
    """What the first words of a segment say it is; checked against its file."""

    def __init__(self, fd: int, name: str, expected: int = MAGIC) -> None:
        """`expected` is the magic number that the segment must have."""
        what = "pool" if expected == MAGIC else "queue"
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size < HEADER_BYTES:
            raise IncompatiblePoolError(
                f"{what} {name}: expected a segment of at least {HEADER_BYTES} bytes, got "
                f"{status.st_size}: truncated, or not a {what}"
            )
        magic, version, self.pool_id, size, self.created_ns = IDENTITY.unpack(
            os.pread(fd, IDENTITY.size, 0)
        )
        if magic != expected:
            raise IncompatiblePoolError(f"{what} {name}: the segment of that name is not a {what}")
        if version != LAYOUT_VERSION:
            raise IncompatiblePoolError(
                f"{what} {name}: expected layout version {LAYOUT_VERSION}, got {version}: use the "
                "shmblocks version that created it, or create it anew"
            )
        if size != status.st_size:
            raise DamagedPoolError(
                f"{what} {name}: expected a segment of {size} bytes, got {status.st_size}: truncated"
            )
        self.size_bytes = size


def is_pool(fd: int) -> bool:
    """Whether the file starts as a pool of any layout version does."""
    return _magic(fd) == MAGIC


def is_ours(fd: int) -> bool:
    """Whether the file starts as a pool or a queue of any layout version does."""
    return _magic(fd) in (MAGIC, QUEUE_MAGIC)


def _magic(fd: int) -> int:
    return int.from_bytes(os.pread(fd, 8, 0), "little")
