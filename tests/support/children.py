"""Other processes in tests: started, spoken to, stopped, killed, and never waited for without end.

    with spawn(hold_the_lock, name) as child:     # hold_the_lock(channel, name) runs over there
        child.hear("locked")                      # ordered by messages, not by sleeping
        child.kill()                              # SIGKILL, and gone when this returns

- The function takes its end of the `Channel` first. For `spawn` it is a module's function with
  arguments that pickle; for `fork` it is anything, and inherits everything.
- Leaving the `with` block waits for the child: one that raised is told with its own traceback, one
  that does not end is dumped, killed and told as a hang. After `kill` nothing is asked of it, and
  when the block is left by an exception the child is killed.
- `run_in_child(function, *args)` and `run_in_fork(...)` run a function there and give its result.
- `run_program([...])` runs a program, captures its output, and kills its whole session on a hang.
- `wait_until(...)` polls for what cannot be waited for by a message.
- It does *not* look after what a child starts in turn: the leak check finds that.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Concatenate, Literal, NamedTuple, ParamSpec, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")
Method = Literal["spawn", "fork"]

# How long a test waits for another process before it calls it hung. Smaller: a spawned child that
# imports torch on a loaded machine is called hung. Larger: a real hang costs that much.
PATIENCE = 60.0
# How long a hung child has for writing its traceback before it is killed.
LAST_WORDS = 1.0
DUMP_SIGNAL = signal.SIGRTMAX


class ChildError(AssertionError):
    """The child raised, ended early, hung, or said something else than the test waits for."""


class Finished(NamedTuple):
    """A child's last message when its function returned."""

    result: object


class Raised(NamedTuple):
    """A child's last message when its function raised."""

    traceback: str


class Channel:
    """One end of the pipe between a test and its child; every wait on it is bounded."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def say(self, message: object) -> None:
        self._connection.send(message)

    def has_message(self, timeout: float) -> bool:
        return self._connection.poll(timeout)

    def receive(self, timeout: float = PATIENCE) -> object:
        """The next message of the other end; `EOFError` when that has ended."""
        if not self.has_message(timeout):
            raise ChildError(f"the other process said nothing for {timeout} s")
        message: object = self._connection.recv()
        return message

    def hear(self, expected: object, timeout: float = PATIENCE) -> None:
        """Wait for this very message."""
        require_same(self.receive(timeout), expected)

    def close(self) -> None:
        self._connection.close()


class Child:
    """Owns a process that runs `function(channel, *args, **kwargs)`; made by `spawn` and `fork`."""

    def __init__(
        self,
        method: Method,
        function: Callable[..., object],
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
    ) -> None:
        context = multiprocessing.get_context(method)
        ours, theirs = context.Pipe()
        self.name = getattr(function, "__name__", repr(function))
        self._channel = Channel(ours)
        self._was_killed = False
        self._finished: Finished | None = None
        self._exit_code: int | None = None
        inherited = ours if method == "fork" else None
        self._process = context.Process(  # type: ignore[attr-defined]
            target=_child_main, args=(theirs, inherited, function, args, kwargs)
        )
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        pid: int = self._process.pid
        return pid

    @property
    def exit_code(self) -> int | None:
        """Minus the signal's number for a killed child; None while it runs."""
        if self._exit_code is None:
            self._exit_code = self._process.exitcode
        return self._exit_code

    def say(self, message: object) -> None:
        self._channel.say(message)

    def receive(self, timeout: float = PATIENCE) -> object:
        """The child's next message; a `ChildError` that says why when there is none."""
        message = self._next(timeout)
        if isinstance(message, Finished):
            raise ChildError(f"{self} only returned {message.result!r} and said nothing more")
        return message

    def hear(self, expected: object, timeout: float = PATIENCE) -> None:
        """Wait for this very message."""
        require_same(self.receive(timeout), expected)

    def result(self, timeout: float = PATIENCE) -> object:
        """What its function returned. Messages that nobody received are dropped."""
        while self._finished is None:
            self._next(timeout)
        if self.wait(timeout) != 0:
            raise ChildError(f"{self} did its work, but then ended with exit code {self.exit_code}")
        return self._finished.result

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for its end, however that comes, and give the exit code."""
        if not self._ends_within(timeout):
            self._give_up(f"{self} did not end within {timeout} s")
        return cast("int", self.exit_code)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def stop(self) -> None:
        """SIGSTOP, and really stopped when this returns."""
        self.signal(signal.SIGSTOP)
        wait_until(lambda: _state(self.pid) == "T", f"{self} is stopped")

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and gone, all its locks and descriptors with it, when this returns."""
        self._was_killed = True
        if self.exit_code is None:
            self.signal(signal.SIGKILL)
            if not self._ends_within(PATIENCE):
                raise ChildError(f"{self} survives SIGKILL: it is stuck in the kernel")

    def close(self) -> None:
        self._channel.close()
        self._process.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        try:
            if kind is None and not self._was_killed:
                self.result()
        finally:
            self.kill()
            self.close()

    def __str__(self) -> str:
        return f"the child {self.name} (pid {self.pid})"

    def _next(self, timeout: float) -> object:
        self._await_message(timeout)
        try:
            message = self._channel.receive(0)
        except EOFError:
            raise ChildError(f"{self} ended early, with exit code {self.wait()}") from None
        if isinstance(message, Raised):
            raise ChildError(f"{self} raised:\n{message.traceback}")
        if isinstance(message, Finished):
            self._finished = message
        return message

    def _await_message(self, timeout: float) -> None:
        # The end of the pipe is no proof of life: a child's own children may hold it open.
        deadline = time.monotonic() + timeout
        while not self._channel.has_message(0.02):
            if self.exit_code is not None and not self._channel.has_message(0):
                raise ChildError(f"{self} ended early, with exit code {self.exit_code}")
            if time.monotonic() > deadline:
                self._give_up(f"{self} said nothing for {timeout} s")

    def _ends_within(self, timeout: float) -> bool:
        # Not `join`: that waits for a pipe which a forked child's own children hold open too.
        deadline = time.monotonic() + timeout
        while self.exit_code is None:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def _give_up(self, why: str) -> None:
        self.signal(DUMP_SIGNAL)
        time.sleep(LAST_WORDS)
        self.kill()
        raise ChildError(f"{why}; where it was stands in the captured standard error")


