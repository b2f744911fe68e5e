"""The soak and the fuzzers, shortly: the long runs are `scripts/soak` and `scripts/fuzz`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.support.children import run_program

# Seconds of the soak; the environment makes it longer or shorter.
SOAK_SECONDS = float(os.environ.get("SHMBLOCKS_SOAK_SECONDS", "120"))
FUZZ_INPUTS = 200_000

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {"PYTHONPATH": f"{ROOT / 'scripts'}{os.pathsep}{ROOT}"}


@pytest.mark.slow
@pytest.mark.watchdog(SOAK_SECONDS + 240)
def test_processes_that_are_killed_and_stopped_at_random_violate_nothing(pool_name: str) -> None:
    program = [sys.executable, "-m", "soaking", "--processes", "8", "--json"]
    options = ["--minutes", str(SOAK_SECONDS / 60), "--kill-rate", "2", "--name", pool_name]
    # Other tests run beside it, on the same two cores.
    options += ["--pace", "4"]
    ended = run_program(
        [*program, *options],
        returncode=None,
        timeout=SOAK_SECONDS + 200,
        environment=ENVIRONMENT,
    )
    assert ended.stdout, ended.stderr
    report = json.loads(ended.stdout)
    assert report["messages"] == [], ended.stderr
    assert ended.returncode == 0
    assert report["kills"] > SOAK_SECONDS / 2
    assert report["payloads"] > 0
    assert report["resumed"] > 0
    assert report["peer_deaths"] > 0


@pytest.mark.slow
@pytest.mark.watchdog(300)
def test_mutated_handles_messages_and_segments_give_errors_or_right_answers(pool_name: str) -> None:
    program = [sys.executable, "-m", "fuzzing", "--inputs", str(FUZZ_INPUTS), "--name", pool_name]
    ended = run_program(program, timeout=250, environment=ENVIRONMENT)
    assert [line.split(":")[0] for line in ended.stdout.splitlines()[1:]] == [
        "handles",
        "messages",
        "segments",
        "living pools",
    ]
