"""Programs in the two nodes of `examples/_two_nodes.py`, and what can happen to their network.

with two_nodes() as (first, second), python(first, "tests.nodes.node_program") as program: ...
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from _two_nodes import Node, children_of
from tests.support.children import ChildError

ROOT = Path(__file__).resolve().parents[2]


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
            for pid in children_of(self._process.pid):
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


def python(node: Node, module: str, *arguments: str) -> Program:
    """Start `python -m module` in a node."""
    return Program(node.inside(sys.executable, "-m", module, *arguments))


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
