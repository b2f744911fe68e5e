"""Two nodes on one machine: network, mount, pid and ipc namespaces of their own, and a veth pair.

    with two_nodes() as (first, second):
        subprocess.run(first.inside("python3", "encoder.py"))

Each node has an empty /dev/shm and pids of its own, and reaches nothing but the other node. That
needs root (or CAP_SYS_ADMIN and CAP_NET_ADMIN); `why_not()` says why they cannot be had here. Each
step is a program of util-linux or iproute2.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

ADDRESSES = ("10.77.0.1", "10.77.0.2")
_PROGRAMS = ("ip", "unshare", "nsenter", "mount")
# Seconds for a node's first process to come up. Longer: a machine that cannot do it says so later.
_PATIENCE = 30.0
_PAUSE = 0.01


class NodesError(Exception):
    """A step of making a node failed; the text is what its program said."""


def children_of(pid: int) -> list[int]:
    """The pids of a process's children."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Node:
    """One node; lives as long as its first process."""

    def __init__(self, address: str, other: str, shm_bytes: int) -> None:
        """`shm_bytes`: the size of its /dev/shm."""
        self.address = address
        self.other = other
        mount = f"mount -t tmpfs -o size={shm_bytes} tmpfs /dev/shm && exec cat"
        # The parent of the node's first process, in no namespace of its own but the network's.
        self._holder = subprocess.Popen(
            [
                *("unshare", "--net", "--mount", "--pid", "--ipc", "--fork", "--mount-proc"),
                *("--kill-child", "--propagation", "private"),
                *("sh", "-c", mount),
            ],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.first_pid = self._wait_for_first_pid()

    def _wait_for_first_pid(self) -> int:
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            if self._holder.poll() is not None:
                said = self._holder.communicate()[1].decode(errors="replace").strip()
                raise NodesError(f"unshare ended with {self._holder.returncode}: {said}")
            for pid in children_of(self._holder.pid):
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{pid}/comm").read_text().strip() == "cat":
                        return pid
            time.sleep(_PAUSE)
        self.close()
        raise NodesError(f"the node's first process was not there within {_PATIENCE:g} s")

    def inside(self, *command: str) -> list[str]:
        """The command line that runs a command in the node, in this working directory."""
        pid = str(self.first_pid)
        return ["nsenter", "-t", pid, "-n", "-m", "-p", "-i", f"--wd={os.getcwd()}", "--", *command]

    def run(self, *command: str) -> None:
        """Run a program in the node to its end."""
        _run(*self.inside(*command))

    def close(self) -> None:
        """End the node and every process in it."""
        if self._holder.poll() is None:
            for pid in children_of(self._holder.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for pipe in (self._holder.stdin, self._holder.stderr):
            if pipe is not None:
                pipe.close()
        self._holder.wait()


@contextlib.contextmanager
def two_nodes(shm_bytes: int = 64 << 20) -> Iterator[tuple[Node, Node]]:
    """Two nodes and the network between them."""
    with contextlib.ExitStack() as stack:
        nodes = []
        for address, other in (ADDRESSES, ADDRESSES[::-1]):
            node = Node(address, other, shm_bytes)
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


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=_PATIENCE)
    except subprocess.CalledProcessError as error:
        raise NodesError(f"{' '.join(command)}: {error.stderr.decode(errors='replace')}") from None


@functools.cache
def why_not() -> str:
    """Why two nodes cannot be had here; empty when they can."""
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    try:
        with two_nodes():
            return ""
    except (NodesError, OSError) as error:
        return f"network namespaces are not allowed here: {error}"
