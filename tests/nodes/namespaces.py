"""Two nodes on one machine: network, mount, pid and ipc namespaces of their own, and a veth pair.

    with two_nodes() as (first, second), first.python("tests.nodes.node_program") as program: ...

Each node has an empty /dev/shm and pids of its own, and reaches nothing but the other node.
`why_not()` says why they cannot be had here. Each step is a program of util-linux or iproute2.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from tests.support.children import ChildError, wait_until

ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = ("10.77.0.1", "10.77.0.2")
_PROGRAMS = ("ip", "unshare", "nsenter", "mount")


class Program:
    """A Python program in a node that is told lines and tells lines, each one JSON value."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def say(self, value: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()

    def hear(self) -> object:
        """The next value; the watchdog of the test bounds the wait."""
        pipe: IO[str] | None = self._process.stdout
        assert pipe is not None
        line = pipe.readline()
        if not line:
            raise ChildError(f"the program in the node ended with {self._process.wait()}")
        value: object = json.loads(line)
        return value

    def kill(self) -> None:
        """SIGKILL to what runs in the node. `nsenter` is its parent, outside of the node's pids; it
        ends by itself then."""
        if self._process.poll() is None:
            for pid in _children(self._process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self._process.returncode is None:
                assert self._process.stdin is not None
                self._process.stdin.close()
                if self._process.wait(timeout=60) != 0:
                    raise ChildError(f"a program in a node ended with {self._process.returncode}")
        finally:
            self.kill()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Node:
    """One node; lives as long as its first process."""

    def __init__(self, address: str, other: str) -> None:
        self.address = address
        self.other = other
        # The parent of the node's first process, in no namespace of its own but the network's.
        self._holder = subprocess.Popen(
            [
                *("unshare", "--net", "--mount", "--pid", "--ipc", "--fork", "--mount-proc"),
                *("--kill-child", "--propagation", "private"),
                *("sh", "-c", "mount -t tmpfs -o size=64m tmpfs /dev/shm && exec cat"),
            ],
            stdin=subprocess.PIPE,
        )
        self.first_pid = wait_until(self._first_pid, "the node's first process is there")

    def _first_pid(self) -> int:
        if self._holder.poll() is not None:
            raise ChildError(f"unshare ended with {self._holder.returncode}")
        for pid in _children(self._holder.pid):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() == "cat":
                    return pid
        return 0

    def inside(self, *command: str) -> list[str]:
        """The command line that runs a command in the node."""
        pid = str(self.first_pid)
        return ["nsenter", "-t", pid, "-n", "-m", "-p", "-i", f"--wd={ROOT}", "--", *command]

    def run(self, *command: str) -> None:
        """Run a program in the node to its end."""
        _run(*self.inside(*command))

    def python(self, module: str, *arguments: str) -> Program:
        """Start `python -m module` in the node."""
        return Program(self.inside(sys.executable, "-m", module, *arguments))

    def close(self) -> None:
        if self._holder.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.first_pid, signal.SIGKILL)
        assert self._holder.stdin is not None
        self._holder.stdin.close()
        self._holder.wait()


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Two nodes and the network between them."""
    with contextlib.ExitStack() as stack:
        nodes = []
        for address, other in (ADDRESSES, ADDRESSES[::-1]):
            node = Node(address, other)
            stack.callback(node.close)
            nodes.append(node)
        first, second = nodes
        _join(first, second)
        for node in nodes:
            node.run("ip", "addr", "add", f"{node.address}/24", "dev", "veth0")
            node.run("ip", "link", "set", "lo", "up")
            node.run("ip", "link", "set", "veth0", "up")
        yield first, second


def _join(first: Node, second: Node) -> None:
    """A veth pair, made in the first node's network: the machine's own sees nothing of it, and it
    goes with the nodes. From outside of their pids, by which `ip` finds the second."""
    _run(
        *("nsenter", "-t", str(first.first_pid), "-n"),
        *("ip", "link", "add", "veth0", "type", "veth"),
        *("peer", "name", "veth0", "netns", str(second.first_pid)),
    )


def link(node: Node, state: str) -> None:
    """Take the node's end of the network up or down."""
    node.run("ip", "link", "set", "veth0", state)


def black_hole(node: Node) -> None:
    """What the node sends to the other from now on reaches nobody, and it is not told."""
    node.run(
        *("ip", "neigh", "replace", node.other, "lladdr", "02:00:00:00:00:01"),
        *("dev", "veth0", "nud", "permanent"),
    )


def no_black_hole(node: Node) -> None:
    node.run("ip", "neigh", "del", node.other, "dev", "veth0")


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=30)
    except subprocess.CalledProcessError as error:
        raise ChildError(f"{' '.join(command)}: {error.stderr.decode(errors='replace')}") from None


@functools.cache
def why_not() -> str:
    """Why two nodes cannot be had here; empty when they can."""
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    try:
        with two_nodes():
            return ""
    except (ChildError, AssertionError) as error:
        return f"network namespaces are not allowed here: {error}"
