"""Runs a probe in a process of its own, and reads its results: one JSON line each.

A process of its own, because a probe may import torch, start CUDA (after which the caller could
not fork any more) or die of a broken driver. What it found before it died is kept, and its death
is a result too. It never outlives its time limit.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from shmblocks.doctor.host import CheckResult

# The child finds this package where it is, also when only this process's `sys.path` leads there.
_ROOT = str(Path(__file__).resolve().parents[2])
_START = (
    "import importlib, sys; sys.path.append(sys.argv[1]); "
    "importlib.import_module(sys.argv[2]).main(sys.argv[3:])"
)


def run_module(
    name: str, module: str, arguments: Sequence[str], seconds: float
) -> list[CheckResult]:
    """What `module.main(arguments)` prints there; its failure is a result called `name`."""
    with subprocess.Popen(
        [sys.executable, "-c", _START, _ROOT, module, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as child:
        try:
            out, err = child.communicate(timeout=seconds)
            ending = _ending(child.returncode)
        except subprocess.TimeoutExpired:
            child.kill()
            out, err = child.communicate()
            ending = f"did not end within {seconds:g} s"
    return [*_results(out), *_failure(name, module, ending, err)]


def _ending(code: int) -> str:
    if code == 0:
        return ""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with code {code}"


def _results(out: str) -> Iterator[CheckResult]:
    for line in out.splitlines():
        try:
            yield msgspec.json.decode(line, type=CheckResult)
        except msgspec.MsgspecError:
            continue  # a library printed something of its own


def _failure(name: str, module: str, ending: str, err: str) -> Iterator[CheckResult]:
    if ending:
        said = err.strip().splitlines()[-1:] or ["nothing"]
        found = f"a trial in a process of its own {ending}; it said: {said[0]}"
        yield CheckResult(
            name, "fail", found, f"run it alone: python -c 'import {module} as m; m.main([])'"
        )


def report(results: Iterator[CheckResult]) -> None:
    """The child's side: print each result at once, so that none is lost with the process."""
    for result in results:
        sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
        sys.stdout.flush()
