"""SIGKILL and KeyboardInterrupt at every line of a channel's operations; see `every_line.py`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.channel import every_line
from tests.crash.fresh import run_without_core
from tests.crash.plugin import SUMMARY

pytestmark = pytest.mark.watchdog(600)

# The least lines that an operation can have; fewer: nothing was watched.
FEWEST = 25


@pytest.mark.parametrize("name", every_line.CASES)
def test_killed_at_any_line_what_is_published_is_announced_and_nothing_else(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    coverage = run_without_core(every_line.kill, name)
    record_property(SUMMARY, f"channel, {coverage}")
    assert len(coverage.points) >= FEWEST


@pytest.mark.parametrize("name", every_line.CASES)
def test_interrupted_at_any_line_what_was_taken_is_at_the_front_again(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    coverage = run_without_core(every_line.interrupt, name)
    record_property(SUMMARY, f"channel, {coverage}")
    assert len(coverage.points) >= FEWEST
