"""`scripts/vllm [--short] [CASE ...]`: run the cases; exit code 1 if one does not hold."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from vllm_cases import cases, models, serving
from vllm_cases.cases import Bench
from vllm_cases.engines import ENVIRONMENT, leftovers


def main() -> int:
    arguments = _arguments()
    work: Path = arguments.work
    logs = work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    prefix = cases.prefix()
    began, failed = time.monotonic(), list[str]()
    for kind in models.KINDS:
        if arguments.model not in ("", kind):
            continue
        bench = Bench(_model(kind, work), logs, prefix)
        run = _Run(kind, failed)
        run("mono", partial(bench.learn, cases.ASKED))
        for case in cases.SHORT if arguments.short else cases.CASES:
            if not arguments.case or case.__name__ in arguments.case:
                run(case.__name__, partial(case, bench))
        # It is about processes, ports and signals: one model is enough.
        wanted = not arguments.case or "served" in arguments.case
        if kind == models.KINDS[0] and wanted and not arguments.short:
            run("served", partial(serving.served, bench, logs))
    left = leftovers(prefix)
    if left:
        failed.append(f"left in /dev/shm: {', '.join(left)}")
    verdict = f"FAILED: {', '.join(failed)}" if failed else "all cases hold"
    print(f"{verdict} ({time.monotonic() - began:.0f} s; logs in {logs})", flush=True)
    return 1 if failed else 0


class _Run:
    """Runs cases of one model, and notes which failed."""

    def __init__(self, kind: str, failed: list[str]) -> None:
        self._kind = kind
        self._failed = failed

    def __call__(self, name: str, case: Callable[[], None]) -> None:
        began = time.monotonic()
        try:
            case()
        except Exception:  # noqa: BLE001  the next case may hold
            traceback.print_exc()
            self._failed.append(f"{self._kind} {name}")
        outcome = "FAILED" if f"{self._kind} {name}" in self._failed else "ok"
        print(f"{self._kind:7s} {name}: {outcome}, {time.monotonic() - began:.0f} s", flush=True)


def _model(kind: str, work: Path) -> Path:
    """The folder of a model, made if it is not there."""
    folder = work / "models" / kind
    if not (folder / "video_preprocessor_config.json").exists():
        subprocess.run(
            [sys.executable, "-m", "vllm_cases.models", kind, folder],
            check=True,
            env=dict(ENVIRONMENT, PYTHONPATH=str(Path(__file__).parents[1])),
            stderr=subprocess.DEVNULL,
        )
    return folder


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/vllm", description="Run the vLLM connector in real engines, on a CPU."
    )
    names = [case.__name__ for case in cases.CASES]
    parser.add_argument(
        "case", nargs="*", help=f"only these: {', '.join([*names, 'served'])}", metavar="CASE"
    )
    parser.add_argument("--short", action="store_true", help="two cases, for CI")
    parser.add_argument("--model", default="", choices=("", *models.KINDS), help="only this one")
    parser.add_argument("--work", type=Path, required=True, help="where models and logs go")
    found = parser.parse_args()
    unknown = set(found.case) - {*names, "served"}
    if unknown:
        parser.error(f"unknown case: {', '.join(sorted(unknown))}")
    return found


if __name__ == "__main__":
    sys.exit(main())
