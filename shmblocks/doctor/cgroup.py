"""The limits that control groups, and so containers, put on memory and processors.

Reads versions 1 and 2. Limits are hierarchical: the tightest of the group and all groups above it
counts, as far up as this process can see (in a container the groups of the host are hidden).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

import msgspec

from shmblocks.doctor.host import Host, Mount

# A version 1 group without a limit has the largest page-aligned 64-bit number there.
_NO_LIMIT_FROM = 1 << 60


class MemoryLimit(msgspec.Struct, frozen=True):
    """One memory limit, all in bytes. `used_bytes` leaves out page cache that can be dropped."""

    folder: str
    limit_bytes: int
    used_bytes: int

    @property
    def left_bytes(self) -> int:
        return max(0, self.limit_bytes - self.used_bytes)


class _Files(msgspec.Struct, frozen=True):
    limit: str
    used: str
    droppable: str  # the key in memory.stat


_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Files("memory.max", "memory.current", "inactive_file")


def tightest_memory_limit(host: Host) -> MemoryLimit | None:
    """The limit with the fewest bytes left; None where nothing limits this process."""
    limits = [*_limits(host, "memory", _V1), *_limits(host, "", _V2)]
    return min(limits, key=lambda limit: limit.left_bytes, default=None)


def cpu_quota(host: Host) -> float | None:
    """Processors that the tightest quota allows; None where there is none."""
    quotas = [
        quota
        for controller in ("", "cpu")
        for folder in _folders(host, controller)
        if (quota := _quota(host, folder)) is not None
    ]
    return min(quotas, default=None)


def _quota(host: Host, folder: str) -> float | None:
    both = host.read(f"{folder}/cpu.max")
    if both is None:
        quota, period = (host.read(f"{folder}/cpu.cfs_{part}_us") for part in ("quota", "period"))
        both = f"{quota or ''} {period or ''}"
    words = both.split()
    if len(words) != 2 or not all(word.isdigit() for word in words) or int(words[1]) == 0:
        return None  # "max 100000", "-1 100000", or no such files
    return int(words[0]) / int(words[1])


def _limits(host: Host, controller: str, files: _Files) -> Iterator[MemoryLimit]:
    for folder in _folders(host, controller):
        limit = _number(host.read(f"{folder}/{files.limit}"))
        used = _number(host.read(f"{folder}/{files.used}"))
        if limit is None or used is None or limit >= _NO_LIMIT_FROM:
            continue
        droppable = _stat(host.read(f"{folder}/memory.stat"), files.droppable)
        yield MemoryLimit(folder, limit, max(0, used - droppable))


def _folders(host: Host, controller: str) -> Iterator[str]:
    """The folder of this process's group and those above it; controller "" is version 2."""
    mount = _mount(host, controller)
    if mount is None:
        return
    inside = PurePosixPath(_group(host, controller).lstrip("/"))
    if mount.root != "/":  # no namespace of its own: the group's path starts with what is mounted
        root = PurePosixPath(mount.root.lstrip("/"))
        inside = inside.relative_to(root) if inside.is_relative_to(root) else PurePosixPath()
    for part in (inside, *inside.parents):
        yield f"{mount.point}/{part}".removesuffix("/.")


def _mount(host: Host, controller: str) -> Mount | None:
    for mount in host.mounts():
        if not controller and mount.file_system == "cgroup2":
            return mount
        if controller and mount.file_system == "cgroup" and controller in mount.super_options:
            return mount
    return None


def _group(host: Host, controller: str) -> str:
    for line in (host.read("/proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(","):
            return path
    return "/"


def _number(text: str | None) -> int | None:
    text = (text or "").strip()
    return int(text) if text.isdigit() else None


def _stat(text: str | None, key: str) -> int:
    for line in (text or "").splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return _number(value) or 0
    return 0
