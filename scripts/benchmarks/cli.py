"""``scripts/bench``: measure, say what was found, keep it.

Exit code 0 when the run came to its end, whether or not targets are met; 2 for wrong arguments;
130 or 143 when it was ended from outside, after it tidied up. A wrong byte, a candidate's death or
its hanging ends the run with an exception.
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

from benchmarks import results, table
from benchmarks.plot import NothingToPlotError, save_plot
from benchmarks.plot_studies import save_study_plots
from benchmarks.results import Report
from benchmarks.settings import Settings, full, quick
from benchmarks.targets import judge

PARTS = ("handoffs", "budget", "throughput", "contention", "attach", "fragmentation")


def main(arguments: Sequence[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, _terminated)
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.device == "cuda":
        from benchmarks import cuda

        return cuda.main(options.rounds or (30 if options.quick else 500), options.json)
    try:
        report = _load(options.load, parser) if options.load else _measure(options, parser)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if options.json:
        options.json.write_bytes(results.save(report))
    table.show(report)
    if options.plots:
        save_study_plots(report, options.plots)
    if options.plot or options.plots:
        return _plot(report, options.plot or options.plots / "handoff.png")
    return 0


def _plot(report: Report, path: Path) -> int:
    try:
        save_plot(report, path)
    except NothingToPlotError as problem:
        print(f"scripts/bench: --plot: {problem}", file=sys.stderr)
        return 2
    return 0


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """End as Ctrl-C does, through every clean-up, and not at once."""
    raise SystemExit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="What a handoff costs: floors of this machine, shmblocks, and its peers.",
    )
    add = parser.add_argument
    add("parts", metavar="PART", nargs="*", type=_part, help=f"of {', '.join(PARTS)}: all")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: handoffs on a GPU")
    add("--quick", action="store_true", help="small and short: shows that it works, not numbers")
    add("--only", metavar="NAME,NAME", type=_names, help="only these candidates (see --list)")
    add("--tokens", metavar="N,N", type=_sizes, help="other payloads, in tokens")
    add("--rounds", metavar="N", type=_positive, help="how often each candidate has its turn")
    add("--seed", type=int, default=0, help="of the payloads and of the order of turns")
    add("--cold", action="store_true", help="no untimed small messages before each timed one")
    add("--json", metavar="FILE", type=Path, help="write everything measured")
    add("--plot", metavar="FILE", type=Path, help="write a picture of the handoffs (.png, .svg)")
    add("--plots", metavar="FOLDER", type=Path, help="write every picture there, as .png")
    add("--load", metavar="FILE", type=Path, help="show a run saved with --json; measure nothing")
    add("--list", action=_ListCandidates, nargs=0, help="name the candidates")
    return parser


class _ListCandidates(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        from benchmarks.links.registry import CANDIDATES

        for candidate in CANDIDATES:
            print(f"{candidate.name:20} {candidate.kind.value:10} {candidate.about}")
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
        return results.load(path.read_bytes())
    except (OSError, msgspec.DecodeError) as problem:
        parser.error(f"--load: {problem}")


def _settings(options: argparse.Namespace) -> Settings:
    settings = quick(options.seed) if options.quick else full(options.seed)
    return msgspec.structs.replace(
        settings,
        tokens=options.tokens or settings.tokens,
        rounds=options.rounds or settings.rounds,
        rehearsals=0 if options.cold else settings.rehearsals,
    )


def _measure(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Report:
    from benchmarks.conductor import measure
    from benchmarks.links.registry import UnknownCandidateError, choose, left_out
    from benchmarks.machine import this_machine
    from benchmarks.studies.registry import study

    settings = _settings(options)
    try:
        candidates = choose(options.only)
    except UnknownCandidateError as problem:
        parser.error(f"--only: {problem}")
    start = time.monotonic()
    parts = options.parts or (["handoffs"] if options.only else PARTS)
    series = measure(candidates, settings, _progress) if "handoffs" in parts else []
    studies = study(parts, options.quick)
    return Report(
        machine=this_machine(),
        tokens=list(settings.tokens),
        hidden=settings.hidden,
        rounds=settings.rounds,
        seed=settings.seed,
        rehearsals=settings.rehearsals,
        seconds=time.monotonic() - start,
        series=series,
        studies=studies,
        left_out=[] if options.only else left_out(),
        targets=judge(series, studies),
    )


def _progress(done: int, rounds: int) -> None:
    """One line that is written over, and only to a person."""
    if sys.stderr.isatty():
        end = "\n" if done == rounds else ""
        print(f"\rround {done} of {rounds} done", end=end, file=sys.stderr, flush=True)
