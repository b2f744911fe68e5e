"""Which entries go when an allocation finds no room: the best window.

Blocks of an allocation are consecutive, so that evicting the oldest entries one by one may free
many blocks and no run. The best *window* is the run of blocks, free or of evictable entries, whose
youngest victim is the oldest: of all ways to make the room it loses what was used the longest ago.

    entries by position     [ A 9 ]  free  [ B 2 ][ C 3 ]  leased  [ D 1 ]      (last used at ...)
    room for 3 blocks       A+free: 9      B+C: 3                  D alone: too small     -> B, C

Measured by simulation (Zipf 0.6 to 1.1, a pool of a sixth of all bytes): evicting by age until a
run is free loses 3 to 8 points of hit rate against it; an arena of scattered blocks, which needs no
run at all, is within one point by bytes.

Contract
- Evictable: published under a key for any number of readers, complete, no lease open, its hold
  over. Nothing else is ever touched.
- One pass over the live allocations; of many, first over `MOST_ITEMS` of them behind the cursor,
  and over all when no window is there.

What it does not do: free anything.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from typing import NamedTuple

from shmblocks._state.layout import (
    R_HOLD,
    R_KEYED,
    R_LEASES,
    R_NUM_BLOCKS,
    R_READERS_LEFT,
    R_READY,
    R_USED,
    RECORD_WORDS,
    UNBOUNDED,
    WORD,
    Layout,
)
from shmblocks._state.states import NUMBER, State

# Allocations looked at for one window. Smaller: it is chosen among fewer, and hits are lost.
# Larger: the lock is held longer (about 1 us each).
MOST_ITEMS = 512

_PUBLISHED = NUMBER[State.PUBLISHED]


class Item(NamedTuple):
    """Consecutive blocks that are free (`used` is -1) or of one evictable entry."""

    start: int
    num_blocks: int
    used_ns: int


class Window(NamedTuple):
    """A run of blocks that will be free once the victims are; starts at `start`."""

    start: int
    victims: list[int]


def best_window(
    words: memoryview, layout: Layout, starts: list[int], cursor: int, num_blocks: int, now_ns: int
) -> Window | None:
    """The best window of `num_blocks` blocks, or None; `starts` are the live allocations."""
    starts = sorted(starts)
    total = layout.total_blocks
    if len(starts) > MOST_ITEMS:
        first = min(bisect_left(starts, cursor), len(starts) - MOST_ITEMS)
        some = starts[first : first + MOST_ITEMS]
        begin = some[0]
        end = starts[first + MOST_ITEMS] if first + MOST_ITEMS < len(starts) else total
        window = _best(_runs(words, layout, some, begin, end, now_ns), num_blocks)
        if window is not None:
            return window
    return _best(_runs(words, layout, starts, 0, total, now_ns), num_blocks)


def _best(runs: list[list[Item]], num_blocks: int) -> Window | None:
    best: Window | None = None
    oldest = -1
    for run in runs:
        youngest = _slide(run, num_blocks)
        if youngest is not None and (best is None or youngest[0] < oldest):
            oldest, items = youngest[0], run[youngest[1] : youngest[2] + 1]
            victims = [item.start for item in items if item.used_ns >= 0]
            best = Window(items[0].start, victims)
    return best


def _slide(run: list[Item], num_blocks: int) -> tuple[int, int, int] | None:
    """Of all shortest windows of a run: (age of its youngest victim, first item, last item)."""
    best: tuple[int, int, int] | None = None
    first = blocks = 0
    # Indices of a window's items by falling age: the first is its youngest victim.
    youngest: deque[int] = deque()
    for last, item in enumerate(run):
        blocks += item.num_blocks
        while youngest and run[youngest[-1]].used_ns <= item.used_ns:
            youngest.pop()
        youngest.append(last)
        while blocks - run[first].num_blocks >= num_blocks:
            blocks -= run[first].num_blocks
            if youngest[0] == first:
                youngest.popleft()
            first += 1
        used_ns = run[youngest[0]].used_ns
        if blocks >= num_blocks and (best is None or used_ns < best[0]):
            best = (used_ns, first, last)
    return best


def _runs(
    words: memoryview, layout: Layout, starts: list[int], begin: int, end: int, now_ns: int
) -> list[list[Item]]:
    """The runs of items between allocations that cannot be evicted, from `begin` to `end`."""
    runs: list[list[Item]] = [[]]
    position = begin
    records = layout.records // WORD
    for start in starts:
        word = records + start * RECORD_WORDS
        num_blocks = words[word + R_NUM_BLOCKS]
        if start > position:
            runs[-1].append(Item(position, start - position, -1))
        if (
            words[word] == _PUBLISHED
            and words[word + R_KEYED]
            and words[word + R_READERS_LEFT] >= UNBOUNDED
            and not words[word + R_LEASES]
            and words[word + R_READY] == words[word + 1]
            and words[word + R_HOLD] <= now_ns
        ):
            runs[-1].append(Item(start, num_blocks, words[word + R_USED]))
        elif runs[-1]:
            runs.append([])
        position = start + num_blocks
    if end > position:
        runs[-1].append(Item(position, end - position, -1))
    return runs
