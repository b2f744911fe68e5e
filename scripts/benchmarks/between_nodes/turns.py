"""The processes of all transports, their turns, and what came out."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import NamedTuple, Protocol, cast

import msgspec

from benchmarks.between_nodes import baselines, ours, peers
from benchmarks.between_nodes.kit import Half, NotHereError, Reader, Source, size_of
from benchmarks.between_nodes.ray_objects import RayPair

RAW = "raw TCP"
OURS = "shmblocks.nodes"
# Seconds for a half to start. Longer: one that hangs is noticed later.
START_TIMEOUT = 120.0


class Transport(NamedTuple):
    """What runs in the two processes of a transport."""

    name: str
    source: Half
    reader: Half


TRANSPORTS = (
    Transport("memcpy", baselines.nothing, baselines.memcpy),
    Transport(RAW, baselines.raw_source, baselines.raw_reader),
    Transport("raw TCP, MSG_WAITALL", baselines.raw_source, baselines.waitall_reader),
    Transport(OURS, ours.nodes_source, ours.nodes_reader),
    Transport("zmq", peers.zmq_source, peers.zmq_reader),
    Transport("NIXL", peers.nixl_source, peers.nixl_reader),
    Transport("Mooncake", peers.mooncake_source, peers.mooncake_reader),
)
RAY = "Ray"


class Turn(NamedTuple):
    """Seconds of one payload: on the clock, and of CPU on both sides."""

    seconds: float
    reader_cpu: float
    source_cpu: float


class Measured(msgspec.Struct, frozen=True):
    """One transport at one size. CPU seconds are per GB of payload."""

    transport: str
    payload_bytes: int
    median_seconds: float
    best_seconds: float
    reader_cpu: float
    source_cpu: float


class LeftOut(msgspec.Struct, frozen=True):
    """A transport that was not measured."""

    transport: str
    why: str


class Runs(Protocol):
    """A transport that is ready."""

    def turn(self, tokens: int) -> Turn: ...


# ---- a half in its own process -----------------------------------------------------------------


def _run_source(control: Connection, make: Half, name: str, most: int) -> None:
    with contextlib.ExitStack() as stack:
        try:
            source = cast("Source", make(stack, name, most, None))
        except NotHereError as error:
            control.send(error)
            return
        control.send(source.told)
        while (tokens := control.recv()) is not None:
            control.send((source.prepare(tokens) if tokens else None, time.process_time()))


def _run_reader(control: Connection, make: Half, name: str, most: int) -> None:
    with contextlib.ExitStack() as stack:
        try:
            reader = cast("Reader", make(stack, name, most, control.recv()))
        except NotHereError as error:
            control.send(error)
            return
        control.send(None)
        while (asked := control.recv()) is not None:
            tokens, prepared = asked
            cpu, start = time.process_time(), time.perf_counter()
            reader.carry(tokens, prepared)
            seconds = time.perf_counter() - start
            control.send((seconds, time.process_time() - cpu))


class _Process:
    """One half, and this process's end of its pipe."""

    def __init__(self, body: Callable[..., None], make: Half, name: str, most: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        # Its own process group member: killed by us alone.
        self._process = context.Process(target=body, args=(theirs, make, name, most))
        self._process.start()
        theirs.close()

    def hear(self) -> object:
        if not self.pipe.poll(START_TIMEOUT):
            raise NotHereError(f"it said nothing for {START_TIMEOUT:g} s")
        try:
            value: object = self.pipe.recv()
        except EOFError:
            self._process.join()
            raise NotHereError(f"its process ended with {self._process.exitcode}") from None
        if isinstance(value, NotHereError):
            raise value
        return value

    def ask(self, value: object) -> object:
        self.pipe.send(value)
        return self.hear()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send(None)
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self.pipe.close()


class Pair:
    """Both halves of a transport."""

    def __init__(self, stack: contextlib.ExitStack, transport: Transport, most: int) -> None:
        name = f"bench-{os.getpid()}-{TRANSPORTS.index(transport)}"
        self._source = _Process(_run_source, transport.source, f"{name}-a", most)
        stack.callback(self._source.close)
        self._reader = _Process(_run_reader, transport.reader, f"{name}-b", most)
        stack.callback(self._reader.close)
        self._reader.ask(self._source.hear())

    def turn(self, tokens: int) -> Turn:
        prepared, cpu = cast("tuple[object, float]", self._source.ask(tokens))
        answer = self._reader.ask((tokens, prepared))
        seconds, reader_cpu = cast("tuple[float, float]", answer)
        _, cpu_after = cast("tuple[object, float]", self._source.ask(0))
        return Turn(seconds, reader_cpu, cpu_after - cpu)


class RayTurns:
    """Ray has its own processes."""

    def __init__(self, stack: contextlib.ExitStack, most: int) -> None:
        self._pair = RayPair(stack, most)

    def turn(self, tokens: int) -> Turn:
        prepared = self._pair.prepare(tokens)
        reader, source = self._pair.cpu()
        seconds = self._pair.carry(prepared)
        reader_after, source_after = self._pair.cpu()
        return Turn(seconds, reader_after - reader, source_after - source)


# ---- all of them -------------------------------------------------------------------------------


def measure(
    tokens: Sequence[int], rounds: int, only: Sequence[str] = ()
) -> tuple[list[Measured], list[LeftOut]]:
    """Every transport that is here, in turns."""
    most, left_out = max(tokens), []
    with contextlib.ExitStack() as stack:
        ready: dict[str, Runs] = {}
        for name in (*(each.name for each in TRANSPORTS), RAY):
            if only and name not in only:
                continue
            with contextlib.ExitStack() as own:
                try:
                    ready[name] = _start(own, name, most)
                except NotHereError as error:
                    left_out.append(LeftOut(name, str(error)))
                    continue
                stack.enter_context(own.pop_all())
        # Each page is mapped, and each connection made, as it is after a while of any use.
        for runs in ready.values():
            for _ in range(2):
                runs.turn(most)
        return [found for size in tokens for found in _measure_size(ready, size, rounds)], left_out


def _start(stack: contextlib.ExitStack, name: str, most: int) -> Runs:
    if name == RAY:
        return RayTurns(stack, most)
    (transport,) = (each for each in TRANSPORTS if each.name == name)
    return Pair(stack, transport, most)


def _measure_size(ready: dict[str, Runs], tokens: int, rounds: int) -> list[Measured]:
    turns: dict[str, list[Turn]] = {name: [] for name in ready}
    for number in range(rounds + 1):
        for name, runs in ready.items():
            turn = runs.turn(tokens)
            if number:  # the first one is not counted
                turns[name].append(turn)
    size = size_of(tokens)
    gigabytes = size * rounds / 1e9
    return [
        Measured(
            name,
            size,
            statistics.median(turn.seconds for turn in of),
            min(turn.seconds for turn in of),
            sum(turn.reader_cpu for turn in of) / gigabytes,
            sum(turn.source_cpu for turn in of) / gigabytes,
        )
        for name, of in turns.items()
    ]
