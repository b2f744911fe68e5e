"""Counters in the segment: what all processes of a pool have done since it was made.

Contract
- Changed under the pool's lock, by single stores outside of the journal: a process that is killed
  between a change and its count is short of one. They survive every death and never go down.
- A histogram counts durations in buckets that double: bucket i counts those under 2**i us.

What it does not do: take the lock, or know what is counted.
"""

from __future__ import annotations

import struct
from typing import Final

from shmblocks._state.info import CounterValues, HistogramValues
from shmblocks._state.layout import COUNTER_BYTES, WORD, Layout


class Counter:
    """Index of a counter's word. A new one is added behind the last."""

    ALLOCATIONS: Final = 0
    PUBLISHES: Final = 1
    OPENS: Final = 2
    RELEASES: Final = 3
    REAPED_BLOCKS: Final = 4
    ALLOC_TIMEOUTS: Final = 5
    LOOKUPS: Final = 6
    HITS: Final = 7
    MISSES: Final = 8
    MISMATCHES: Final = 9
    PUTS: Final = 10
    DUPLICATES: Final = 11
    EVICTIONS: Final = 12
    EVICTED_BLOCKS: Final = 13
    SKIPPED: Final = 14
    TAKEOVERS: Final = 15
    CLAIM_WAITS: Final = 16
    LOCK_RECOVERIES: Final = 17
    # Between nodes.
    NODE_READS: Final = 32
    NODE_SENT_BYTES: Final = 33
    NODE_GIVEN_BACK: Final = 34
    NODE_REFUSALS: Final = 35
    NODE_TURNED_AWAY: Final = 36
    NODE_FETCHES: Final = 37
    NODE_RECEIVED_BYTES: Final = 38
    NODE_FAILURES: Final = 39
    NODE_QUARANTINED: Final = 40


class Histogram:
    """Index of a histogram's first word: its sum in ns, then its buckets."""

    ALLOC_WAIT: Final = 64
    PUBLISH_TO_OPEN: Final = 96
    LOCK_HELD: Final = 128


# Bucket i counts durations under 2**i us: the last one 2**26 us, about a minute, and more.
BUCKETS = 27


class Counters:
    """The counters of one segment; borrows its memory."""

    def __init__(self, words: memoryview, layout: Layout) -> None:
        first = layout.counters // WORD
        self._words = words
        self._first = first

    def word(self, counter: int) -> int:
        """Index of a counter's word in the segment, for those who count at each operation."""
        return self._first + counter

    def add(self, counter: int, count: int = 1) -> None:
        """Count so many more."""
        self._words[self._first + counter] += count

    def observe(self, histogram: int, duration_ns: int) -> None:
        """Count a duration."""
        if duration_ns < 0:
            return  # a clock that went back (a restored machine)
        words, first = self._words, self._first + histogram
        words[first] += duration_ns
        words[first + 1 + min((duration_ns // 1000).bit_length(), BUCKETS - 1)] += 1

    def values(self) -> tuple[int, ...]:
        """All words: counters and histograms, by index."""
        end = self._first + COUNTER_BYTES // WORD
        return tuple(self._words[self._first : end].tolist())


_WORDS = struct.Struct(f"={COUNTER_BYTES // WORD}Q")


def counter_values(region: bytes) -> CounterValues:
    """What a copy of the counters' bytes says."""
    words = _WORDS.unpack(region)
    return CounterValues(
        allocations=words[Counter.ALLOCATIONS],
        publishes=words[Counter.PUBLISHES],
        opens=words[Counter.OPENS],
        releases=words[Counter.RELEASES],
        reaped_blocks=words[Counter.REAPED_BLOCKS],
        alloc_timeouts=words[Counter.ALLOC_TIMEOUTS],
        lock_takeovers=words[Counter.LOCK_RECOVERIES],
        lookups=words[Counter.LOOKUPS],
        hits=words[Counter.HITS],
        misses=words[Counter.MISSES],
        mismatches=words[Counter.MISMATCHES],
        puts=words[Counter.PUTS],
        duplicates=words[Counter.DUPLICATES],
        evictions=words[Counter.EVICTIONS],
        evicted_blocks=words[Counter.EVICTED_BLOCKS],
        skipped=words[Counter.SKIPPED],
        takeovers=words[Counter.TAKEOVERS],
        waits=words[Counter.CLAIM_WAITS],
        node_reads=words[Counter.NODE_READS],
        node_sent_bytes=words[Counter.NODE_SENT_BYTES],
        node_given_back=words[Counter.NODE_GIVEN_BACK],
        node_refusals=words[Counter.NODE_REFUSALS],
        node_turned_away=words[Counter.NODE_TURNED_AWAY],
        node_fetches=words[Counter.NODE_FETCHES],
        node_received_bytes=words[Counter.NODE_RECEIVED_BYTES],
        node_failures=words[Counter.NODE_FAILURES],
        node_quarantined=words[Counter.NODE_QUARANTINED],
        alloc_wait=_histogram(words, Histogram.ALLOC_WAIT),
        publish_to_open=_histogram(words, Histogram.PUBLISH_TO_OPEN),
        lock_held=_histogram(words, Histogram.LOCK_HELD),
    )


def _histogram(words: tuple[int, ...], first: int) -> HistogramValues:
    buckets = list(words[first + 1 : first + 1 + BUCKETS])
    return HistogramValues(count=sum(buckets), sum_seconds=words[first] / 1e9, buckets=buckets)
