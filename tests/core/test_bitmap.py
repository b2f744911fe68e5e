"""The search for free blocks against the obvious way of doing it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmblocks._state.bitmap import find_zeros


def obvious(bits: int, width: int, count: int) -> int:
    text = "".join("1" if bits >> position & 1 else "0" for position in range(width))
    return text.find("0" * count)


@given(st.integers(0, 200).flatmap(lambda width: st.tuples(
    st.just(width), st.integers(0, (1 << width) - 1), st.integers(1, 210)
)))  # fmt: skip
def test_the_lowest_run_of_zeros_is_found(case: tuple[int, int, int]) -> None:
    width, bits, count = case
    assert find_zeros(bits, width, count) == obvious(bits, width, count)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 70)), max_size=12), st.integers(1, 80))
def test_long_runs_are_found_among_long_runs(runs: list[tuple[bool, int]], count: int) -> None:
    text = "".join(("1" if used else "0") * length for used, length in runs)
    bits = int(text[::-1] or "0", 2)
    assert find_zeros(bits, len(text), count) == text.find("0" * count)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6, 7, 8])
def test_every_short_bitmap_is_searched_right(width: int) -> None:
    for bits in range(1 << width):
        for count in range(1, width + 2):
            assert find_zeros(bits, width, count) == obvious(bits, width, count)


def test_ones_above_the_width_are_not_looked_at() -> None:
    assert find_zeros(~0 << 8, 8, 8) == 0
    assert find_zeros(~0 << 8, 9, 9) == -1


def test_large_bitmaps_are_searched_right(rng: random.Random) -> None:
    width = 20_000
    bits = rng.getrandbits(width) | rng.getrandbits(width)
    for count in (1, 2, 3, 7, 8, 9, 16, 20):
        assert find_zeros(bits, width, count) == obvious(bits, width, count)
