"""A program in a terminal of its own: started, read line by line, interrupted, waited for.

- It is the leader of its own session, so that `press_ctrl_c` reaches its children too, as a
  terminal's does.
- Every wait is bounded; leaving the `with` kills what is still running.
- It does not look for leftovers: the suite's leak check does.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path

from tests.support.children import wait_until

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
# Seconds to wait for a line or an end. Smaller: importing torch in four processes on a busy
# machine is called hung. Larger: a real hang costs that much.
PATIENCE = 90.0


class Terminal:
    """Owns one running script of `examples/` (or any other) and what it has printed."""

    def __init__(self, script: str | Path, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-u", str(EXAMPLES / script), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": f"{EXAMPLES}{os.pathsep}{ROOT}"},
        )
        self._new: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.lines: list[str] = []

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, words: str) -> str:
        """The next line that has these words in it."""
        while (line := self._next()) is not None:
            if words in line:
                return line
        raise AssertionError(f"ended without printing {words!r}; it printed:\n{self.text}")

    def press_ctrl_c(self) -> None:
        os.killpg(self.pid, signal.SIGINT)

    def send(self, number: signal.Signals) -> None:
        """A signal to this program alone."""
        self._process.send_signal(number)

    def stop(self) -> None:
        """SIGSTOP, and really stopped when this returns."""
        self.send(signal.SIGSTOP)
        wait_until(lambda: self._state() == "T", f"{self.pid} is stopped")

    def wait(self) -> int:
        """Its exit code, when everything that it printed is in `lines`."""
        while self._next() is not None:
            pass
        return self._process.wait(PATIENCE)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _state(self) -> str:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def _next(self) -> str | None:
        try:
            line = self._new.get(timeout=PATIENCE)
        except queue.Empty:
            raise AssertionError(f"said nothing for {PATIENCE} s; before:\n{self.text}") from None
        if line is None:
            self._new.put(None)  # the end stays the end
        else:
            self.lines.append(line)
        return line

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self._new.put(line.rstrip("\n"))
        self._new.put(None)
