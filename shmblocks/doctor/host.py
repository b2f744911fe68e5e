"""The machine as the doctor sees it: files under a root, a shared memory folder, programs to ask.

Exists so that a test can show the checks another machine: a cgroup v2 container with 64 MiB of
shared memory is a folder of text files. It reads only; what a check tries out, it tries itself.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from shmblocks._os.segment import SHM_DIRECTORY

# Smaller: a busy machine looks as if nobody answered. Larger: a hung service holds the doctor up.
ASK_TIMEOUT_SECONDS = 3.0


def ask_program(command: Sequence[str]) -> str | None:
    """What a program prints; None where it is missing, fails or takes too long."""
    program = shutil.which(command[0])
    if program is None:
        return None
    try:
        answer = subprocess.run(
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=ASK_TIMEOUT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout


class Mount(msgspec.Struct, frozen=True):
    """One line of /proc/self/mountinfo."""

    root: str  # the part of the file system that is mounted: not "/" in many containers
    point: str
    file_system: str
    super_options: tuple[str, ...]


class Host(msgspec.Struct, frozen=True):
    """`root` is where /proc, /sys and /etc are looked for, `shm` where segments live."""

    root: Path = Path("/")
    shm: Path = Path(SHM_DIRECTORY)
    ask: Callable[[Sequence[str]], str | None] = ask_program

    def path(self, absolute: str) -> Path:
        """Where this machine has `absolute`."""
        return self.root / absolute.lstrip("/")

    def read(self, absolute: str) -> str | None:
        """The text of a file; None where it is missing or must not be read."""
        try:
            return self.path(absolute).read_text(errors="replace")
        except OSError:
            return None

    def mounts(self) -> list[Mount]:
        """All mounts, in the order in which they were made: the last one of a point is seen."""
        lines = (self.read("/proc/self/mountinfo") or "").splitlines()
        return [mount for line in lines if (mount := _parse_mount(line)) is not None]


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
