"""SIGKILL and KeyboardInterrupt at every line of a queue's operations; see `every_line.py`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.crash.fresh import run_without_core
from tests.crash.plugin import SUMMARY
from tests.queue import every_line

# The least lines that an operation can have; fewer: nothing was watched.
FEWEST = 20


@pytest.mark.parametrize("name", [name for name, it in every_line.CASES.items() if it.killable])
def test_killed_at_any_line_it_loses_what_it_had_in_hand_and_holds_up_nobody(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    coverage = run_without_core(every_line.kill, name)
    record_property(SUMMARY, f"queue, {coverage}")
    assert len(coverage.points) >= FEWEST


@pytest.mark.parametrize(
    "name", [name for name, it in every_line.CASES.items() if it.interruptible]
)
def test_interrupted_at_any_line_it_goes_on_afterwards(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    coverage = run_without_core(every_line.interrupt, name, KeyboardInterrupt)
    record_property(SUMMARY, f"queue, {coverage}")
    assert len(coverage.points) >= FEWEST
