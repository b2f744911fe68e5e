"""SIGKILL at every line of the hooks' functions; see `every_line.py`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.crash.fresh import run_without_core
from tests.crash.plugin import SUMMARY
from tests.sglang_plugin import every_line

pytestmark = [pytest.mark.watchdog(900), pytest.mark.slow]

# The least lines that one can have; fewer: nothing was watched.
FEWEST = 4


@pytest.mark.parametrize("name", every_line.CASES)
def test_killed_at_any_line_the_dead_hold_nothing_and_the_living_can_read(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    coverage = run_without_core(every_line.kill, name)
    record_property(SUMMARY, f"sglang, {coverage}")
    assert len(coverage.points) >= FEWEST
