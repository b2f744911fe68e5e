"""Runs random programs as real processes and says what is wrong: `python -m tests.users.generator`.

A program is right when it prints `right` and nothing else, ends with 0, and leaves no segment and
no process. Everything else is a finding, and is told with the program and how to run it again.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support import leaks, naming, procfs
from tests.support.children import ChildError, run_program
from tests.users.generator.writer import Writer

ROOT = Path(__file__).resolve().parents[3]
MARK = "SHMBLOCKS_TEST_PROGRAM"
# Seconds after which a program is a hang; the program itself shows where it hangs before.
LONGEST = 100.0
GRACE_SECONDS = 5.0


def finding(seed: int, number: int) -> str | None:
    """Run the program; what is wrong with it, None when nothing is."""
    text = Writer(f"{seed}:{number}").text
    with tempfile.TemporaryDirectory(prefix="shmblocks-program-") as directory:
        path = Path(directory, "program.py")
        path.write_text(text)
        problems = list(problems_of(path, naming.new_pool_name()))
    if not problems:
        return None
    again = f"scripts/random_programs --seed {seed} --first {number} --programs 1"
    told = "\n".join(problems)
    return f"{told}\n--- again: {again}\n--- the program\n{text}"


def problems_of(path: Path, name: str) -> Iterator[str]:
    environment = {MARK: name, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    try:
        done = run_program(
            [sys.executable, path], returncode=None, timeout=LONGEST, environment=environment
        )
    except ChildError as error:
        yield str(error)
    else:
        if (done.returncode, done.stdout, done.stderr) != (0, "right\n", ""):
            yield f"ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    deadline = time.monotonic() + GRACE_SECONDS
    while (left := left_of(name)) and time.monotonic() < deadline:
        time.sleep(0.02)
    if left:
        yield "left behind:\n" + leaks.describe(left)
        leaks.remove(left)


def left_of(name: str) -> list[leaks.Leak]:
    segments = [leaks.Leak("segment", each, segment=each) for each in procfs.segments(name)]
    processes = procfs.processes_with(MARK, name)
    return segments + [leaks.Leak("process", str(each), process=each) for each in processes]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/random_programs", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="for how long (1)")
    parser.add_argument("--programs", type=int, help="so many, instead of for a time")
    parser.add_argument("--seed", type=int, help="a new one each run, printed")
    parser.add_argument("--first", type=int, default=0, help="number of the first program (0)")
    parser.add_argument("--jobs", type=int, default=max(2, os.cpu_count() or 1))
    parser.add_argument("--show", action="store_true", help="print the first program, run nothing")
    parser.add_argument("--keep-going", action="store_true", help="after a finding too")
    options = parser.parse_args(arguments)
    seed = naming.run_seed() if options.seed is None else options.seed
    if options.show:
        print(Writer(f"{seed}:{options.first}").text)
        return 0
    print(f"random programs with --seed {seed}", flush=True)
    ran = findings = 0
    deadline = time.monotonic() + options.minutes * 60
    number = options.first
    with ThreadPoolExecutor(options.jobs) as executor:
        while more(ran, options.programs, deadline) and (not findings or options.keep_going):
            numbers = range(number, number + options.jobs)
            if options.programs is not None:
                numbers = numbers[: options.programs - ran]
            for each in executor.map(finding, [seed] * len(numbers), numbers):
                if each is not None:
                    findings += 1
                    print(f"--- finding {findings}\n{each}", flush=True)
            ran += len(numbers)
            number += len(numbers)
    print(f"{ran} programs, {findings} findings")
    return 1 if findings else 0


def more(ran: int, programs: int | None, deadline: float) -> bool:
    return ran < programs if programs is not None else time.monotonic() < deadline
