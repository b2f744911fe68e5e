"""A redo journal: several stores that happen together or not at all.

A change of shared state is a list of stores. It is committed in four steps:

  1. the stores are written into the journal;
  2. the journal's first word is set to their length: **this one 8-byte store commits**;
  3. the stores are made in their places;
  4. the journal's first word is set to 0.

Whoever is killed or interrupted before 2 has changed nothing. After 2, whoever gets the pool's lock
next finds the word set and makes the stores again (`replay`), which is the same as having made them
once, so that a replay may itself be killed anywhere and be taken up by the next.

Assumes: the pool's lock is held; an aligned 8-byte store is one instruction (x86-64, aarch64), so
that SIGKILL cannot split it. The order of steps 1 and 2 as another processor sees it does not
matter: nobody reads the journal without the lock, and the kernel's release of a dead process's file
lock is ordered after everything that the process stored.

What it does not do: undo, or protect against a power cut.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from shmblocks.errors import DamagedPoolError

Store = tuple[int, bytes]
"""(offset in the segment, bytes); both multiples of 8."""

_ENTRY = struct.Struct("=QQ")
_HEAD_BYTES = 8


class Journal:
    """The journal of one segment; borrows its memory."""

    def __init__(
        self, memory: memoryview, words: memoryview, offset: int, size: int, state_bytes: int
    ) -> None:
        self._memory = memory
        self._words = words
        # The index of the word that is not 0 while a committed change may be incomplete.
        self.head = offset // 8
        self._entries = offset + _HEAD_BYTES
        self._capacity = size - _HEAD_BYTES
        self._state_bytes = state_bytes

    def commit(self, stores: Sequence[Store]) -> None:
        """Make all stores, or (killed before step 2) none."""
        memory, words, head = self._memory, self._words, self.head
        pack = _ENTRY.pack
        log = b"".join([part for at, data in stores for part in (pack(at, len(data)), data)])
        size = len(log)
        if size > self._capacity:
            raise DamagedPoolError(
                f"a change of {size} bytes does not fit the journal of {self._capacity} bytes"
            )
        start = self._entries
        memory[start : start + size] = log
        words[head] = size
        for offset, data in stores:
            memory[offset : offset + len(data)] = data
        words[head] = 0

    def replay(self) -> None:
        """Finish the change that a holder of the lock committed and did not complete."""
        length: int = self._words[self.head]
        if length > self._capacity:
            raise self._damaged(f"it claims {length} bytes of {self._capacity}")
        log = bytes(self._memory[self._entries : self._entries + length])
        for offset, data in self._decode(log):
            self._memory[offset : offset + len(data)] = data
        self._words[self.head] = 0

    def _decode(self, log: bytes) -> list[Store]:
        stores = []
        position = 0
        while position < len(log):
            if position + _ENTRY.size > len(log):
                raise self._damaged("an entry is cut off")
            offset, length = _ENTRY.unpack_from(log, position)
            position += _ENTRY.size
            if offset + length > self._state_bytes or position + length > len(log):
                raise self._damaged(f"an entry of {length} bytes at {offset} leaves the state")
            stores.append((offset, log[position : position + length]))
            position += length
        return stores

    def _damaged(self, why: str) -> DamagedPoolError:
        return DamagedPoolError(
            f"the journal is damaged ({why}): something else wrote into the segment; "
            "remove the segment (`shmblocks rm --force`) and create it anew"
        )
