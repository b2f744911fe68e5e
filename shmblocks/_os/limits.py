"""Why the machine will not give a segment, in the words that `create` and `shmblocks doctor` share.

    /dev/shm      missing, read-only, not writable by this user, full
    process       largest file (RLIMIT_FSIZE), address space (RLIMIT_AS)
    container     memory limit of the control group

Contract
- `refusal_of` allocates nothing. It says before the start what would end otherwise as a bare
  OSError, as SIGXFSZ, or, beyond a container's memory limit, as SIGKILL.
- It refuses only what is sure to fail. `refusal_from` puts the kernel's own refusal, which may
  still come, into the same words.

What it does not do: reserve anything. Others may take the memory between the question and the
allocation; the allocation then fails in an orderly way, but for the container's limit.
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
from pathlib import Path
from typing import NamedTuple

from shmblocks._os.cgroup import ROOT, tightest_memory_limit
from shmblocks._words import bytes_text
from shmblocks.errors import PoolPermissionError, SharedMemoryFullError

MIB = 1 << 20
_LARGEST_FILE = (1 << 63) - 1

# Bytes from which on the container's limit is asked for. Smaller: small pools and queues pay 1 to
# 5 ms for reading /proc and /sys. Larger: a pool that ends its process is not refused.
ASK_CONTAINER_FROM = 64 * MIB


class Refusal(NamedTuple):
    """`found` is the fact, `advice` what to do about it, `error` the exception that says so."""

    error: type[SharedMemoryFullError] | type[PoolPermissionError]
    found: str
    advice: str

    def __str__(self) -> str:
        return f"{self.found}: {self.advice}"


def refusal_of(size: int, shm: Path, root: Path = ROOT) -> Refusal | None:
    """What would refuse a new segment of `size` bytes in the folder `shm`; None: nothing known.

    `root` is where /proc and /sys are looked for.
    """
    return (
        folder_refusal(shm)
        or _space_refusal(size, shm)
        or _file_size_refusal(size)
        or address_space_refusal(size)
        or (container_refusal(size, root) if size >= ASK_CONTAINER_FROM else None)
    )


def refusal_from(error: OSError, size: int, shm: Path) -> Refusal | None:
    """The words for an error of making a segment of `size` bytes; None: it is of another kind."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EROFS, errno.EACCES, errno.EPERM):
        return folder_refusal(shm) or _not_writable(shm)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _full(size, shm)
    if error.errno == errno.EFBIG:
        return _file_size_refusal(size) or _full(size, shm)
    if error.errno == errno.ENOMEM:
        return Refusal(
            SharedMemoryFullError,
            f"needs {bytes_text(size)}, the kernel has no memory for that",
            "make the pool smaller, or end what uses the memory",
        )
    return None


# ---- the folder ------------------------------------------------------------------------------


def folder_refusal(shm: Path) -> Refusal | None:
    """Whether segments can be made in the folder at all."""
    try:
        is_read_only = os.statvfs(shm).f_flag & os.ST_RDONLY
    except (FileNotFoundError, NotADirectoryError):
        return Refusal(
            SharedMemoryFullError,
            f"{shm} does not exist",
            f"mount a tmpfs there: mkdir -p {shm}; mount -t tmpfs -o size=8G,mode=1777 tmpfs {shm}",
        )
    if is_read_only:
        return Refusal(
            PoolPermissionError,
            f"{shm} is mounted read-only",
            f"mount -o remount,rw {shm}; in a container, mount a volume of memory there "
            "(Kubernetes: an emptyDir of medium Memory)",
        )
    if not os.access(shm, os.W_OK | os.X_OK, effective_ids=True):
        return _not_writable(shm)
    return None


def _not_writable(shm: Path) -> Refusal:
    return Refusal(
        PoolPermissionError,
        f"user {os.geteuid()} may not make files in {shm}",
        f"let root do `chmod 1777 {shm}`, or run as a user who may",
    )


def _space_refusal(size: int, shm: Path) -> Refusal | None:
    space = os.statvfs(shm)
    if space.f_files and not space.f_favail:
        return Refusal(SharedMemoryFullError, f"{shm} has no free inode", "remove files there")
    # A tmpfs that was mounted with size=0 has no limit, and shows no blocks.
    is_limited = space.f_blocks > 0
    if size > _LARGEST_FILE or (is_limited and size > space.f_bavail * space.f_frsize):
        return _full(size, shm)
    return None


def _full(size: int, shm: Path) -> Refusal:
    space = os.statvfs(shm)
    total, free = space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize
    return Refusal(
        SharedMemoryFullError,
        f"needs {bytes_text(size)}, {shm} has {bytes_text(free)} free of {bytes_text(total)}",
        f"start the container with --shm-size={-(-size // MIB) + 64}m or more (Kubernetes: an "
        f"emptyDir of medium Memory on {shm}), remove leftovers (`shmblocks reap --all`), or make "
        "the pool smaller",
    )


# ---- the process -----------------------------------------------------------------------------


def _file_size_refusal(size: int) -> Refusal | None:
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit == resource.RLIM_INFINITY or size <= limit:
        return None
    return Refusal(
        SharedMemoryFullError,
        f"needs {bytes_text(size)}, this process may make files of up to {bytes_text(limit)}",
        "raise that limit (`ulimit -f unlimited`; systemd: LimitFSIZE=infinity), or make the pool "
        "smaller",
    )


def address_space_refusal(size: int) -> Refusal | None:
    """Whether this process's limit on address space leaves too little for a mapping."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    left = max(0, limit - _mapped_bytes())
    if size <= left:
        return None
    return Refusal(
        SharedMemoryFullError,
        f"needs {bytes_text(size)} of address space, this process may map {bytes_text(left)} more",
        "raise that limit (`ulimit -v unlimited`; systemd: LimitAS=infinity), or make the pool "
        "smaller",
    )


def mapping_refusal(size: int) -> Refusal:
    """Why the kernel would not map `size` bytes that are there."""
    return address_space_refusal(size) or Refusal(
        SharedMemoryFullError,
        f"the kernel does not map {bytes_text(size)} into this process",
        "see `ulimit -v`, and vm.max_map_count against the lines of /proc/PID/maps",
    )


def _mapped_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * mmap.PAGESIZE


# ---- the container ---------------------------------------------------------------------------


def container_refusal(size: int, root: Path = ROOT) -> Refusal | None:
    """Whether the memory limit of this process's control group is below `size` bytes.

    Swap that is free counts as memory: pages of /dev/shm can go there.
    """
    limit = tightest_memory_limit(root)
    if limit is None or size <= limit.left_bytes + _free_swap(root):
        return None
    return Refusal(
        SharedMemoryFullError,
        f"needs {bytes_text(size)}, the memory limit of {bytes_text(limit.limit_bytes)} "
        f"({limit.folder}) leaves {bytes_text(limit.left_bytes)}, and beyond it the kernel kills",
        "raise the container's memory limit (docker run --memory, Kubernetes resources.limits; "
        "--shm-size does not help), or make the pool smaller",
    )


def _free_swap(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    sizes = [int(line.split()[1]) << 10 for line in lines if line.startswith("SwapFree:")]
    return sum(sizes)
