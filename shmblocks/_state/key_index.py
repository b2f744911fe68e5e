"""Which allocation is published under a key: a hash index in the segment.

    buckets[hash(key)] ──▶ record ──chain──▶ record ──▶ 0        (block + 1; 0 ends a chain)

Contract
- A key is entered in the commit that publishes its allocation, and taken out in the commit that
  frees it. So a key is reachable exactly while its allocation is published under it.
- The stores are given to the caller, who makes them part of such a commit.
- As many buckets as blocks: a chain has one link or two, whatever the pool's size.
- Nothing read from the segment is believed: a chain that leads outside of the pool, or has no end,
  is `DamagedPoolError`.
- `find` may be called without the lock: then it is a hint of this moment, and may miss an entry
  while others change the chain.

What it does not do: decide what is entered, or when it goes.
"""

from __future__ import annotations

from collections.abc import Iterator

from shmblocks._state.journal import Store
from shmblocks._state.layout import (
    ENTRY,
    H_ENTRIES,
    H_INDEX_CHANGES,
    KEY_BYTES,
    R_CHAIN,
    R_KEY,
    R_KEYED,
    RECORD_WORDS,
    WORD,
    WORD_STRUCT,
    Layout,
)
from shmblocks.errors import DamagedPoolError

SHORT_KEY_BYTES = 16


def stored_key(key: bytes) -> bytes:
    """A key of 16 or 32 bytes as it stands in the segment."""
    if not isinstance(key, bytes):
        raise TypeError(f"key: expected bytes, got {type(key).__name__}; see `content_key`")
    if len(key) == SHORT_KEY_BYTES:
        return key + bytes(KEY_BYTES - SHORT_KEY_BYTES)
    if len(key) != KEY_BYTES:
        raise ValueError(f"key: expected 16 or 32 bytes, got {len(key)}; see `content_key`")
    return key


class KeyIndex:
    """The index of one segment; borrows its memory."""

    def __init__(self, memory: memoryview, words: memoryview, layout: Layout) -> None:
        self._memory = memory
        self._words = words
        self._total = layout.total_blocks
        self._buckets = layout.buckets // WORD
        self._records = layout.records // WORD

    @property
    def entries(self) -> int:
        """How many keys are entered."""
        count: int = self._words[H_ENTRIES]
        return count

    def find(self, key: bytes) -> int:
        """The start block of the allocation under a (stored) key, or -1."""
        for start in self._chain(self._bucket(key)):
            if self.key_of(start) == key:
                return start
        return -1

    def key_of(self, start: int) -> bytes:
        """The key that an entry has."""
        offset = (self._records + start * RECORD_WORDS + R_KEY) * WORD
        return bytes(self._memory[offset : offset + KEY_BYTES])

    def is_keyed(self, start: int) -> bool:
        """Whether the allocation that starts here is an entry."""
        return bool(self._words[self._records + start * RECORD_WORDS + R_KEYED])

    def _bucket(self, key: bytes) -> int:
        """The index of the word that a key's chain begins with."""
        return self._buckets + int.from_bytes(key[:WORD], "little") % self._total

    def _chain(self, bucket: int) -> Iterator[int]:
        words = self._words
        link = words[bucket]
        left = self._total
        while link:
            if link > self._total or not left:
                raise DamagedPoolError(
                    "the key index leads outside of the pool: something else wrote into the "
                    "segment; remove the pool (`shmblocks rm --force`) and create it anew"
                )
            left -= 1
            yield link - 1
            link = words[self._records + (link - 1) * RECORD_WORDS + R_CHAIN]

    def stores_to_enter(self, start: int, key: bytes, hold_ns: int, now_ns: int) -> list[Store]:
        """The stores that enter an allocation under a (stored) key that has none."""
        bucket = self._bucket(key)
        record = (self._records + start * RECORD_WORDS + R_KEYED) * WORD
        return [
            (record, ENTRY.pack(1, key, self._words[bucket], hold_ns, now_ns, 0)),
            (bucket * WORD, WORD_STRUCT.pack(start + 1)),
            (H_ENTRIES * WORD, WORD_STRUCT.pack(self.entries + 1)),
            self._changed(),
        ]

    def stores_to_take_out(self, start: int) -> list[Store]:
        """The stores that take an entry out."""
        words = self._words
        mine = self._records + start * RECORD_WORDS
        before = self._bucket(self.key_of(start))
        for other in self._chain(before):
            if other == start:
                break
            before = self._records + other * RECORD_WORDS + R_CHAIN
        return [
            (before * WORD, WORD_STRUCT.pack(words[mine + R_CHAIN])),
            ((mine + R_KEYED) * WORD, WORD_STRUCT.pack(0)),
            (H_ENTRIES * WORD, WORD_STRUCT.pack(max(0, self.entries - 1))),
            self._changed(),
        ]

    @property
    def changes(self) -> int:
        """How often a key was entered or taken out; for those who look without the lock."""
        count: int = self._words[H_INDEX_CHANGES]
        return count

    def _changed(self) -> Store:
        return (H_INDEX_CHANGES * WORD, WORD_STRUCT.pack(self.changes + 1))

    def reachable(self) -> dict[int, bytes]:
        """Every entry that the chain of its key leads to, with that key; for `check`."""
        found = {}
        heads = self._words[self._buckets : self._buckets + self._total].tolist()
        for bucket, head in enumerate(heads):
            if head:
                for start in self._chain(self._buckets + bucket):
                    key = self.key_of(start)
                    if self._bucket(key) == self._buckets + bucket:
                        found[start] = key
        return found
