"""Some random programs of this run's seed; `scripts/random_programs` runs them for longer."""

from __future__ import annotations

import random

import pytest

from tests.support import naming
from tests.users.generator import run
from tests.users.generator.writer import Writer

# Together some 40 seconds of one processor.
BATCHES = 8
PROGRAMS_PER_BATCH = 5


@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_random_program_does_what_the_model_says_and_leaves_nothing(batch: int) -> None:
    for number in range(batch * PROGRAMS_PER_BATCH, (batch + 1) * PROGRAMS_PER_BATCH):
        finding = run.finding(naming.run_seed(), number)
        if finding is not None:
            pytest.fail(finding, pytrace=False)


def test_a_seed_always_gives_the_same_program_and_another_seed_another(rng: random.Random) -> None:
    seed = str(rng.randrange(1 << 32))
    assert Writer(seed).text == Writer(seed).text
    assert Writer(seed).text != Writer(seed + "-").text


def test_a_program_that_does_something_else_is_a_finding_that_can_be_run_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = "import os, sys\nprint('wrong')\nopen('/dev/shm/' + os.environ[MARK], 'w')\n"
    monkeypatch.setattr(Writer, "text", f"MARK = {run.MARK!r}\n{text}")
    told = run.finding(5, 3)
    assert told is not None
    assert "ended with 0\nwrong" in told
    assert "left behind:\n  segment: " in told
    assert "scripts/random_programs --seed 5 --first 3 --programs 1" in told
    assert text in told
