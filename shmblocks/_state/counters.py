"""Counters in the segment: what all processes of a pool have done since it was made.

Contract
- Changed under the pool's lock, by single stores outside of the journal: a process that is killed
  between a change and its count is short of one. They survive every death and never go down.
- A histogram counts durations in buckets that double: bucket i counts those under 2**i us.

What it does not do: take the lock, or know what is counted.
"""

from __future__ import annotations

import enum

from shmblocks._state.layout import COUNTER_BYTES, WORD, Layout


class Counter(enum.IntEnum):
    """Index of a counter's word. A new one is added behind the last."""

    ALLOCATIONS = 0
    PUBLISHES = 1
    OPENS = 2
    RELEASES = 3
    REAPED_BLOCKS = 4
    ALLOC_TIMEOUTS = 5
    LOOKUPS = 6
    HITS = 7
    MISSES = 8
    MISMATCHES = 9
    PUTS = 10
    DUPLICATES = 11
    EVICTIONS = 12
    EVICTED_BLOCKS = 13
    SKIPPED = 14
    TAKEOVERS = 15
    CLAIM_WAITS = 16
    LOCK_RECOVERIES = 17


class Histogram(enum.IntEnum):
    """Index of a histogram's first word: its sum in ns, then its buckets."""

    ALLOC_WAIT = 64
    PUBLISH_TO_OPEN = 96
    LOCK_HELD = 128


# Bucket i counts durations under 2**i us: the last one 2**26 us, about a minute, and more.
BUCKETS = 27


class Counters:
    """The counters of one segment; borrows its memory."""

    def __init__(self, words: memoryview, layout: Layout) -> None:
        first = layout.counters // WORD
        self._words = words
        self._first = first

    def add(self, counter: Counter, count: int = 1) -> None:
        """Count so many more."""
        self._words[self._first + counter] += count

    def observe(self, histogram: Histogram, duration_ns: int) -> None:
        """Count a duration."""
        words, first = self._words, self._first + histogram
        words[first] += max(0, duration_ns)
        words[first + 1 + min((max(0, duration_ns) // 1000).bit_length(), BUCKETS - 1)] += 1

    def values(self) -> tuple[int, ...]:
        """All words: counters and histograms, by index."""
        end = self._first + COUNTER_BYTES // WORD
        return tuple(self._words[self._first : end].tolist())
