"""A queue's users die and are interrupted at every line; `queue_cases.py` judges."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.crash import queue_cases
from tests.crash.plugin import SUMMARY
from tests.crash.rooms import run_in_clean_room

pytestmark = pytest.mark.watchdog(600)


@pytest.mark.parametrize("name", queue_cases.CASES)
def test_killed_at_any_line_a_user_of_a_queue_loses_at_most_what_it_had_in_hand(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    coverage = run_in_clean_room(queue_cases.kill, name)
    record_property(SUMMARY, f"queue, {coverage}")


@pytest.mark.parametrize("name", queue_cases.CASES)
def test_interrupted_at_any_line_a_user_of_a_queue_leaves_it_to_the_others(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    coverage = run_in_clean_room(queue_cases.interrupt, name)
    record_property(SUMMARY, f"queue, {coverage}")


@pytest.mark.parametrize("disturb", [queue_cases.kill_create, queue_cases.interrupt_create])
def test_a_queue_whose_making_was_disturbed_at_any_line_can_be_made_anew(
    disturb: Callable[[], object], record_property: Callable[[str, object], None]
) -> None:
    record_property(SUMMARY, f"queue, {run_in_clean_room(disturb)}")
