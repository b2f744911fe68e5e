"""SIGKILL and KeyboardInterrupt at every line of the cache's operations; see `every_line.py`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.cache import every_line
from tests.crash.fresh import run_without_core
from tests.crash.plugin import SUMMARY

pytestmark = pytest.mark.watchdog(600)

# The least lines that an operation can have; fewer: nothing was watched.
FEWEST = 15


@pytest.mark.parametrize("name", every_line.CASES)
def test_killed_at_any_line_a_key_is_there_or_not_and_blocks_are_accounted_for(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    coverage = run_without_core(every_line.kill, name)
    record_property(SUMMARY, f"cache, {coverage}")
    assert len(coverage.points) >= FEWEST


@pytest.mark.parametrize("name", every_line.CASES)
def test_interrupted_at_any_line_what_was_taken_is_given_back(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    coverage = run_without_core(every_line.interrupt, name)
    record_property(SUMMARY, f"cache, {coverage}")
    assert len(coverage.points) >= FEWEST
