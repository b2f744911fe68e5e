"""Refuses to be imported where shared state would be wrong instead of merely slow.

Contract:

- `shmblocks/__init__.py` imports this module first, so that an unsupported machine is told so in
  one sentence, before anything that would fail there in an obscure way.
- What is looked at is the interpreter, not the machine under it: a 32-bit Python on a 64-bit kernel
  is refused.
- It does *not* probe kernel features (`shmblocks doctor` does) and does not look at /dev/shm.

Why exactly these machines: the locks are OFD record locks and the waits are futexes, which only
Linux has; the words of shared state are 64 bits wide, little-endian and written with single
stores, and the order of stores that another process reads without a lock was worked out for x86-64
and aarch64 only.
"""

from __future__ import annotations

import os
import platform
import sys
from typing import NamedTuple

from shmblocks.errors import UnsupportedPlatformError

MACHINES = ("x86_64", "aarch64")
OLDEST_PYTHON = (3, 10)


class Interpreter(NamedTuple):
    """What shared state depends on, of the Python that runs this."""

    system: str
    machine: str
    byteorder: str
    pointer_bits: int
    python: tuple[int, int]

    @classmethod
    def running(cls) -> Interpreter:
        return cls(
            system=sys.platform,
            machine=platform.machine(),
            byteorder=sys.byteorder,
            pointer_bits=64 if sys.maxsize > 2**32 else 32,
            python=sys.version_info[:2],
        )

    def __str__(self) -> str:
        major, minor = self.python
        return (
            f"{self.system} on {self.machine} "
            f"({self.pointer_bits}-bit, {self.byteorder}-endian, Python {major}.{minor})"
        )


def is_supported(interpreter: Interpreter) -> bool:
    return (
        interpreter.system == "linux"
        and interpreter.machine in MACHINES
        and interpreter.byteorder == "little"
        and interpreter.pointer_bits == 64
        and interpreter.python >= OLDEST_PYTHON
    )


def require_supported(interpreter: Interpreter) -> None:
    """Raise `UnsupportedPlatformError` unless pools are right on this interpreter."""
    if not is_supported(interpreter):
        oldest = ".".join(map(str, OLDEST_PYTHON))
        raise UnsupportedPlatformError(
            f"shmblocks needs Linux on {' or '.join(MACHINES)} with a 64-bit little-endian "
            f"Python {oldest} or newer, but this is {interpreter}"
        )


require_supported(Interpreter.running())


# Flag of a kernel task that exits, as /proc shows it (include/linux/sched.h).
_PF_EXITING = 0x4


def pid_namespace() -> int:
    """Inode number of this process's pid namespace."""
    return os.stat("/proc/self/ns/pid").st_ino


def process_start() -> int:
    """Clock ticks after boot at which this process started (proc_pid_stat(5), field 22)."""
    with open("/proc/self/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[19])


def is_dying(pid: int, start: int) -> bool:
    """Whether the process that started then has begun to exit (proc_pid_stat(5), fields 3, 9).

    False when that cannot be found out.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:
        return False  # another user's (hidepid), or no descriptor is free
    is_another = int(fields[19]) != start
    return is_another or fields[0] in (b"Z", b"X") or bool(int(fields[6]) & _PF_EXITING)
