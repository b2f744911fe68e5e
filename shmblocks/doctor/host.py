"""The machine as the doctor sees it, and what one check says of it.

`Host` exists so that a test can show the checks another machine: a container with 64 MiB of shared
memory is a folder of text files. It reads only; what a check tries out, it tries itself.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from shmblocks._os.segment import SHM_DIRECTORY

# Seconds. Smaller: on a busy machine a service seems not to answer. Larger: a hung service holds
# the doctor up.
ASK_TIMEOUT_SECONDS = 3.0

Status = Literal["ok", "warn", "fail", "skip"]


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


class CheckResult(msgspec.Struct, frozen=True):
    """The outcome of one check.

    name     stable, for machines: `shm-size`, `ofd-locks`
    status   ok: nothing to do; warn: works, with a limit that one should know;
             fail: pools do not work here, or not the part that the check is about;
             skip: does not apply to this machine, or cannot be told here
    found    what was seen
    advice   what to do about it; empty where there is nothing to do
    """

    name: str
    status: Status
    found: str
    advice: str = ""


class Host(msgspec.Struct, frozen=True):
    """What the checks look at.

    root        where /proc, /sys and /etc are looked for
    shm         where segments live
    ask         runs a program, and returns what it prints
    pool_bytes  size of the pool that is planned, in bytes; 0: none
    """

    root: Path = Path("/")
    shm: Path = Path(SHM_DIRECTORY)
    ask: Callable[[Sequence[str]], str | None] = ask_program
    pool_bytes: int = 0

    def path(self, absolute: str) -> Path:
        """Where this machine has `absolute`."""
        return self.root / absolute.lstrip("/")

    def read(self, absolute: str) -> str | None:
        """The text of a file; None where it is missing or must not be read."""
        try:
            return self.path(absolute).read_text(errors="replace")
        except OSError:
            return None


# Yields one result per fact it checked. It changes nothing on the machine that outlives it.
Check = Callable[[Host], Iterator[CheckResult]]
