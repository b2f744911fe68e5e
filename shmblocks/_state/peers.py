"""Who is connected to the node servers of a pool, and what crossed between nodes.

    rows in the header      one for each connection of a server: its address, since when, how much
    counters                of all servers and readers since the pool was made

Contract
- A row is its server's, a participant: taken under the lock, with its owner as the last store, so
  that a process that dies before has taken none. Only its owner changes it.
- A row whose owner has died shows nothing, and is the next one's.
- There are `PEER_ROWS` rows. A connection beyond them is served and counted, and not shown.

What it does not do: know sockets, or who may connect.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from shmblocks._state.counters import Counter
from shmblocks._state.info import ParticipantId
from shmblocks._state.layout import PEER, PEER_ROWS, WORD
from shmblocks._state.mutex import transaction
from shmblocks._state.participants import utf8_prefix
from shmblocks._state.peer_rows import peer_word
from shmblocks._state.pool_state import PoolState

ADDRESS_BYTES = 31
NO_ROW = -1
_P_FETCHED = 2
_P_SENT = 3


class PeerState:
    """The transactions on the peers of one pool; borrows the pool state."""

    def __init__(self, state: PoolState) -> None:
        self._state = state
        # What `transaction` needs.
        self.mutex = state.mutex
        self.entered: Callable[[], None] = state.entered
        self.describe_holder: Callable[[], str] = state.describe_holder
        self._memory = state.segment.memory
        self._words = state.segment.words
        self._count = state.counters.add

    @transaction
    def connect(self, address: str) -> int:
        """Take a row for a reader that has proved itself; `NO_ROW` when all are taken."""
        row = self._free_row()
        if row != NO_ROW:
            start = peer_word(row) * WORD
            text = utf8_prefix(address, ADDRESS_BYTES)
            data = PEER.pack(0, time.monotonic_ns(), 0, 0, text)
            self._memory[start : start + PEER.size] = data
            # Last: from here on it is one.
            self._words[peer_word(row)] = self._state.participants.me_word
        return row

    def _free_row(self) -> int:
        is_alive = self._state.participants.is_alive
        for row in range(PEER_ROWS):
            owner = self._words[peer_word(row)]
            if not owner or not is_alive(ParticipantId.of(owner)):
                return row
        return NO_ROW

    @transaction
    def disconnect(self, row: int) -> None:
        """Give a row back, if this process has it."""
        if row != NO_ROW and self._words[peer_word(row)] == self._state.participants.me_word:
            self._words[peer_word(row)] = 0

    @transaction
    def served(self, row: int, num_bytes: int) -> None:
        """A fetch was confirmed by its reader."""
        self._count(Counter.NODE_READS)
        self._count(Counter.NODE_SENT_BYTES, num_bytes)
        if row != NO_ROW:
            self._words[peer_word(row) + _P_FETCHED] += 1
            self._words[peer_word(row) + _P_SENT] += num_bytes

    @transaction
    def fetched(self, num_bytes: int) -> None:
        """This node has fetched so much."""
        self._count(Counter.NODE_FETCHES)
        self._count(Counter.NODE_RECEIVED_BYTES, num_bytes)

    @transaction
    def count(self, counter: int, count: int = 1) -> None:
        """Count something else."""
        self._count(counter, count)
