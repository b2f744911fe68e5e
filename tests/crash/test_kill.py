"""SIGKILL at every line of every operation; what each leaves is judged in `judge.py`.

The harness itself asserts that it killed at as many points as a run that nobody disturbs has. The
floors below guard against an operation that came to be watched in part only.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shmblocks.testing import Step
from tests.crash import judge
from tests.crash.fresh import run_without_core
from tests.crash.operations import CASES
from tests.crash.plugin import SUMMARY

pytestmark = pytest.mark.watchdog(600)

# The least lines that an operation of each kind can have; a tenth of it: nothing was watched.
FEWEST = 30


@pytest.mark.parametrize("name", CASES)
def test_killed_at_any_line_an_operation_is_done_or_not_and_harms_nobody(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    coverage = run_without_core(judge.kill, name)
    record_property(SUMMARY, str(coverage))
    assert len(coverage.points) >= FEWEST
    assert [point.number for point in coverage.points] == list(range(1, len(coverage.points) + 1))


# Between two lines lie the instructions of which each may be the last one.
def test_killed_at_any_bytecode_instruction_an_allocation_is_made_or_not(
    record_property: Callable[[str, object], None],
) -> None:
    coverage = run_without_core(judge.kill, "alloc", step=Step.OPCODE)
    record_property(SUMMARY, str(coverage))
    assert len(coverage.points) >= 10 * FEWEST
    assert any(point.function == "commit" for point in coverage.points)
