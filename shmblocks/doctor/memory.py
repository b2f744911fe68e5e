"""Is there shared memory, how much of it, and will the kernel really give it?

A pool reserves all of its pages when it is created. What would refuse them then is said here
before anything is started, in the same words (`_os/limits.py`). Pages of /dev/shm count against
the container's memory limit; beyond it the kernel kills processes instead of returning an error.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

from shmblocks._os.cgroup import Mount, mounts, tightest_memory_limit
from shmblocks._os.limits import container_refusal, folder_refusal, refusal_of
from shmblocks._words import bytes_text
from shmblocks.doctor.host import CheckResult, Host

# The embeddings of one large image take up to 250 MB. Smaller: nothing is said of a /dev/shm that
# holds four such images. Larger: machines that serve small images well are warned.
COMFORTABLE_BYTES = 1 << 30
# What the smallest pool that makes any sense takes.
TINY_POOL_BYTES = 1 << 20

RESIZE = (
    "start the container with --shm-size (Kubernetes: an emptyDir of medium Memory on /dev/shm), "
    "or: mount -o remount,size=8G /dev/shm"
)


def shm_mount(host: Host) -> Iterator[CheckResult]:
    """Segments must be memory, not a disk."""
    refusal = folder_refusal(host.shm)
    if refusal is not None:
        yield CheckResult("shm-mount", "fail", refusal.found, refusal.advice)
        return
    mount = _mount_of(host, str(host.shm.resolve()))
    if mount is None:
        yield CheckResult(
            "shm-mount", "skip", f"/proc/self/mountinfo does not say what {host.shm} is"
        )
    elif mount.file_system != "tmpfs":
        yield CheckResult(
            "shm-mount",
            "warn",
            f"{host.shm} lies on {mount.file_system} ({mount.point}), not on tmpfs",
            "mount a tmpfs there, so that pools are memory and not files",
        )
    else:
        yield CheckResult("shm-mount", "ok", f"{host.shm} is a tmpfs")


def _mount_of(host: Host, path: str) -> Mount | None:
    def holds(mount: Mount) -> bool:
        return path == mount.point or path.startswith(mount.point.rstrip("/") + "/")

    # The longest mount point wins, and of equal ones the last made, which covers the others.
    holding = [mount for mount in mounts(host.root) if holds(mount)]
    return max(reversed(holding), key=lambda mount: len(mount.point), default=None)


def shm_size(host: Host) -> Iterator[CheckResult]:
    """How large all pools together can be."""
    try:
        numbers = os.statvfs(host.shm)
    except OSError as error:
        yield CheckResult("shm-size", "fail", f"{host.shm}: {error.strerror}", RESIZE)
        return
    free = numbers.f_bavail * numbers.f_frsize
    total = numbers.f_blocks * numbers.f_frsize
    found = f"{host.shm} has {bytes_text(free)} free of {bytes_text(total)}"
    if numbers.f_files and not numbers.f_favail:
        yield CheckResult("shm-size", "fail", f"{found}, but no free inode", "remove files there")
    elif free < TINY_POOL_BYTES:
        yield CheckResult("shm-size", "fail", found, f"remove files there, or {RESIZE}")
    elif free < COMFORTABLE_BYTES:
        yield CheckResult("shm-size", "warn", f"{found}: a few large images fill that", RESIZE)
    else:
        yield CheckResult("shm-size", "ok", found)


def pool_size(host: Host) -> Iterator[CheckResult]:
    """Whether the planned pool can be created: what `BlockPool.create` would say."""
    size = host.pool_bytes
    if not size:
        yield CheckResult("pool-size", "skip", "no planned size of a pool was given")
        return
    refusal = refusal_of(size, host.shm, host.root) or container_refusal(size, host.root)
    if refusal is not None:
        yield CheckResult("pool-size", "fail", refusal.found, refusal.advice)
    else:
        yield CheckResult("pool-size", "ok", f"a pool of {bytes_text(size)} can be created")


def shm_reserve(host: Host) -> Iterator[CheckResult]:
    """Create a file there and have the kernel reserve its pages, as a pool does."""
    try:
        with tempfile.TemporaryFile(dir=host.shm) as file:
            os.posix_fallocate(file.fileno(), 0, TINY_POOL_BYTES)
    except OSError as error:
        yield CheckResult(
            "shm-reserve",
            "fail",
            f"cannot reserve {bytes_text(TINY_POOL_BYTES)} in {host.shm}: {error.strerror}",
            f"see that this user may write there and that it is not full; {RESIZE}",
        )
        return
    yield CheckResult("shm-reserve", "ok", f"reserved {bytes_text(TINY_POOL_BYTES)} as a trial")


def memory_limit(host: Host) -> Iterator[CheckResult]:
    """What may be used before the kernel kills: the container's limit, and the machine's memory."""
    limit = tightest_memory_limit(host.root)
    if limit is None:
        yield CheckResult("memory-limit", "ok", "no control group limits this process's memory")
        return
    found = (
        f"{limit.folder} allows {bytes_text(limit.limit_bytes)}, "
        f"{bytes_text(limit.left_bytes)} of it unused"
    )
    if limit.left_bytes >= _free_in_shm(host):
        yield CheckResult("memory-limit", "ok", found)
        return
    yield CheckResult(
        "memory-limit",
        "warn",
        f"{found}, less than is free in {host.shm}; pages of pools count against it, and beyond "
        "it the kernel kills processes",
        "keep all pools together below that, or raise the container's memory limit",
    )


def memory_available(host: Host) -> Iterator[CheckResult]:
    """The size of a tmpfs is a promise; this is what there is behind it."""
    available = _available_bytes(host)
    if available is None:
        yield CheckResult("memory-available", "skip", "/proc/meminfo has no MemAvailable")
        return
    free = _free_in_shm(host)
    found = f"{bytes_text(available)} of memory are available"
    if available >= free:
        yield CheckResult("memory-available", "ok", found)
        return
    yield CheckResult(
        "memory-available",
        "warn",
        f"{found}, less than the {bytes_text(free)} that {host.shm} says are free",
        "keep all pools together below what is available",
    )


def _free_in_shm(host: Host) -> int:
    try:
        numbers = os.statvfs(host.shm)
    except OSError:
        return 0  # shm-size says so
    return numbers.f_bavail * numbers.f_frsize


def _available_bytes(host: Host) -> int | None:
    for line in (host.read("/proc/meminfo") or "").splitlines():
        words = line.split()
        if words[:1] == ["MemAvailable:"] and words[1].isdigit():
            return int(words[1]) << 10
    return None
