"""Processes that die, stop and go on, on purpose.

    run_and_kill(lambda: pool.alloc(100), at=7)      # a child that dies before its 7th line
    stop(pid) ... cont(pid)                          # SIGSTOP, and really stopped when it returns
    abandon(pool)                                    # what SIGKILL leaves of a pool, without dying

Children are forked, run one function and leave by `os._exit`: no handler, no finalizer, no buffer
of the parent runs in them. Every wait is bounded.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

import msgspec

from shmblocks.pool import BlockPool
from shmblocks.testing.points import Point, Scope, Step, Trace

# Seconds. Shorter: a loaded machine is called a hang. Longer: a real hang costs that much.
PATIENCE = 30.0
_CHUNK = 1 << 16
_FAILED = 1

Tell = Callable[[bytes], None]


class Ending(NamedTuple):
    """How a forked child ended: its exit code (minus the signal's number), and what it told."""

    exit_code: int
    told: bytes

    @property
    def was_killed(self) -> bool:
        return self.exit_code == -signal.SIGKILL


def die() -> NoReturn:
    """SIGKILL to the calling process: nothing runs after this, in any of its threads."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("alive after SIGKILL")


def abandon(pool: BlockPool) -> None:
    """What a process's death leaves of its pool, while the process lives on.

    Drops the file locks and nothing else: reservations, leases and the participant's record stay as
    they are, for others to reap. The pool is closed in this process afterwards.
    """
    pool._finalizer.detach()
    pool.state.close()


def stop(pid: int, timeout: float = PATIENCE) -> None:
    """SIGSTOP; every thread of the process stands when this returns."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + timeout
    while _state(pid) not in "TXZ":
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} did not stop within {timeout:g} s")
        time.sleep(0.0005)


def cont(pid: int) -> None:
    """SIGCONT to a process that `stop` stopped."""
    os.kill(pid, signal.SIGCONT)


def _state(pid: int) -> str:
    """The letter of proc_pid_stat(5); X when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def run_and_kill(
    operation: Callable[[], object],
    at: int | Callable[[Point], bool],
    *,
    scope: Scope | None = None,
    step: Step = Step.LINE,
) -> Point:
    """Run the operation in a forked child that kills itself at a point; which one it was.

    `at` is the point's number, or a function that says of each point whether to die there. An
    operation that ends before is an AssertionError.
    """
    number = at if isinstance(at, int) else 0

    def body(tell: Tell) -> None:
        def act(point: Point) -> None:
            if isinstance(at, int) or at(point):
                tell(msgspec.msgpack.encode(point))
                die()

        run_traced(operation, Trace(scope or Scope(), step, number, act))

    ending = run_forked(body)
    if not ending.was_killed:
        raise AssertionError(f"the operation ended without being killed: {ending}")
    return msgspec.msgpack.decode(ending.told, type=Point)


def run_traced(operation: Callable[[], object], trace: Trace) -> object:
    """Run an operation under a trace, with no garbage collection in between."""
    collects = gc.isenabled()
    gc.disable()
    trace.start()
    try:
        # Named, so that it dies after the trace has ended.
        result = operation()
    finally:
        trace.stop()
        if collects:
            gc.enable()
    return result


def run_forked(
    body: Callable[[Tell], None],
    *,
    timeout: float = PATIENCE,
    trace: Trace | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> Ending:
    """Run `body(tell)` in a forked child and wait for its end.

    A child that raises has told its traceback and ends with 1; one that hangs is killed and is a
    TimeoutError. `trace` is running while the child is born, so that it sees fork handlers too.
    `meanwhile` is called every millisecond while the child runs.
    """
    ours, theirs = os.pipe()
    pid = 0
    try:
        if trace is not None:
            trace.spare(os.getpid())
            trace.start()
        pid = os.fork()
        if trace is not None:
            trace.stop()
        if pid == 0:
            _child(body, theirs)
        os.close(theirs)
        theirs = -1
        return _await(pid, ours, timeout, meanwhile)
    except BaseException:
        if pid:
            _put_down(pid)
        raise
    finally:
        os.close(ours)
        if theirs >= 0:
            os.close(theirs)


def _put_down(pid: int) -> None:
    """Kill a child that nobody waits for any more."""
    with contextlib.suppress(ChildProcessError):
        if os.waitpid(pid, os.WNOHANG) == (0, 0):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _child(body: Callable[[Tell], None], pipe: int) -> NoReturn:
    code = _FAILED
    try:
        body(lambda data: _write_all(pipe, data))
        code = 0
    except BaseException:  # noqa: BLE001 - told to the parent, whatever it is
        _write_all(pipe, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _write_all(pipe: int, data: bytes) -> None:
    while data:
        data = data[os.write(pipe, data) :]


def _await(pid: int, pipe: int, timeout: float, meanwhile: Callable[[], None] | None) -> Ending:
    """Read what the child tells until it is gone. Its own children may hold the pipe longer."""
    os.set_blocking(pipe, False)
    deadline = time.monotonic() + timeout
    told = bytearray()
    with _watch(pid, pipe) as wait:
        while True:
            wait(1 if meanwhile else 100)
            if meanwhile is not None:
                meanwhile()
            gone, status = os.waitpid(pid, os.WNOHANG)
            with contextlib.suppress(BlockingIOError):
                while chunk := os.read(pipe, _CHUNK):
                    told += chunk
            if gone:
                return Ending(os.waitstatus_to_exitcode(status), bytes(told))
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"a forked child was not over within {timeout:g} s and was killed; it told: "
                    f"{bytes(told)[-2000:].decode(errors='replace')!r}"
                )


@contextlib.contextmanager
def _watch(pid: int, pipe: int) -> Iterator[Callable[[int], object]]:
    """Waits at most so many milliseconds for something to be told, or for the process to end."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    try:
        watch = os.pidfd_open(pid)
    except (AttributeError, OSError):  # before Linux 5.3: the end is looked for
        yield lambda _: poll.poll(1)
        return
    poll.register(watch, select.POLLIN)

    def wait(milliseconds: int) -> None:
        for descriptor, event in poll.poll(milliseconds):
            if descriptor == pipe and not event & select.POLLIN:
                # It has closed the pipe, and takes some time yet to end: only that is waited for.
                poll.unregister(pipe)

    try:
        yield wait
    finally:
        os.close(watch)
