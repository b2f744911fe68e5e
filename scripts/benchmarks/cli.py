"""``scripts/bench``: measure, say what was found, keep it.

Exit code 0 when the run came to its end, whether or not targets are met; 2 for wrong arguments;
130 or 143 when it was ended from outside, after it tidied up. A wrong byte, or a worker that dies
or hangs, ends the run with an exception.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import msgspec

from benchmarks import report, table
from benchmarks.experiments import EXPERIMENTS, experiments
from benchmarks.plot import NothingToPlotError, save_plot
from benchmarks.report import Report
from benchmarks.settings import QUICK, Settings

HANDOFFS = "handoffs"
# Fewer: half of the rounds lie further apart than what is to be found.
ROUNDS_AGAINST = 30
PARTS = (HANDOFFS, *EXPERIMENTS)


def main(arguments: Sequence[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, _terminated)
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.device == "cuda":
        from benchmarks import cuda

        return cuda.main(options.rounds or (30 if options.quick else 500), options.json)
    try:
        if options.against:
            from benchmarks import against

            return against.main(options.against, _settings(options), options.json)
        found = _load(options.load, parser) if options.load else _measure(options, parser)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if options.json:
        options.json.write_bytes(report.save(found))
    table.show(found)
    return _plot(found, options.plots) if options.plots else 0


def _plot(found: Report, folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        save_plot(found, folder / "handoff.png")
    except NothingToPlotError as problem:
        print(f"scripts/bench: --plots: {problem}", file=sys.stderr)
        return 2
    return 0


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """End as Ctrl-C does, through every clean-up, and not at once."""
    raise SystemExit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="What a handoff costs: baselines of this machine, shmblocks, and its peers.",
    )
    add = parser.add_argument
    add("parts", metavar="PART", nargs="*", type=_part, help=f"of {', '.join(PARTS)}: all")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: handoffs on a GPU")
    add("--against", metavar="DIR", type=Path, help="handoffs of another checkout, in turns")
    add("--quick", action="store_true", help="small and short: shows that it works, not numbers")
    add("--only", metavar="NAME,NAME", type=_names, help="only these transports (see --list)")
    add("--tokens", metavar="N,N", type=_sizes, help="other payloads, in tokens")
    add("--rounds", metavar="N", type=_positive, help="how often each transport has its turn")
    add("--seed", type=int, default=0, help="of the payloads and of the order of turns")
    add("--json", metavar="FILE", type=Path, help="write everything measured")
    add("--plots", metavar="FOLDER", type=Path, help="draw the handoffs: FOLDER/handoff.png")
    add("--load", metavar="FILE", type=Path, help="show a run saved with --json; measure nothing")
    add("--list", action=_ListTransports, nargs=0, help="name the transports")
    return parser


class _ListTransports(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        from benchmarks.transports import TRANSPORTS

        for transport in TRANSPORTS:
            print(f"{transport.name:24} {transport.kind.value:10} {transport.about}")
        parser.exit()


def _part(text: str) -> str:
    if text not in PARTS:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(PARTS)}; got {text!r}")
    return text


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {value}")
    return value


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(sorted({_positive(part) for part in text.split(",")}))


def _load(path: Path, parser: argparse.ArgumentParser) -> Report:
    try:
        return report.load(path.read_bytes())
    except (OSError, msgspec.DecodeError) as problem:
        parser.error(f"--load: {problem}")


def _settings(options: argparse.Namespace) -> Settings:
    full = Settings(rounds=ROUNDS_AGAINST) if options.against else Settings()
    settings = QUICK if options.quick else full
    return msgspec.structs.replace(
        settings,
        tokens=options.tokens or settings.tokens,
        rounds=options.rounds or settings.rounds,
        seed=options.seed,
    )


def _measure(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Report:
    from benchmarks.launcher import measure
    from benchmarks.targets import judge
    from benchmarks.transports import UnknownTransportError, choose, left_out

    settings = _settings(options)
    try:
        transports = choose(options.only)
    except UnknownTransportError as problem:
        parser.error(f"--only: {problem}")
    start = time.monotonic()
    parts = options.parts or ([HANDOFFS] if options.only else PARTS)
    series = measure(transports, settings, progress) if HANDOFFS in parts else []
    found = experiments(parts, options.quick)
    return Report(
        machine=report.this_machine(),
        tokens=list(settings.tokens),
        hidden=settings.hidden,
        rounds=settings.rounds,
        seed=settings.seed,
        seconds=time.monotonic() - start,
        series=series,
        experiments=found,
        left_out=[] if options.only else left_out(),
        targets=judge(series, found),
    )


def progress(done: int, rounds: int) -> None:
    """One line that is written over, and only to a person."""
    if sys.stderr.isatty():
        end = "\n" if done == rounds else ""
        print(f"\rround {done} of {rounds} done", end=end, file=sys.stderr, flush=True)
