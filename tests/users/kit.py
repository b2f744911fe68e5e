"""Runs a user's program as a process of its own, and looks at what is left of it.

    def test_a_sentence(program: Program) -> None:
        assert program.run('''
            pool = BlockPool.create(NAME, CONFIG)
            print(pool.alloc(5).num_blocks)
        ''') == "2\n"

`run` writes the text to a file and starts it, since `spawn` needs a file. Before the text stands
`PRELUDE`: the imports, a `NAME` that no other test has, a small `CONFIG` and a few helpers. After
the program's end `run` demands:

- the exit code (0 unless told otherwise);
- an empty standard error: no warning (all are shown), no traceback, unless `errors` is asked for;
- nothing left: no segment of that name, no process of that program.

A program that needs no tensor imports no torch: that costs two seconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.support import naming, procfs
from tests.support.children import PATIENCE, run_program

ROOT = Path(__file__).resolve().parents[2]
# What the programs of one test have in their environment, for finding those that were left.
MARK = "SHMBLOCKS_TEST_PROGRAM"
# Smaller: a resource tracker that is just ending is called a leak on a loaded machine.
GRACE_SECONDS = 5.0

PRELUDE = """\
from __future__ import annotations

import os
import sys

from shmblocks import BlockHandle, BlockPool, Field, HandleQueue, PoolConfig
import shmblocks

NAME = os.environ["SHMBLOCKS_TEST_PROGRAM"]
QUEUE = NAME + "-queue"
CONFIG = PoolConfig(
    total_tokens=64, block_size=4, fields=(Field("x", (4,), "int32"),), lock_timeout=20.0
)


def fill(view, byte):
    rows = view.memory("x")
    rows[:] = bytes([byte]) * rows.nbytes


def read(view):
    found = set(bytes(view.memory("x")))
    return found.pop() if len(found) == 1 else found


def send(pool, queue, byte, tokens=5):
    handle = pool.alloc(tokens, timeout=20)
    fill(pool.view(handle), byte)
    queue.put(pool.publish(handle))


def receive(pool, queue):
    with pool.open(queue.get(timeout=20)) as lease:
        return read(lease)


def people(pool):
    stats = pool.stats()
    return f"{stats.participants} here, {stats.dead_participants} dead"

"""


def rest_of(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What a program still prints, and its errors, until its end. (`communicate` would lose what
    `readline` has read ahead.)"""
    assert process.stdout is not None
    assert process.stderr is not None
    output, errors = process.stdout.read(), process.stderr.read()
    process.wait(PATIENCE)
    return output, errors


class Program:
    """Owns the name and the directory of the programs of one test."""

    def __init__(self, directory: Path) -> None:
        self.name = naming.new_pool_name()
        self.directory = directory

    def run(
        self,
        text: str,
        *,
        python: Sequence[str | Path] = (sys.executable,),
        flags: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        returncode: int | None = 0,
        errors: bool = False,
        leaves: bool = False,
    ) -> str:
        """What the program printed; with `errors` what it wrote to standard error instead.

        `leaves`: it ends in a way that cannot clean up, and the test goes on from there.
        """
        done = run_program(
            [*python, *flags, self._write(text)],
            returncode=returncode,
            environment=self._environment(environment),
            directory=self.directory,
        )
        if not errors and done.stderr:
            raise AssertionError(f"it printed {done.stdout!r}, and as an error:\n{done.stderr}")
        if not leaves:
            self.require_nothing_left()
        return done.stderr if errors else done.stdout

    @contextlib.contextmanager
    def running(self, text: str) -> Iterator[subprocess.Popen[str]]:
        """The program while it runs, for signals. The block must bring it to its end."""
        with subprocess.Popen(
            [sys.executable, self._write(text)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.directory,
            env={**os.environ, **self._environment(None)},
            start_new_session=True,
        ) as process:
            try:
                yield process
                process.wait(PATIENCE)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        self.require_nothing_left()

    def require_nothing_left(self) -> None:
        """No segment and no process of this test's programs."""
        deadline = time.monotonic() + GRACE_SECONDS
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.02)
        if left:
            raise AssertionError(f"left behind by the programs of this test: {left}")

    def _left(self) -> list[str]:
        segments = [f"segment {name}" for name in procfs.segments(self.name)]
        # A resource tracker or a forkserver ends by itself, a moment after its process.
        return segments + [str(each) for each in procfs.processes_with(MARK, self.name)]

    def _write(self, text: str) -> Path:
        path = self.directory / "program.py"
        path.write_text(PRELUDE + textwrap.dedent(text))
        return path

    def _environment(self, more: Mapping[str, str] | None) -> dict[str, str]:
        return {
            MARK: self.name,
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "default",
            # The suite's workers share the processors already.
            "OMP_NUM_THREADS": "1",
            **(more or {}),
        }
