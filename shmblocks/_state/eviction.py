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
  and over ever more while no window is there.
- The cursor is where an allocation begins or free blocks do: no allocation that lives is older than
  the one that ended there, and reaches over it.

What it does not do: free anything.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from shmblocks._state.layout import (
    H_CURSOR,
    H_LIVE,
    R_GENERATION,
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
from shmblocks.errors import DamagedPoolError

# Allocations looked at for one window. Smaller: it is chosen among fewer, and hits are lost.
# Larger: the lock is held longer (about 1 us each).
MOST_ITEMS = 384

# Bits of the bitmap that are read at once to pass free blocks. Smaller: more reads for a long run.
# Larger: each one handles longer integers.
BITS = 1024

_PUBLISHED = NUMBER[State.PUBLISHED]
# What `Item(...)` does, without its Python frame.
_new_tuple = tuple.__new__


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
    memory: memoryview,
    words: memoryview,
    layout: Layout,
    num_blocks: int,
    now_ns: int,
    most: int,
) -> Window | None:
    """The best window of `num_blocks` blocks, or None. `_core/eviction.c` finds the same one.

    `most`: allocations that the first pass looks at.
    """
    walk = _Walk(memory, words, layout, now_ns)
    while most < words[H_LIVE]:
        # A run does not go on behind the end of the pool.
        cursor = words[H_CURSOR]
        runs = walk.runs(cursor, most)
        runs += walk.runs(0, most - walk.seen, end=cursor)
        window = _best(runs, num_blocks)
        if window is not None:
            return window
        most *= 8
    return _best(walk.runs(0, layout.total_blocks), num_blocks)


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
    # The items of a window that no later one of it is younger than, as (last use, index): the first
    # is its youngest victim.
    youngest: deque[tuple[int, int]] = deque()
    for last, (_, size, used_ns) in enumerate(run):
        blocks += size
        while youngest and youngest[-1][0] <= used_ns:
            youngest.pop()
        youngest.append((used_ns, last))
        if blocks < num_blocks:
            continue
        while (rest := blocks - run[first][1]) >= num_blocks:
            blocks = rest
            if youngest[0][1] == first:
                youngest.popleft()
            first += 1
        if best is None or youngest[0][0] < best[0]:
            best = (youngest[0][0], first, last)
    return best


class _Walk:
    """Goes through allocations and free blocks by position; borrows the segment's memory."""

    def __init__(self, memory: memoryview, words: memoryview, layout: Layout, now_ns: int) -> None:
        self._memory = memory
        self._words = words
        self._layout = layout
        self._now_ns = now_ns
        # Allocations that the last walk has passed.
        self.seen = 0

    def runs(self, begin: int, most: int, end: int | None = None) -> list[list[Item]]:
        """The runs of items between allocations that cannot be evicted, from block `begin` to
        `end` (None: the pool's), over at most so many allocations."""
        words, now_ns = self._words, self._now_ns
        records = self._layout.records // WORD
        total = self._layout.total_blocks
        if end is None:
            end = total
        run: list[Item] = []
        runs = [run]
        position, seen = begin, 0
        while position < end and seen < most:
            word = records + position * RECORD_WORDS
            state = words[word]
            if not state:
                following = min(self._next_used(position), end)
                if following == position:
                    raise self._damaged(position)
                run.append(Item(position, following - position, -1))
                position = following
                continue
            seen += 1
            num_blocks = words[word + R_NUM_BLOCKS]
            if not 0 < num_blocks <= total - position:
                raise self._damaged(position)
            if (
                state == _PUBLISHED
                and words[word + R_KEYED]
                and words[word + R_READERS_LEFT] >= UNBOUNDED
                and not words[word + R_LEASES]
                and words[word + R_READY] == words[word + R_GENERATION]
                and words[word + R_HOLD] <= now_ns
            ):
                run.append(_new_tuple(Item, (position, num_blocks, words[word + R_USED])))
            elif run:
                run = []
                runs.append(run)
            position += num_blocks
        self.seen = seen
        return runs

    def _next_used(self, block: int) -> int:
        """The first used block at or behind a free one; the pool's end: there is none."""
        total = self._layout.total_blocks
        while block < total:
            end = min((block // BITS + 1) * BITS, total)
            offset = self._layout.bitmap + block // BITS * (BITS // 8)
            bits = int.from_bytes(self._memory[offset : offset + BITS // 8], "little")
            bits = bits >> block % BITS & ((1 << end - block) - 1)
            if bits:
                return block + (bits & -bits).bit_length() - 1
            block = end
        return total

    @staticmethod
    def _damaged(block: int) -> DamagedPoolError:
        return DamagedPoolError(
            f"the record of block {block} and the bitmap disagree: something else wrote into the "
            "segment; remove the pool (`shmblocks rm --force`) and create it anew"
        )
