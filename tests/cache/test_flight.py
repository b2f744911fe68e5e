"""Single flight: sixteen processes that want one key encode it once; see `flight.py`."""

from __future__ import annotations

from tests.cache.flight import fly
from tests.crash.fresh import run_in_fresh_interpreter

ROUNDS = 40


def test_sixteen_processes_encode_each_key_once() -> None:
    outcome = run_in_fresh_interpreter(fly, ROUNDS)
    assert outcome == (ROUNDS, ROUNDS, 0, 0, 0, 0)


def test_when_the_encoder_is_killed_one_other_takes_over() -> None:
    outcome = run_in_fresh_interpreter(fly, ROUNDS, kills=True)
    assert outcome == (ROUNDS, ROUNDS, 0, ROUNDS // 2, ROUNDS // 2, 0)
