"""An agent that needs no NIXL, and does what a test wants: it runs in agent processes.

It says which files its memory is mapped from, and another one reads those, a piece at each
question.
What goes wrong stands in the folder that SHMBLOCKS_TEST_AGENT names:

    no-agent        there can be none
    hold-SIZE       reads of so many bytes stop after the first piece, until the file goes
    refuse-SIZE     the next one is not begun; the file goes with that
    fail-SIZE       they fail after the first piece
    die-SIZE        the process is killed after the first piece
    hang            it does not let itself be closed
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from shmblocks.nodes.agent_program import AgentError, Copy

FOLDER_VARIABLE = "SHMBLOCKS_TEST_AGENT"
CLASS = f"{__name__}:FakeAgent"
PIECE = 256 * 1024


class Part(msgspec.Struct, array_like=True):
    """Memory from `address` on, and where it is mapped from."""

    address: int
    size: int
    path: str
    offset: int


@dataclass
class _Read:
    left: list[Copy]
    parts: list[Part]
    size: int
    moved: int = field(default=0)


class FakeAgent:
    def __init__(self, name: str, memory: Sequence[tuple[int, int]]) -> None:
        self._name = name
        if self._is_told("no-agent"):
            raise AgentError("told to be none")
        parts = [_mapped(address, size) for address, size in memory]
        self.metadata = msgspec.msgpack.encode(parts)

    @staticmethod
    def _is_told(what: str) -> bool:
        return Path(os.environ[FOLDER_VARIABLE], what).exists()

    def begin(self, metadata: bytes, copies: Sequence[Copy]) -> object:
        parts = msgspec.msgpack.decode(metadata, type=list[Part])
        size = sum(copy.size for copy in copies)
        if self._is_told(f"refuse-{size}"):
            Path(os.environ[FOLDER_VARIABLE], f"refuse-{size}").unlink()
            raise AgentError("told to refuse")
        return _Read(list(copies), parts, size)

    def is_done(self, read: object) -> bool:
        assert isinstance(read, _Read)
        if read.moved:
            if self._is_told(f"fail-{read.size}"):
                raise AgentError("told to fail")
            if self._is_told(f"die-{read.size}"):
                os.kill(os.getpid(), signal.SIGKILL)
            if self._is_told(f"hold-{read.size}"):
                return False
        copy = read.left.pop(0)
        count = min(copy.size, PIECE)
        data = _read_from(read.parts, copy.there, count)
        ctypes.memmove(copy.here, data, count)
        read.moved += count
        if count < copy.size:
            read.left.insert(0, Copy(copy.here + count, copy.there + count, copy.size - count))
        return not read.left

    def close(self) -> None:
        while self._is_told("hang"):
            signal.alarm(0)
            time.sleep(0.01)


def _mapped(address: int, size: int) -> Part:
    """Find the mapping that begins at an address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        where, _, offset, _, inode = line.split()[:5]
        if int(where.partition("-")[0], 16) == address:
            return Part(address, size, _path_of(int(inode)), int(offset, 16))
    raise AssertionError(f"nothing is mapped at {address:#x}")


def _path_of(inode: int) -> str:
    """The segment's name. The kernel shows the one that it had when it was made: none."""
    for path in Path("/dev/shm").iterdir():
        with contextlib.suppress(FileNotFoundError):  # other tests remove theirs meanwhile
            if path.stat().st_ino == inode:
                return str(path)
    raise AssertionError(f"no segment has the inode {inode}")


def _read_from(parts: list[Part], address: int, count: int) -> bytes:
    for part in parts:
        if part.address <= address and address + count <= part.address + part.size:
            with open(part.path, "rb") as file:
                return os.pread(file.fileno(), count, part.offset + address - part.address)
    raise AgentError(f"{count} bytes at {address:#x} are not registered")
