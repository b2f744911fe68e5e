"""Child processes of an asyncio launcher: started with spawn, started again when they die, ended.

- `Child.run` keeps one process running: when it dies, `run` calls `on_death` and starts another. A
  child that dies three times before it is ready ends the launcher with `ChildError`.
- Messages of a child come to `on_message` in the event loop; sending never blocks the loop.
- Ending is polite (the pipe is closed), then SIGTERM, then SIGKILL, each after a bounded time.
- Ctrl-C and SIGTERM are the launcher's alone: children are started with both blocked.

What it does not do: know what the children compute.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from qwen_vl.messages import ENCODER, TO_LAUNCHER, FromLauncher, Ready, ToLauncher

SIGNALS = {signal.SIGINT, signal.SIGTERM}
# Seconds for a child to end by itself, and again after SIGTERM. Smaller: one in a long computation
# is killed needlessly. Larger: a child that hangs holds the launcher longer.
PATIENCE = 10.0
# Deaths in a row, without having been ready in between, after which starting again is no use.
MOST_FAILURES = 3


class ChildError(Exception):
    """A child cannot be started, or died; the message says which and how."""


class Child:
    """A process that is started again when it dies."""

    def __init__(
        self,
        name: str,
        target: Callable[..., None],
        arguments: tuple[object, ...],
        on_message: Callable[[Child, ToLauncher], None],
        on_death: Callable[[Child, str], None],
    ) -> None:
        self.name = name
        self.starts = 0
        self.ready: Ready | None = None
        self._target, self._arguments = target, arguments
        self._on_message, self._on_death = on_message, on_death
        self._process: SpawnProcess | None = None
        self._pipe: Connection[bytes, bytes] | None = None
        self._sending = asyncio.Lock()
        self._is_there = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """Of the process that is ready; None while there is none."""
        return self._process.pid if self._process is not None and self.ready is not None else None

    async def run(self) -> None:
        """Keep a process running until this is cancelled; then end it."""
        failures = 0
        try:
            while failures < MOST_FAILURES:
                how = await self._one_life()
                failures = failures + 1 if self.ready is None else 0
                self._is_there.clear()
                self.ready = None
                self._on_death(self, f"the {self.name} process {how}")
            raise ChildError(f"the {self.name} process died {failures} times before it was ready")
        finally:
            await self._end()

    async def wait_ready(self) -> Ready:
        """Until it has its half of the model."""
        while self.ready is None:
            await self._is_there.wait()
        return self.ready

    async def send(
        self, message: FromLauncher, is_wanted: Callable[[], bool] = lambda: True
    ) -> None:
        """Send a message once the process is ready, if the message is still wanted.

        A message to a process that dies is lost: `on_death` must answer those who wait for it.
        """
        async with self._sending:
            await self.wait_ready()
            if self._pipe is None or not is_wanted():
                return
            try:
                await asyncio.to_thread(self._pipe.send_bytes, ENCODER.encode(message))
            except OSError:
                pass  # it is dead

    # ---- one process ---------------------------------------------------------------------------

    async def _one_life(self) -> str:
        """Start a process, take its messages until it is gone; how it went."""
        self._start()
        pipe, process = self._pipe, self._process
        if pipe is None or process is None:
            raise ChildError(f"the {self.name} process was not started")
        gone = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(pipe.fileno(), self._read, pipe, gone)
        try:
            await gone.wait()
        finally:
            loop.remove_reader(pipe.fileno())
        await asyncio.to_thread(process.join, PATIENCE)  # the pipe closes a little before it ends
        if process.is_alive():  # it closed its pipe and did not end: of no use
            process.kill()
            await asyncio.to_thread(process.join)
        pipe.close()
        return f"(pid {process.pid}) {_how(process.exitcode)}"

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=self._target, args=(theirs, *self._arguments), name=self.name
        )
        with blocked(SIGNALS):
            process.start()
        theirs.close()  # so that its death closes the pipe
        self._process, self._pipe = process, ours
        self.starts += 1

    def _read(self, pipe: Connection[bytes, bytes], gone: asyncio.Event) -> None:
        """Messages are short, so one that has begun to arrive is there at once."""
        try:
            message = TO_LAUNCHER.decode(pipe.recv_bytes())
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(pipe.fileno())
            gone.set()
            return
        if isinstance(message, Ready):
            self.ready = message
            self._is_there.set()
        self._on_message(self, message)

    async def _end(self) -> None:
        """End the process that runs, whatever it does."""
        process, pipe = self._process, self._pipe
        if process is None or pipe is None:
            return
        pipe.close()
        if self.ready is None:
            process.terminate()  # it is not reading its pipe yet
        for stop in (process.terminate, process.kill):
            await asyncio.to_thread(process.join, PATIENCE)
            if process.is_alive():
                stop()
        await asyncio.to_thread(process.join)
        process.close()


def _how(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"died of {signal.Signals(-exitcode).name}"
    return f"ended with exit code {exitcode}"


@contextmanager
def blocked(signals: set[signal.Signals]) -> Iterator[None]:
    """Keep signals waiting; a process started meanwhile begins with them blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
