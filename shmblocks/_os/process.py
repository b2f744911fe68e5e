"""This process and others: which interpreters are right, and what /proc says of a process.

Contract
- `shmblocks/__init__.py` imports this module first. An unsupported machine is refused in one
  sentence, before anything fails there in an obscure way.
- The check is for the interpreter, not the machine: a 32-bit Python on a 64-bit kernel is refused.
- What /proc says of another process is a hint about its exit, never the proof that it lives. That
  proof is its file lock (filelock.py).
- It does *not* probe kernel features (`shmblocks doctor` does), and does not check /dev/shm.

Why exactly these machines: the locks are OFD record locks and the waits are futexes, which only
Linux has. The words of shared state are 64 bits wide, little-endian and written with single
stores. The order of stores that another process reads without a lock was worked out for x86-64
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

# Flag of a kernel task that exits, as /proc shows it (include/linux/sched.h).
_PF_EXITING = 0x4


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


# ---- what /proc says -----------------------------------------------------------------------------


def pid_namespace() -> int:
    """The inode number of this process's pid namespace: pids of different ones do not compare."""
    return os.stat("/proc/self/ns/pid").st_ino


def start_ticks() -> int:
    """Clock ticks after boot at which this process started (proc_pid_stat(5), field 22).

    A pid and its start name one process, also when the pid is used again.
    """
    # A file object: it closes its descriptor with its last reference, also when an interrupt comes
    # between opening and the next line.
    with open("/proc/self/stat", "rb", buffering=0) as file:
        return int(_stat_fields(file.read())[19])


def is_exiting(pid: int, start: int) -> bool:
    """Whether the process `pid` that started at `start` ticks has begun to exit, or is gone.

    proc_pid_stat(5), fields 3 (state) and 9 (flags).
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = _stat_fields(file.read())
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:
        # Another user's, and proc is mounted with hidepid=1; or no descriptor is free to ask with.
        return False
    is_another = int(fields[19]) != start
    return is_another or fields[0] in (b"Z", b"X") or bool(int(fields[6]) & _PF_EXITING)


def _stat_fields(stat: bytes) -> list[bytes]:
    """The fields of /proc/PID/stat from the third on: the name before them may contain spaces."""
    return stat.rpartition(b")")[2].split()


def clock_offset_ns() -> int:
    """How far this process's monotonic clock is from the machine's: its time namespace's offset.

    Times of the monotonic clock in shared memory compare only between processes of equal offset
    (time_namespaces(7)). 0 where the kernel has no time namespaces, before Linux 5.6.
    """
    try:
        # The file tells the offsets of future children. They are this process's own unless it
        # called unshare(CLONE_NEWTIME) itself.
        if _namespace("time") != _namespace("time_for_children"):
            return 0
        with open("/proc/self/timens_offsets") as file:
            for line in file:
                clock, seconds, nanoseconds = line.split()
                if clock == "monotonic":
                    return int(seconds) * 1_000_000_000 + int(nanoseconds)
    except (FileNotFoundError, PermissionError):
        pass
    return 0


def _namespace(kind: str) -> int:
    return os.stat(f"/proc/self/ns/{kind}").st_ino


require_supported(Interpreter.running())
