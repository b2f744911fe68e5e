"""The limits that control groups, and so containers, put on memory and processors.

Contract
- Reads versions 1 and 2 (cgroups(7)). Limits are hierarchical: the tightest of the group and all
  groups above it counts, as far up as this process can see. In a container the groups of the host
  are hidden.
- Pages of /dev/shm count against the group of the process that allocates them. Beyond the limit
  the kernel kills a process; no call fails.
- `root` is where /proc and /sys are looked for, so that a test can show another machine.

What it does not do: change a limit, or watch one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

ROOT = Path("/")

# A version 1 group without a limit has the largest page-aligned 64-bit number there.
_NO_LIMIT_FROM = 1 << 60


class Mount(NamedTuple):
    """One line of /proc/self/mountinfo."""

    root: str  # the part of the file system that is mounted: not "/" in many containers
    point: str
    file_system: str
    super_options: tuple[str, ...]


class MemoryLimit(NamedTuple):
    """One memory limit, all in bytes. `used_bytes` leaves out what the kernel can drop at once."""

    folder: str
    limit_bytes: int
    used_bytes: int

    @property
    def left_bytes(self) -> int:
        """What can be allocated until the kernel kills."""
        return max(0, self.limit_bytes - self.used_bytes)


class _Files(NamedTuple):
    limit: str
    used: str
    droppable: tuple[str, ...]  # keys in memory.stat


_V1 = _Files(
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
_V2 = _Files("memory.max", "memory.current", ("inactive_file", "active_file", "slab_reclaimable"))


def mounts(root: Path = ROOT) -> list[Mount]:
    """All mounts, in the order in which they were made: the last one of a point is seen."""
    lines = (_read(root, "/proc/self/mountinfo") or "").splitlines()
    return [mount for line in lines if (mount := _parse_mount(line)) is not None]


def tightest_memory_limit(root: Path = ROOT) -> MemoryLimit | None:
    """The limit with the fewest bytes left; None where nothing limits this process."""
    limits = [*_limits(root, "memory", _V1), *_limits(root, "", _V2)]
    return min(limits, key=lambda limit: limit.left_bytes, default=None)


def cpu_quota(root: Path = ROOT) -> float | None:
    """Processors that the tightest quota allows; None where there is none."""
    quotas = [
        quota
        for controller in ("", "cpu")
        for folder in _folders(root, controller)
        if (quota := _quota(root, folder)) is not None
    ]
    return min(quotas, default=None)


def _quota(root: Path, folder: str) -> float | None:
    both = _read(root, f"{folder}/cpu.max")
    if both is None:
        quota, period = (_read(root, f"{folder}/cpu.cfs_{part}_us") for part in ("quota", "period"))
        both = f"{quota or ''} {period or ''}"
    words = both.split()
    if len(words) != 2 or not all(word.isdigit() for word in words) or int(words[1]) == 0:
        return None  # "max 100000", "-1 100000", or no such files
    return int(words[0]) / int(words[1])


def _limits(root: Path, controller: str, files: _Files) -> Iterator[MemoryLimit]:
    for folder in _folders(root, controller):
        limit = _number(_read(root, f"{folder}/{files.limit}"))
        used = _number(_read(root, f"{folder}/{files.used}"))
        if limit is None or used is None or limit >= _NO_LIMIT_FROM:
            continue
        droppable = _stat(_read(root, f"{folder}/memory.stat"), files.droppable)
        yield MemoryLimit(folder, limit, max(0, used - droppable))


def _folders(root: Path, controller: str) -> Iterator[str]:
    """The folder of this process's group and those above it; controller "" is version 2."""
    mount = _mount(root, controller)
    if mount is None:
        return
    inside = PurePosixPath(_group(root, controller).lstrip("/"))
    if mount.root != "/":  # no namespace of its own: the group's path starts with what is mounted
        top = PurePosixPath(mount.root.lstrip("/"))
        inside = inside.relative_to(top) if inside.is_relative_to(top) else PurePosixPath()
    for part in (inside, *inside.parents):
        yield f"{mount.point}/{part}".removesuffix("/.")


def _mount(root: Path, controller: str) -> Mount | None:
    for mount in mounts(root):
        if not controller and mount.file_system == "cgroup2":
            return mount
        if controller and mount.file_system == "cgroup" and controller in mount.super_options:
            return mount
    return None


def _group(root: Path, controller: str) -> str:
    for line in (_read(root, "/proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(","):
            return path
    return "/"


def _parse_mount(line: str) -> Mount | None:
    # 36 35 98:0 /root /point rw,noatime [optional fields] - type source super,options
    before, separator, after = line.partition(" - ")
    left, right = before.split(), after.split()
    if not separator or len(left) < 5 or not right:
        return None
    options = right[2].split(",") if len(right) > 2 else []
    return Mount(_unescape(left[3]), _unescape(left[4]), right[0], tuple(options))


def _unescape(path: str) -> str:
    """The kernel writes a space, a tab, a line end and a backslash as octal escapes."""
    for escape, letter in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(escape, letter)
    return path


def _read(root: Path, absolute: str) -> str | None:
    """The text of a file; None where it is missing or must not be read."""
    try:
        return (root / absolute.lstrip("/")).read_text(errors="replace")
    except OSError:
        return None


def _number(text: str | None) -> int | None:
    text = (text or "").strip()
    return int(text) if text.isdigit() else None


def _stat(text: str | None, keys: tuple[str, ...]) -> int:
    """The sum of some lines of memory.stat, in bytes."""
    total = 0
    for line in (text or "").splitlines():
        name, _, value = line.partition(" ")
        if name in keys:
            total += _number(value) or 0
    return total
