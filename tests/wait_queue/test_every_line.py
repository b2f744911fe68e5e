"""SIGKILL and KeyboardInterrupt at every line of a wait for blocks; judged in `every_line.py`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.crash.fresh import run_without_core
from tests.crash.plugin import SUMMARY
from tests.wait_queue import every_line

# The least lines that an operation can have; fewer: nothing was watched.
FEWEST = 40


@pytest.mark.parametrize("name", every_line.OPERATIONS)
def test_killed_at_any_line_of_a_wait_it_holds_up_nobody(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    coverage = run_without_core(every_line.kill, name)
    record_property(SUMMARY, f"wait queue, {coverage}")
    assert len(coverage.points) >= FEWEST


@pytest.mark.parametrize("name", every_line.OPERATIONS)
def test_interrupted_at_any_line_of_a_wait_it_leaves_the_queue_and_keeps_nothing(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    coverage = run_without_core(every_line.interrupt, name)
    record_property(SUMMARY, f"wait queue, {coverage}")
    assert len(coverage.points) >= FEWEST
