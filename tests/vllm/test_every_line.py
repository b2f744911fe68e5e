"""SIGKILL at every line of the connector's own steps; see `every_line.py`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.crash.fresh import run_without_core
from tests.crash.plugin import SUMMARY
from tests.vllm import every_line

pytestmark = pytest.mark.watchdog(600)

# The least lines that a step has; fewer: nothing was watched.
FEWEST = 3


@pytest.mark.parametrize("name", every_line.CASES)
def test_killed_at_any_line_the_connector_leaves_nothing_and_breaks_nothing(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    coverage = run_without_core(every_line.kill, name)
    record_property(SUMMARY, f"vllm, {coverage}")
    assert len(coverage.points) >= FEWEST
