"""`python -m sglang_cases [--short] [CASE ...]`: exit code 1 when a case does not hold."""

from __future__ import annotations

import argparse
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from sglang_cases import watching
from sglang_cases.cases import ALL, SHORT, Case, FailedError, Run


def main() -> int:
    """Run the cases that were asked for."""
    arguments = _arguments()
    cases = _chosen(arguments)
    folder = Path(tempfile.mkdtemp(prefix="sglang-cases-"))
    failed = ["none ran to its end"]
    try:
        failed = [case.__name__ for case in cases if not _holds(case, folder)]
    finally:
        if not failed or not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    if failed:
        print(f"FAILED: {', '.join(failed)}" + (f"; logs in {folder}" if arguments.keep else ""))
        return 1
    print(f"{len(cases)} cases hold")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/sglang", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(_names()))
    parser.add_argument("--short", action="store_true", help="what .ci/run runs")
    parser.add_argument("--keep", action="store_true", help="keep the servers' logs of a failure")
    return parser.parse_args()


def _names() -> dict[str, Case]:
    return {case.__name__: case for case in (*ALL, *SHORT)}


def _chosen(arguments: argparse.Namespace) -> tuple[Case, ...]:
    known = _names()
    unknown = [name for name in arguments.cases if name not in known]
    if unknown:
        sys.exit(f"CASE: expected {', '.join(known)}, got {', '.join(unknown)}")
    if arguments.cases:
        return tuple(known[name] for name in arguments.cases)
    return SHORT if arguments.short else ALL


def _holds(case: Case, folder: Path) -> bool:
    name = f"sglang-cases-{secrets.token_hex(4)}"
    started = time.monotonic()
    print(f"== {case.__name__}", flush=True)
    try:
        case(Run(folder, name))
        left = watching.segments(name)
        if left:
            print(f"   left in /dev/shm: {left}")
    except (FailedError, RuntimeError, OSError, subprocess.TimeoutExpired):
        traceback.print_exc()
        left = watching.segments(name)
        watching.remove(name)
        print(f"   does not hold, after {time.monotonic() - started:.0f} s", flush=True)
        return False
    print(f"   holds, {time.monotonic() - started:.0f} s", flush=True)
    return not left


if __name__ == "__main__":
    sys.exit(main())
