"""The wait queue: who waits for blocks, first come, first served.

Contract
- Every method runs under the pool's lock; joining and leaving are one commit of the journal each.
- Only the head of the queue is served, and while anyone is in it, nobody else is: a request for
  many blocks is not starved by small ones.
- The dead are passed over. So is one that has not polled for `PATIENCE_NS` (a stopped process); it
  keeps its slot and is served when it goes on.
- Whoever frees blocks wakes the head (`wake_head`). Waiters also poll every `futex.LONGEST_SLEEP`,
  because a process may die between freeing blocks and waking them.
- A waiter is known by who waits and since when: no two waits of one process begin at the same
  moment (`PoolState.stamp`).

What it does not do: sleep, allocate, or know who lives (it is told).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import compress
from typing import NamedTuple

from shmblocks._state.info import ParticipantId
from shmblocks._state.journal import Journal
from shmblocks._state.layout import (
    H_NEXT_PLACE,
    H_WAITERS,
    W_POLLED,
    WAITER,
    WAITER_REQUEST_ID_BYTES,
    WAITER_WORDS,
    WORD,
    WORD_STRUCT,
    Layout,
    WaiterRecord,
)
from shmblocks.errors import TooManyWaitersError

# Nanoseconds; several times `futex.LONGEST_SLEEP`, after which everyone polls. Shorter: a head that
# is only slow to wake is passed over. Longer: a stopped head holds up the queue.
PATIENCE_NS = 1_000_000_000

IsAlive = Callable[[ParticipantId], bool]


class Place(NamedTuple):
    """An entry of the queue."""

    slot: int
    number: int


class WaitQueue:
    """The wait queue of one segment; borrows its memory."""

    def __init__(
        self, memory: memoryview, words: memoryview, layout: Layout, journal: Journal
    ) -> None:
        self._memory = memory
        self._words = words
        self._layout = layout
        self._journal = journal

    @property
    def length(self) -> int:
        """How many are in the queue, the dead included."""
        count: int = self._words[H_WAITERS]
        return count

    @property
    def is_full(self) -> bool:
        """Whether nobody can join: reap, the entries may be of the dead."""
        return self.length >= self._layout.max_waiters

    def waiters(self) -> Iterator[tuple[Place, WaiterRecord]]:
        """Everyone in the queue, first come first."""
        slots = self._layout.max_waiters
        first = self._layout.waiters // WORD
        numbers = self._words[first : first + slots * WAITER_WORDS : WAITER_WORDS].tolist()
        taken = zip(numbers, range(slots), strict=True)
        for number, slot in sorted(compress(taken, numbers)):
            yield Place(slot, number), self._record(slot)

    def _record(self, slot: int) -> WaiterRecord:
        return WaiterRecord._make(WAITER.unpack_from(self._memory, self._offset(slot)))

    def _offset(self, slot: int) -> int:
        return self._layout.waiters + slot * WAITER.size

    def join(self, who: int, num_blocks: int, req_id: bytes, since_ns: int) -> Place:
        """Become the last in the queue."""
        words = self._words
        number: int = words[H_NEXT_PLACE]
        for slot in range(self._layout.max_waiters):
            if words[self._layout.waiter_word(slot)] == 0:
                record = WAITER.pack(
                    number, who, num_blocks, 0, since_ns, since_ns, req_id[:WAITER_REQUEST_ID_BYTES]
                )
                self._journal.commit(
                    (
                        (self._offset(slot), record),
                        (H_NEXT_PLACE * WORD, WORD_STRUCT.pack(number + 1)),
                        self._counted(+1),
                    )
                )
                return Place(slot, number)
        raise TooManyWaitersError(
            f"{self._layout.max_waiters} threads and coroutines wait for blocks already; create "
            "the pool with a larger PoolConfig(max_waiters=...), or send fewer requests at once"
        )

    def is_of(self, place: Place, who: int) -> bool:
        """Whether the entry is there still, and that participant's."""
        word = self._layout.waiter_word(place.slot)
        return bool(self._words[word] == place.number and self._words[word + 1] == who)

    def find(self, who: int, since_ns: int) -> Place | None:
        """The entry of one wait."""
        if not self.length:
            return None
        for place, waiter in self.waiters():
            if waiter.who == who and waiter.since_ns == since_ns:
                return place
        return None

    def leave(self, place: Place) -> None:
        """Leave the queue; nothing happens when it was left already."""
        if self._words[self._layout.waiter_word(place.slot)] == place.number:
            self._journal.commit(((self._offset(place.slot), bytes(WORD)), self._counted(-1)))

    def _counted(self, change: int) -> tuple[int, bytes]:
        return (H_WAITERS * WORD, WORD_STRUCT.pack(max(0, self.length + change)))

    def head(self, is_alive: IsAlive, now_ns: int) -> tuple[Place, WaiterRecord] | None:
        """Who is served next; None when nobody is there who could be."""
        for place, waiter in self.waiters():
            # (Ignore timestamps in the future.)
            polls = 0 <= now_ns - waiter.polled_ns <= PATIENCE_NS
            if polls and is_alive(ParticipantId.of(waiter.who)):
                return place, waiter
        return None

    def is_head(self, place: Place, is_alive: IsAlive, now_ns: int) -> bool:
        """Whether this one is served next; notes that it has polled."""
        self._words[self._layout.waiter_word(place.slot) + W_POLLED] = now_ns
        head = self.head(is_alive, now_ns)
        return head is not None and head[0] == place

    def head_to_wake(self, is_alive: IsAlive, now_ns: int) -> int | None:
        """Blocks came free: change the head's wake word; the slot whose word to wake."""
        head = self.head(is_alive, now_ns)
        if head is None:
            return None
        slot = ParticipantId.of(head[1].who).slot
        word = self._layout.wake_word(slot)
        self._words[word] = (self._words[word] + 1) & 0xFFFFFFFF
        return slot
