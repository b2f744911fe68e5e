"""The best window against the plainest way to find it: all windows, compared."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shmblocks._state.eviction import Item, _best

items = st.lists(
    st.tuples(st.integers(1, 4), st.none() | st.integers(0, 6)), min_size=1, max_size=10
)


def plainest(runs: list[list[Item]], num_blocks: int) -> int | None:
    """How old the youngest victim of the best window is; None: there is no window."""
    ages = []
    for run in runs:
        for first in range(len(run)):
            for last in range(first, len(run)):
                window = run[first : last + 1]
                if sum(item.num_blocks for item in window) >= num_blocks:
                    ages.append(max(item.used_ns for item in window))
    return min(ages) if ages else None


@given(sizes=st.lists(items, min_size=1, max_size=3), num_blocks=st.integers(1, 12))
def test_no_window_has_an_older_youngest_victim(
    sizes: list[list[tuple[int, int | None]]], num_blocks: int
) -> None:
    runs: list[list[Item]] = []
    start = 0
    for run in sizes:
        runs.append([])
        for blocks, used in run:
            runs[-1].append(Item(start, blocks, -1 if used is None else used))
            start += blocks
        start += 1
    best = _best(runs, num_blocks)
    expected = plainest(runs, num_blocks)
    assert (best is None) == (expected is None)
    if best is None or expected is None:
        return
    by_start = {item.start: item for run in runs for item in run}
    victims = [by_start[start] for start in best.victims]
    assert max((item.used_ns for item in victims), default=-1) == expected
    # From its start on, free items and victims are consecutive, and enough.
    its_run = next(run for run in runs if by_start[best.start] in run)
    blocks, at = 0, its_run.index(by_start[best.start])
    while blocks < num_blocks:
        item = its_run[at]
        assert item.used_ns < 0 or item in victims
        blocks, at = blocks + item.num_blocks, at + 1
    # No victim is one too many at the end of the window.
    assert all(item.start < best.start + blocks for item in victims)
