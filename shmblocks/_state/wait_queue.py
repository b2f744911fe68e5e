"""The waiting line: who waits for blocks, first come, first served.

Contract
- Every method runs under the pool's lock; joining and leaving are one commit of the journal each.
- Only the first in the line is served, and while anyone is in it, nobody else is: a request for
  many blocks is not starved by small ones.
- The dead are passed over. So is one that has not looked for `PATIENCE` (a stopped process); it
  keeps its place and is served when it goes on.
- Whoever frees blocks rings the first one's doorbell (`turn`); everyone in the line also looks by
  themselves every `futex.LONGEST_SLEEP`, since the dead ring no bells.

What it does not do: sleep, allocate, or know who lives (it is told).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import compress
from typing import NamedTuple

from shmblocks._state.journal import Journal
from shmblocks._state.layout import (
    H_NEXT_TICKET,
    H_WAITERS,
    MAX_WAITERS,
    W_LOOKED,
    WAITER,
    WAITER_WORDS,
    WORD,
    WORD_STRUCT,
    Layout,
    WaiterRecord,
)
from shmblocks._state.participants import ParticipantId
from shmblocks.errors import ShmBlocksError

# Nanoseconds; several times `futex.LONGEST_SLEEP`, after which everyone looks. Shorter: a first one
# that is only slow to wake loses its turn. Longer: a stopped first one holds up the line.
PATIENCE_NS = 1_000_000_000
REQUEST_ID_BYTES = 15

IsAlive = Callable[[ParticipantId], bool]


class Ticket(NamedTuple):
    """A place in the line."""

    slot: int
    number: int


class WaitingLine:
    """The line of one segment; borrows its memory."""

    def __init__(
        self, memory: memoryview, words: memoryview, layout: Layout, journal: Journal
    ) -> None:
        self._memory = memory
        self._words = words
        self._layout = layout
        self._journal = journal

    @property
    def length(self) -> int:
        """How many are in the line, the dead included."""
        count: int = self._words[H_WAITERS]
        return count

    @property
    def is_full(self) -> bool:
        """Whether nobody can join: reap, it may be the dead who stand there."""
        return self.length >= MAX_WAITERS

    def waiters(self) -> Iterator[tuple[Ticket, WaiterRecord]]:
        """Everyone in the line, first come first."""
        first = self._layout.waiters // WORD
        numbers = self._words[first : first + MAX_WAITERS * WAITER_WORDS : WAITER_WORDS].tolist()
        places = zip(numbers, range(MAX_WAITERS), strict=True)
        for number, slot in sorted(compress(places, numbers)):
            yield Ticket(slot, number), self._record(slot)

    def _record(self, slot: int) -> WaiterRecord:
        return WaiterRecord._make(WAITER.unpack_from(self._memory, self._offset(slot)))

    def _offset(self, slot: int) -> int:
        return self._layout.waiters + slot * WAITER.size

    def join(
        self, who: int, num_blocks: int, req_id: bytes, now_ns: int, joined: list[Ticket]
    ) -> None:
        """Become the last in the line; `joined` gets the ticket before the commit."""
        words = self._words
        number: int = words[H_NEXT_TICKET]
        for slot in range(MAX_WAITERS):
            if words[self._layout.waiter_word(slot)] == 0:
                joined.append(Ticket(slot, number))
                record = WAITER.pack(number, who, num_blocks, 0, now_ns, now_ns, req_id)
                self._journal.commit(
                    (
                        (self._offset(slot), record),
                        (H_NEXT_TICKET * WORD, WORD_STRUCT.pack(number + 1)),
                        self._counted(+1),
                    )
                )
                return
        raise ShmBlocksError(
            f"{MAX_WAITERS} threads wait for blocks already: a larger pool, or fewer requests at "
            "once, would serve them"
        )

    def leave(self, ticket: Ticket) -> None:
        """Leave the line; nothing happens when it was left already."""
        if self._words[self._layout.waiter_word(ticket.slot)] == ticket.number:
            self._journal.commit(((self._offset(ticket.slot), bytes(WORD)), self._counted(-1)))

    def _counted(self, change: int) -> tuple[int, bytes]:
        return (H_WAITERS * WORD, WORD_STRUCT.pack(max(0, self.length + change)))

    def first(self, is_alive: IsAlive, now_ns: int) -> tuple[Ticket, WaiterRecord] | None:
        """Whose turn it is; None when nobody is there who could take it."""
        for ticket, waiter in self.waiters():
            # (A look in the future is none that anyone took who could take a turn now.)
            looks = 0 <= now_ns - waiter.looked_ns <= PATIENCE_NS
            if looks and is_alive(ParticipantId.of(waiter.who)):
                return ticket, waiter
        return None

    def is_turn_of(self, ticket: Ticket, is_alive: IsAlive, now_ns: int) -> bool:
        """Whether it is this one's turn; notes that it has looked."""
        self._words[self._layout.waiter_word(ticket.slot) + W_LOOKED] = now_ns
        first = self.first(is_alive, now_ns)
        return first is not None and first[0] == ticket

    def turn(self, is_alive: IsAlive, now_ns: int) -> int | None:
        """Blocks came free: ring for the first in the line; the place whose doorbell to wake."""
        first = self.first(is_alive, now_ns)
        if first is None:
            return None
        place = ParticipantId.of(first[1].who).place
        bell = self._layout.doorbell_word(place)
        self._words[bell] = (self._words[bell] + 1) & 0xFFFFFFFF
        return place
