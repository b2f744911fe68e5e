"""The death of either side of a fetch, at every line of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.fresh import run_without_core
from tests.crash.plugin import SUMMARY
from tests.nodes import every_line

pytestmark = pytest.mark.watchdog(600)

# A tenth of what there is: nothing was watched.
FEWEST = 20


@pytest.mark.parametrize("name", every_line.READERS)
def test_a_reader_that_is_killed_at_any_line_costs_neither_node_a_block(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    coverage = run_without_core(every_line.kill_reader, name)
    record_property(SUMMARY, f"nodes, {coverage}")
    assert len(coverage.points) >= FEWEST


@pytest.mark.slow
def test_a_reader_with_an_agent_that_is_killed_at_any_line_costs_neither_node_a_block(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    coverage = run_without_core(every_line.kill_reader_with_an_agent, str(tmp_path))
    record_property(SUMMARY, f"nodes, {coverage}")
    assert len(coverage.points) >= FEWEST


def test_a_server_that_is_killed_at_any_line_costs_neither_node_a_block(
    record_property: Callable[[str, object], None],
) -> None:
    coverage = run_without_core(every_line.kill_server)
    record_property(SUMMARY, f"nodes, {coverage}")
    assert len(coverage.points) >= FEWEST


@pytest.mark.parametrize("name", every_line.GETTERS)
def test_one_who_is_killed_at_any_line_of_a_get_by_key_leaves_no_claim_and_no_half_entry(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    coverage = run_without_core(every_line.kill_getter, name)
    record_property(SUMMARY, f"nodes, {coverage}")
    assert len(coverage.points) >= FEWEST


def test_an_owner_that_is_killed_at_any_line_makes_a_miss_or_a_whole_entry(
    record_property: Callable[[str, object], None],
) -> None:
    coverage = run_without_core(every_line.kill_owner)
    record_property(SUMMARY, f"nodes, {coverage}")
    assert len(coverage.points) >= FEWEST
