"""Child processes of a launcher: started, watched, and ended whatever happens.

- A child that ends before the launcher ended it is a `ChildDiedError` that names it.
- Leaving the `with` ends every child: politely after a good run (its pipe is closed), by SIGTERM
  otherwise, by SIGKILL when that was not enough.
- Ctrl-C is the launcher's alone: children are started with it blocked and never see it.

What it does not do: know what the children compute, or pickle what goes through their pipes.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext, SpawnProcess

SIGNALS = {signal.SIGINT, signal.SIGTERM}
# Seconds for a child to end by itself. Smaller: one in a long computation is killed needlessly.
# Larger: a child that hangs holds the launcher longer.
PATIENCE = 20.0


class ChildDiedError(Exception):
    """A child ended before the launcher ended it."""


@dataclass(frozen=True)
class Child:
    """One process and the launcher's end of its pipe."""

    name: str
    process: SpawnProcess
    control: Connection[bytes, bytes]

    @property
    def death(self) -> ChildDiedError:
        """The error that names it and how it ended."""
        self.process.join(10.0)  # the pipe closes a little before the process is gone
        code = self.process.exitcode
        how = f"with exit code {code}"
        if code is not None and code < 0:
            how = f"of {signal.Signals(-code).name}"
        return ChildDiedError(f"the {self.name} process (pid {self.process.pid}) died {how}")


class Children:
    """The children, in the order they were started."""

    def __init__(self, context: SpawnContext) -> None:
        self._context = context
        self.all: list[Child] = []

    def start(self, name: str, target: Callable[..., None], *args: object) -> Child:
        """Start `target(control, *args)` in a process of its own."""
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=target, args=(theirs, *args), name=name)
        with blocked(SIGNALS):
            process.start()
        theirs.close()  # so that its death closes the pipe
        child = Child(name, process, ours)
        self.all.append(child)
        return child

    def receive(self, timeout: float) -> Iterator[tuple[Child, bytes]]:
        """The messages that are there, waiting at most `timeout` seconds for a first one."""
        by_pipe = {child.control: child for child in self.all}
        ready = wait(list(by_pipe), timeout)
        if not ready:
            names = ", ".join(f"{child.name} (pid {child.process.pid})" for child in self.all)
            raise TimeoutError(f"none of {names} said anything within {timeout:g} s")
        for pipe in ready:
            child = by_pipe[pipe]  # type: ignore[index]  # wait() returns what it was given
            try:
                yield child, child.control.recv_bytes()
            except (EOFError, ConnectionResetError):
                raise child.death from None

    def send(self, child: Child, message: bytes) -> None:
        """A message to one child."""
        try:
            child.control.send_bytes(message)
        except BrokenPipeError:
            raise child.death from None

    def __enter__(self) -> Children:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with blocked(SIGNALS):  # a second Ctrl-C changes nothing: ending is bounded in time
            # All pipes first: a child that loses its partner before its own signal knows why.
            for child in self.all:
                child.control.close()
            for child in self.all:
                if kind is not None:
                    child.process.terminate()
            for child in self.all:
                _end(child.process)


def _end(process: SpawnProcess) -> None:
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
    process.join()
    process.close()


@contextmanager
def blocked(signals: set[signal.Signals]) -> Iterator[None]:
    """Keep signals waiting; a process started meanwhile begins with them blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
