"""`scripts/bench --against DIR`: this shmblocks and that of another checkout, in turns.

Each of the two has an interpreter of its own that imports its shmblocks and runs *these*
benchmarks. A round visits every size and every way of handing over, and lets both have a turn, one
straight after the other, in an order that is drawn. So both meet the same state of the machine, and
each round gives a ratio of its own: what is said is the median of those, and between which bounds
half of them lie.

    this process                          interpreter with PYTHONPATH = the checkout
    {"way": ..., "size": ...}  ------->   one turn
                               <-------   microseconds
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import msgspec

from benchmarks.report import quantile
from benchmarks.settings import Settings
from benchmarks.table import Grid, drawn, duration

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
WAYS = ("shmblocks-in-place", "shmblocks-copy")
STEPS = "steps"
# Handoffs of one turn in which the steps are timed.
STEP_HANDOFFS = 200
# Seconds for an interpreter to end by itself.
PATIENCE = 30.0


class CheckoutError(Exception):
    """A checkout has no shmblocks, or its interpreter ended."""


class Ask(msgspec.Struct, frozen=True):
    """What an interpreter does next: a turn of a transport at a size, or the steps."""

    way: str
    size: int = 0


# Of a turn, by what was timed: microseconds.
Times = dict[str, list[float]]


class Checkout:
    """An interpreter with the shmblocks of one checkout."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        if not (folder / "shmblocks" / "__init__.py").is_file():
            raise CheckoutError(f"expected a checkout of shmblocks, got {folder}")
        self.folder = folder
        # `python -m` looks in the working directory first, then along PYTHONPATH.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.against", str(folder)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(SCRIPTS)])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._ask, self._answers = _pipes(self._process)
        self._send(msgspec.json.encode(settings))
        self._receive()

    def turn(self, ask: Ask) -> Times:
        self._send(msgspec.json.encode(ask))
        return msgspec.json.decode(self._receive(), type=Times)

    def close(self) -> None:
        """End the interpreter, and so all that it started."""
        self._ask.close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()

    def _send(self, message: bytes) -> None:
        self._ask.write(message + b"\n")
        self._ask.flush()

    def _receive(self) -> bytes:
        line = self._answers.readline()
        if not line:
            raise CheckoutError(f"{self.folder}: its interpreter ended ({self._process.wait()})")
        return line


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    if process.stdin is None or process.stdout is None:
        raise TypeError("expected a process with pipes")
    return process.stdin, process.stdout


def compare(
    other: Path, settings: Settings, progress: Callable[[int, int], None]
) -> dict[str, dict[str, list[float]]]:
    """What was timed -> "this", "other", "ratio" -> one number of each round."""
    with ExitStack() as stack:
        checkouts = {}
        for name, folder in (("other", other.resolve()), ("this", ROOT)):
            checkouts[name] = Checkout(folder, settings)
            stack.callback(checkouts[name].close)
        order = random.Random(settings.seed)
        found: dict[str, dict[str, list[float]]] = {}
        asks = [Ask(way, size) for size in settings.tokens for way in WAYS] + [Ask(STEPS)]
        for round_ in range(settings.rounds):
            progress(round_, settings.rounds)
            for ask in asks:
                names = order.sample(sorted(checkouts), 2)
                times = {name: checkouts[name].turn(ask) for name in names}
                for what in times["this"]:
                    kept = found.setdefault(what, {"other": [], "this": [], "ratio": []})
                    medians = {name: quantile(times[name][what], 0.5) for name in names}
                    for name, median in medians.items():
                        kept[name].append(median)
                    kept["ratio"].append(medians["this"] / medians["other"])
        progress(settings.rounds, settings.rounds)
    return found


def main(other: Path, settings: Settings, json_file: Path | None) -> int:
    """Compare and say what was found; 2 when `other` is no checkout."""
    from benchmarks.cli import progress

    try:
        found = compare(other, settings, progress)
    except CheckoutError as problem:
        print(f"scripts/bench: --against: {problem}", file=sys.stderr)
        return 2
    print(drawn(grid(found, other, settings)))
    if json_file:
        json_file.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


def grid(found: dict[str, dict[str, list[float]]], other: Path, settings: Settings) -> Grid:
    rows = []
    for what, kept in found.items():
        low, middle, high = (quantile(kept["ratio"], share) for share in (0.25, 0.5, 0.75))
        both = [duration(quantile(kept[name], 0.5)) for name in ("other", "this")]
        rows.append([what, *both, f"{middle:.3f}", f"{low:.3f} to {high:.3f}"])
    return Grid(
        f"This checkout against {other}: medians of {settings.rounds} turns each, "
        f"x {settings.hidden} x bf16",
        ["", "other", "this", "this / other", "half of the rounds"],
        rows,
    )


# --- the interpreter of one checkout ----------------------------------------------------------


def serve(folder: Path) -> None:
    """Answer what is asked on stdin until it ends."""
    import shmblocks

    if not Path(shmblocks.__file__).resolve().is_relative_to(folder):
        raise CheckoutError(f"expected the shmblocks of {folder}, got {shmblocks.__file__}")
    settings = msgspec.json.decode(sys.stdin.buffer.readline(), type=Settings)
    with ways(settings) as turn:
        _answer({})
        for line in sys.stdin.buffer:
            _answer(turn(msgspec.json.decode(line, type=Ask)))


def _answer(times: Times) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(times) + b"\n")
    sys.stdout.buffer.flush()


@contextmanager
def ways(settings: Settings) -> Iterator[Callable[[Ask], Times]]:
    """All ways ready and warm; what is given makes a turn of one of them."""
    from benchmarks.experiments.steps import handoff_steps, pool_and_queue
    from benchmarks.launcher import start
    from benchmarks.transports import choose

    with ExitStack() as stack:
        entries = {entry.transport.name: entry for entry in start(choose(WAYS), settings, stack)}
        pool, queue = stack.enter_context(pool_and_queue())
        for entry in entries.values():
            for size in settings.tokens:
                entry.warm_up(size)

        def turn(ask: Ask) -> Times:
            if ask.way == STEPS:
                took = handoff_steps(pool, queue, STEP_HANDOFFS)
                whole = {"one process, whole handoff": [sum(took.values())]}
                return whole | {f"  {name}": [value] for name, value in took.items()}
            samples = entries[ask.way].measure(ask.size)
            label = f"{entries[ask.way].transport.label}, {ask.size:,} tokens"
            return {label: [sample.latency_ns / 1_000 for sample in samples]}

        yield turn


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
