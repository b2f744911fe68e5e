"""A process dies at any store of the compiled core; a survivor finds everything in order."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from compiling import build
from tests.compiled import faults
from tests.crash.fresh import run_with_faults
from tests.crash.plugin import SUMMARY

pytestmark = pytest.mark.watchdog(600)

# Cases of the suites that kill at every line, and at least so many stores and calls of the kernel
# each has in the core; fewer: the core was not used, or does not say where it stores.
CASES = {
    ("pool", "alloc"): 80,
    ("pool", "alloc_blocks"): 80,
    ("pool", "alloc_that_wraps"): 80,
    ("pool", "publish_a_part"): 25,
    ("pool", "open_"): 45,
    ("pool", "open_before_it_is_ready"): 40,
    ("pool", "open_one_of_any_number"): 45,
    ("pool", "release"): 25,
    ("pool", "release_the_last"): 25,
    ("pool", "release_what_is_draining"): 25,
    ("pool", "release_while_another_reads"): 25,
    ("pool", "free_a_reservation"): 20,
    ("pool", "free_what_is_published"): 20,
    ("pool", "reserve_and_publish"): 100,
    ("channel", "send_a_reservation"): 140,
    ("channel", "receive"): 75,
    ("channel", "receive_many"): 145,
    ("channel", "receive_what_is_redelivered"): 145,
    ("channel", "receive_past_what_was_freed"): 80,
    ("cache", "get_and_release"): 75,
    ("queue", "put"): 8,
    ("queue", "get"): 6,
}


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    if not build.is_fresh("_faults"):
        build.build("_faults", "-DSHMBLOCKS_FAULTS")


@pytest.mark.parametrize(("suite", "name"), CASES)
def test_killed_at_any_store_it_has_happened_or_not(
    suite: str, name: str, record_property: Callable[[str, object], None]
) -> None:
    coverage = run_with_faults(faults.kill, suite, name)
    points = len(coverage.points)
    record_property(SUMMARY, f"core, {suite}: {name}: killed at {points} stores and calls")
    assert points >= CASES[suite, name]
