"""Worker processes: started, given turns, ended. `Workers` owns every process it starts.

Each worker inherits nothing from the launcher, waits for turns on a pipe of its own, and ends when
that pipe closes or when the launcher is gone. A worker that dies or hangs is named.

It does not know what is measured.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from multiprocessing import connection, parent_process
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Protocol

import msgspec

from benchmarks.report import Done, Turn
from benchmarks.transport import Context

# Seconds. A start may import torch and fault in a pool; a turn at the largest size takes seconds
# with the slowest peer. Larger: a hang is told later. Smaller: a slow machine is taken for a hung
# one.
START_TIMEOUT = 120.0
TURN_TIMEOUT = 180.0
STOP_TIMEOUT = 5.0
# Between two looks at memory. Shorter: what is watched becomes slower. Longer: a short peak is
# missed.
WATCH_SECONDS = 0.003


class WorkerError(Exception):
    """A worker died or did not answer in time."""


class Work(Protocol):
    """What a worker does in its turns."""

    def turn(self, turn: Turn) -> Done: ...

    def close(self) -> None: ...


# Makes the work, in its process.
Make = Callable[[], Work]


def fresh_processes() -> Context:
    """Where every worker comes from: a server that has imported torch, no more."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    return context


class Worker:
    """One process, and the pipe on which it is given its turns."""

    def __init__(self, context: Context, role: str, make: Make) -> None:
        self.role = role
        self.control, child = context.Pipe()
        self.process: ForkServerProcess = context.Process(
            target=serve, args=(make, child), name=role, daemon=True
        )
        self.process.start()
        child.close()  # so that the pipe ends with the child

    def answer(self) -> Done:
        try:
            return msgspec.json.decode(self.control.recv_bytes(), type=Done)
        except (EOFError, ConnectionResetError):
            self.process.join(STOP_TIMEOUT)
            raise WorkerError(f"{self.role} died (exit code {self.process.exitcode})") from None

    def stop(self) -> None:
        """End the process: asked first, killed when it does not listen."""
        self.control.close()
        self.process.join(STOP_TIMEOUT)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()


class Workers:
    """Processes that have their turns together. Starting does not wait; `wait_ready` does."""

    def __init__(self, context: Context, roles: Sequence[tuple[str, Make]]) -> None:
        self.peak_pss_bytes = 0
        self._workers: list[Worker] = []
        with ExitStack() as undo:
            for role, make in roles:
                worker = Worker(context, role, make)
                undo.callback(worker.stop)
                self._workers.append(worker)
            self._resources = undo.pop_all()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._resources.close()

    def wait_ready(self) -> None:
        self._answers(START_TIMEOUT)

    def turn(self, *turns: Turn, watches_memory: bool = False) -> list[Done]:
        """One turn of every worker; `turns`: one for all, or one for each."""
        for index, worker in enumerate(self._workers):
            turn = turns[index] if len(turns) > 1 else turns[0]
            worker.control.send_bytes(msgspec.json.encode(turn))
        return self._answers(TURN_TIMEOUT, watches_memory)

    def _answers(self, timeout: float, watches_memory: bool = False) -> list[Done]:
        """In the workers' order. The first that dies is told at once, whoever waits for it."""
        deadline = time.monotonic() + timeout
        waiting = {worker.control: worker for worker in self._workers}
        found: dict[str, Done] = {}
        while waiting:
            if watches_memory:
                self._watch(list(waiting))
            ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                roles = ", ".join(worker.role for worker in waiting.values())
                raise WorkerError(f"no answer within {timeout:.0f} s from {roles}")
            for control in [control for control in waiting if control in ready]:
                worker = waiting.pop(control)
                found[worker.role] = worker.answer()
        return [found[worker.role] for worker in self._workers]

    def _watch(self, controls: list[Connection]) -> None:
        """Keep the peak of memory, once at least, and until the first of them answers."""
        while True:
            now = sum(pss_bytes(worker.process.pid or 0) for worker in self._workers)
            self.peak_pss_bytes = max(self.peak_pss_bytes, now)
            if connection.wait(controls, WATCH_SECONDS):
                return


def pss_bytes(pid: int) -> int:
    """Proportional set size of one process; 0 when it is gone.

    PSS counts a page that n processes have mapped as 1/n in each: the sum over those that share it
    counts it once. It includes Python, torch and the transport's own buffers; the rows of the bare
    wakes show what that is without any payload. Memory of daemons (Ray's) is not in it.
    """
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    for line in text.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


# --- what runs in the children ----------------------------------------------------------------


def serve(make: Make, control: Connection) -> None:
    """The main function of every worker: answers once when it is ready, then after each turn."""
    settle_in()
    work = make()
    try:
        done = Done()
        while (turn := next_turn(control, done)) is not None:
            done = work.turn(turn)
    finally:
        work.close()


def settle_in() -> None:
    """Make a child a quiet neighbour that cannot outlive the launcher."""
    import torch

    # One thread copies and fills. With more, the pool threads of torch spin for a while after each
    # call, on the very processor that the other side is about to be woken on.
    torch.set_num_threads(1)
    # Ctrl-C goes to every process of a terminal; the launcher's clean-up ends the children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, name="end-with-parent", daemon=True).start()


def end_with_parent() -> None:
    """A child asleep in a peer's queue would not see that the launcher was killed."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def next_turn(control: Connection, done: Done) -> Turn | None:
    """Tell what the last turn found, and wait for the next. None when the launcher wants none."""
    try:
        control.send_bytes(msgspec.json.encode(done))
        return msgspec.json.decode(control.recv_bytes(), type=Turn)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return None


class Repeated:
    """Work that is one step, again and again for `Turn.seconds`."""

    def __init__(self, step: Callable[[], object], close: Callable[[], None]) -> None:
        self._step = step
        self.close = close

    def turn(self, turn: Turn) -> Done:
        now, step = time.monotonic_ns, self._step
        for _ in range(turn.warm_up):
            step()
        began = last = now()
        end = began + int(turn.seconds * 1e9)
        steps = longest = 0
        while last < end:
            step()
            moment = now()
            longest = max(longest, moment - last)
            last = moment
            steps += 1
        return Done(steps=steps, began_ns=began, ended_ns=last, longest_ns=longest)