def spawn(
    function: Callable[Concatenate[Channel, P], object], *args: P.args, **kwargs: P.kwargs
) -> Child:
    """Start a child with a fresh interpreter."""
    return Child("spawn", function, args, kwargs)


def fork(
    function: Callable[Concatenate[Channel, P], object], *args: P.args, **kwargs: P.kwargs
) -> Child:
    """Start a child that is a copy of this process."""
    return Child("fork", function, args, kwargs)


def run_in_child(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of `function(*args, **kwargs)`, called in a fresh interpreter."""
    with spawn(_without_channel, function, args, kwargs) as child:
        return cast("T", child.result())


def run_in_fork(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of `function(*args, **kwargs)`, called in a copy of this process."""
    with fork(_without_channel, function, args, kwargs) as child:
        return cast("T", child.result())


def run_program(
    command: Sequence[str | Path],
    *,
    returncode: int | None = 0,
    timeout: float = PATIENCE,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end. `returncode` is what it must end with (None: whatever).

    `environment` is added to this process's own.
    """
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=directory,
        env={**os.environ, **(environment or {})},
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, errors = process.communicate()
            raise ChildError(_told(command, f"hung for {timeout} s", output, errors)) from None
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if returncode is not None and process.returncode != returncode:
        what = f"ended with {process.returncode}, expected {returncode}"
        raise ChildError(_told(command, what, output, errors))
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def wait_until(predicate: Callable[[], T], what: str, timeout: float = 10.0) -> T:
    """Poll until `predicate()` is true, and give what it gave; `what` completes "waited until"."""
    deadline = time.monotonic() + timeout
    pause = 0.0005
    while not (value := predicate()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout} s until {what}; the last look gave {value!r}")
        time.sleep(pause)
        pause = min(pause * 2, 0.02)
    return value


def require_same(message: object, expected: object) -> None:
    if message != expected:
        raise ChildError(f"expected the other process to say {expected!r}, got {message!r}")


def _child_main(
    connection: Connection,
    inherited: Connection | None,
    function: Callable[..., object],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
) -> None:
    if inherited is not None:
        inherited.close()  # or the pipe would not end when the parent does
    faulthandler.register(DUMP_SIGNAL, file=2, all_threads=True)
    channel = Channel(connection)
    try:
        result = function(channel, *args, **kwargs)
    except BaseException:
        channel.say(Raised(traceback.format_exc()))
        raise
    channel.say(Finished(result))


def _without_channel(
    _channel: Channel,
    function: Callable[..., T],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
) -> T:
    return function(*args, **kwargs)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _told(command: Sequence[str | Path], what: str, output: str, errors: str) -> str:
    line = " ".join(map(str, command))
    return f"{line}\n{what}\n--- standard output\n{output}\n--- standard error\n{errors}"
