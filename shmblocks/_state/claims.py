"""Claims: which keys somebody is encoding at this moment (single flight).

Contract
- A claim has a living owner. It ends when its key is published, when its owner gives it up or
  leaves, and at the next reap after its owner's death.
- When every slot is taken, a key cannot be claimed: then several may encode it, and nothing else
  is lost.
- Whoever waits for the end of a claim sleeps on the wake word of its slot, which changes in the
  commit that ends it.

What it does not do: decide who is alive, or wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from shmblocks._state.journal import Store
from shmblocks._state.layout import CLAIM, CLAIM_WORDS, WORD, WORD_STRUCT, Layout

_C_OWNER = 0
_C_SINCE = 1
_C_KEY = 2
_C_WAKE = 6
_C_ASLEEP = 7


class ClaimRecord(NamedTuple):
    """One claim as it stands in the segment."""

    owner: int
    since_ns: int
    key: bytes


class Claims:
    """The claims of one segment; borrows its memory."""

    def __init__(
        self, memory: memoryview, words: memoryview, layout: Layout, max_claims: int
    ) -> None:
        self._memory = memory
        self._words = words
        self._start = layout.claims
        self._slots = max_claims

    def _word(self, slot: int) -> int:
        return self._start // WORD + slot * CLAIM_WORDS

    def _owners(self) -> list[int]:
        first = self._word(0)
        owners: list[int] = self._words[
            first : first + self._slots * CLAIM_WORDS : CLAIM_WORDS
        ].tolist()
        return owners

    def all(self) -> Iterator[tuple[int, ClaimRecord]]:
        """Every claim, by slot."""
        for slot, owner in enumerate(self._owners()):
            if owner:
                yield slot, self.record(slot)

    def record(self, slot: int) -> ClaimRecord:
        """What stands in a slot."""
        words = CLAIM.unpack_from(self._memory, self._start + slot * CLAIM.size)
        return ClaimRecord(*words[:3])

    def find(self, key: bytes) -> int:
        """The slot of the claim on a (stored) key, or -1."""
        for slot, claim in self.all():
            if claim.key == key:
                return slot
        return -1

    def free_slot(self) -> int:
        """A slot that nobody has, or -1."""
        try:
            return self._owners().index(0)
        except ValueError:
            return -1

    def stores_to_take(self, slot: int, owner: int, key: bytes, since_ns: int) -> list[Store]:
        """The stores that give a slot to an owner; its wake word and its sleepers stay."""
        offset = self._start + slot * CLAIM.size
        data = CLAIM.pack(owner, since_ns, key, 0, 0)[: _C_WAKE * WORD]
        return [(offset, data)]

    def stores_to_end(self, slot: int) -> list[Store]:
        """The stores that end a claim."""
        word = self._word(slot)
        wake = (self._words[word + _C_WAKE] + 1) & 0xFFFFFFFF
        return [
            ((word + _C_OWNER) * WORD, WORD_STRUCT.pack(0)),
            ((word + _C_WAKE) * WORD, WORD_STRUCT.pack(wake)),
        ]

    def wake_offset(self, slot: int) -> int:
        """Where the slot's wake word lies, in bytes."""
        return (self._word(slot) + _C_WAKE) * WORD

    def wake_value(self, slot: int) -> int:
        """The wake word now."""
        value: int = self._words[self._word(slot) + _C_WAKE]
        return value

    def note_asleep(self, slot: int) -> None:
        """Somebody is going to sleep on the wake word."""
        self._words[self._word(slot) + _C_ASLEEP] = 1

    def take_asleep(self, slot: int) -> bool:
        """Whether anybody may sleep on the wake word; forgets it."""
        word = self._word(slot) + _C_ASLEEP
        is_asleep = bool(self._words[word])
        if is_asleep:
            self._words[word] = 0
        return is_asleep
