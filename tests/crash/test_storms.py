"""Exceptions that come from outside, at moments that nobody chose."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.crash import storms
from tests.crash.fresh import run_in_fresh_interpreter
from tests.crash.plugin import SUMMARY

ROUNDS = 600


@pytest.mark.parametrize("storm", [storms.by_signal, storms.from_another_thread])
def test_an_exception_at_any_moment_leaves_the_lock_free_and_the_state_whole(
    storm: Callable[[int, int], None],
    rng: random.Random,
    record_property: Callable[[str, object], None],
) -> None:
    seed = rng.getrandbits(32)
    run_in_fresh_interpreter(storm, ROUNDS, seed)
    record_property(SUMMARY, f"asynchronous exceptions {storm.__name__}: {ROUNDS}, seed {seed}")
