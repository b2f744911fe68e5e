"""The processes of one candidate: started, given turns, ended. Owns every process it starts.

Each inherits nothing from the conductor, waits for turns on a pipe of its own, and ends when that
pipe closes or when the process that started it is gone. A child that dies or hangs is named, with
the candidate it belongs to.

It does not know what is measured.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from multiprocessing import connection, parent_process
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Protocol

import msgspec

from benchmarks.link import Candidate, Context, Ends, Receiver, Sender, Solo, SoloPlan
from benchmarks.results import Sample, Turn, TurnDone
from benchmarks.settings import Settings

# Seconds. A start may import torch and fault in a pool; a turn at the largest size takes seconds
# with the slowest peer. Larger: a hang is told later. Smaller: a slow machine is taken for a hung
# one.
START_TIMEOUT = 120.0
TURN_TIMEOUT = 180.0
STOP_TIMEOUT = 5.0
# Between two looks of who watches a turn. Shorter: what is watched becomes slower. Longer: a short
# peak is missed.
WATCH_SECONDS = 0.003


class CrewError(Exception):
    """A candidate's process died or did not answer in time."""


class Work(Protocol):
    """What a process of a crew does in its turns."""

    def turn(self, turn: Turn) -> list[Sample]: ...

    def close(self) -> None: ...


class Worker:
    """One process, and the pipe on which it is given its turns."""

    def __init__(self, context: Context, role: str, make: Callable[[], Work]) -> None:
        self.role = role
        self.control, child = context.Pipe()
        self.process: ForkServerProcess = context.Process(
            target=serve, args=(make, child), name=role, daemon=True
        )
        self.process.start()
        child.close()  # so that the pipe ends with the child

    def answer(self, timeout: float) -> TurnDone:
        if not self.control.poll(timeout):
            raise CrewError(f"{self.role} did not answer within {timeout:.0f} s")
        try:
            return msgspec.json.decode(self.control.recv_bytes(), type=TurnDone)
        except EOFError:
            self.process.join(STOP_TIMEOUT)
            raise CrewError(f"{self.role} died (exit code {self.process.exitcode})") from None

    def stop(self) -> None:
        """End the process: asked first, killed when it does not listen."""
        self.control.close()
        self.process.join(STOP_TIMEOUT)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()


class Crew:
    """A candidate that is ready to be measured. Starting does not wait; `wait_ready` does."""

    def __init__(self, candidate: Candidate, context: Context, settings: Settings) -> None:
        self.candidate = candidate
        self._workers: list[Worker] = []
        with ExitStack() as undo, ExitStack() as given_away:
            for role, make in self._roles(undo, given_away, context, settings):
                worker = Worker(context, f"{candidate.name}: {role}", make)
                undo.callback(worker.stop)
                self._workers.append(worker)
            self._resources = undo.pop_all()

    def wait_ready(self) -> None:
        self._answers(START_TIMEOUT)

    def turn(self, turn: Turn, watch: Callable[[list[int]], None] | None = None) -> list[Sample]:
        """One turn of every process; `watch` is called with their pids again and again."""
        for worker in self._workers:
            worker.control.send_bytes(msgspec.json.encode(turn))
        return self._answers(TURN_TIMEOUT, watch)

    def close(self) -> None:
        self._resources.close()

    def _roles(
        self, undo: ExitStack, given_away: ExitStack, context: Context, settings: Settings
    ) -> list[tuple[str, Callable[[], Work]]]:
        how = self.candidate.how
        if isinstance(how, SoloPlan):
            return [("its process", partial(make_solo, how.prepare(settings)))]
        ends = undo.enter_context(how(context, settings))
        acknowledgements, acknowledge = context.Pipe(duplex=False)
        # Only the children keep these, so that the producer notices when the consumer is gone.
        given_away.callback(acknowledgements.close)
        given_away.callback(acknowledge.close)
        return [
            ("consumer", partial(make_consumer, ends, acknowledge, settings)),
            ("producer", partial(make_producer, ends, acknowledgements, settings)),
        ]

    def _answers(
        self, timeout: float, watch: Callable[[list[int]], None] | None = None
    ) -> list[Sample]:
        """What the workers found; the first that dies is told at once, whoever waits for it."""
        deadline = time.monotonic() + timeout
        waiting = {worker.control: worker for worker in self._workers}
        samples: list[Sample] = []
        while waiting:
            if watch is not None:
                self._watch(watch, list(waiting))
            for control in self._wait(list(waiting.values()), deadline, timeout):
                samples += waiting.pop(control).answer(timeout).samples
        return samples

    def _watch(self, watch: Callable[[list[int]], None], controls: list[Connection]) -> None:
        """Once at least, and until the first of them answers."""
        pids = [worker.process.pid or 0 for worker in self._workers]
        watch(pids)
        while not connection.wait(controls, WATCH_SECONDS):
            watch(pids)

    def _wait(self, workers: list[Worker], deadline: float, timeout: float) -> list[Connection]:
        controls = [worker.control for worker in workers]
        ready = connection.wait(controls, max(0.0, deadline - time.monotonic()))
        if not ready:
            roles = ", ".join(worker.role for worker in workers)
            raise CrewError(f"no answer within {timeout:.0f} s from {roles}")
        return [control for control in controls if control in ready]


# --- what runs in the children --------------------------------------------------------------


class SoloWork:
    """Gives a solo candidate its turns."""

    def __init__(self, solo: Solo) -> None:
        self._solo = solo

    def turn(self, turn: Turn) -> list[Sample]:
        return self._solo.measure(turn.size, turn.warm_up + turn.count)[turn.warm_up :]

    def close(self) -> None:
        self._solo.close()


def make_solo(make: Callable[[], Solo]) -> Work:
    return SoloWork(make())


def make_producer(ends: Ends, acknowledgements: Connection, settings: Settings) -> Work:
    from benchmarks.pingpong import Producer

    sender: Sender = ends.sender()
    return Producer(sender, acknowledgements, settings)


def make_consumer(ends: Ends, acknowledge: Connection, settings: Settings) -> Work:
    from benchmarks.pingpong import Consumer

    receiver: Receiver = ends.receiver()
    return Consumer(receiver, acknowledge, settings)


def serve(make: Callable[[], Work], control: Connection) -> None:
    """The main function of every child: answers once when it is ready, then after each turn."""
    settle_in()
    work = make()
    try:
        done = TurnDone([])
        while (turn := next_turn(control, done)) is not None:
            done = TurnDone(work.turn(turn))
    finally:
        work.close()


def settle_in() -> None:
    """Make a child a quiet neighbour that cannot outlive the conductor."""
    import torch

    # One thread copies and fills. With more, the pool threads of torch spin for a while after each
    # call, on the very processor that the other side is about to be woken on.
    torch.set_num_threads(1)
    # Ctrl-C goes to every process of a terminal; the conductor's clean-up ends the children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, name="end-with-parent", daemon=True).start()


def end_with_parent() -> None:
    """A child asleep in a peer's queue would not see that the conductor was killed."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def next_turn(control: Connection, done: TurnDone) -> Turn | None:
    """Tell what the last turn found, and wait for the next. None when the conductor wants none."""
    try:
        control.send_bytes(msgspec.json.encode(done))
        return msgspec.json.decode(control.recv_bytes(), type=Turn)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return None
