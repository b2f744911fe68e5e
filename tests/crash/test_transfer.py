"""The death of either side of a transfer, at every line of each of its steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.crash.fresh import run_without_core
from tests.crash.plugin import SUMMARY

pytestmark = pytest.mark.watchdog(600)

STEPS = [
    "language, landing: asks",
    "language, landing: resumes",
    "language, landing: succeeds",
    "language, landing: releases",
    "language, landing: closes",
    "language, push: succeeds",
    "language, push: releases",
    "embedding, landing: writes",
    "embedding, landing: writes the rest",
    "embedding, landing: succeeds",
    "embedding, landing: closes",
    "embedding, push: writes",
    "embedding, push: succeeds",
]


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_line_one_side_of_a_transfer_costs_the_other_only_its_room(
    step: str, record_property: Callable[[str, object], None]
) -> None:
    # Over there: it imports torch, which collecting this module must not.
    from tests.crash import transfer_cases

    coverage = run_without_core(transfer_cases.kill, step)
    record_property(SUMMARY, f"transfer, {coverage}")


def test_every_step_is_killed() -> None:
    from tests.crash import transfer_cases

    assert list(transfer_cases.STEPS) == STEPS
