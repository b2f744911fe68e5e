"""SIGKILL at every line of every operation; what each leaves is judged in `judge.py`.

The harness itself asserts that it killed at as many points as a run that nobody disturbs has. The
floors below guard against an operation that came to be watched in part only.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shmblocks.testing import Step
from tests.crash import judge
from tests.crash.operations import CASES
from tests.crash.plugin import SUMMARY
from tests.crash.rooms import run_in_clean_room

pytestmark = pytest.mark.watchdog(600)

# The least lines that an operation of each kind can have; a tenth of it: nothing was watched.
FEWEST = 30


@pytest.mark.parametrize("name", CASES)
def test_killed_at_any_line_an_operation_is_done_or_not_and_harms_nobody(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    coverage = run_in_clean_room(judge.kill, name)
    record_property(SUMMARY, str(coverage))
    assert len(coverage.points) >= FEWEST
    assert [point.number for point in coverage.points] == list(range(1, len(coverage.points) + 1))


# Between two lines lie the instructions of which each may be the last one.
@pytest.mark.parametrize("name", ["alloc", "publish_", "release_the_last"])
def test_killed_at_any_bytecode_instruction_an_operation_is_done_or_not(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    coverage = run_in_clean_room(judge.kill, name, step=Step.OPCODE)
    record_property(SUMMARY, str(coverage))
    assert len(coverage.points) >= 10 * FEWEST


def test_the_lines_that_commit_are_among_those_killed_at() -> None:
    coverage = run_in_clean_room(judge.kill, "publish_")
    assert [point for point in coverage.points if point.function == "commit"]
    assert [point for point in coverage.points if point.function == "_leave"]
