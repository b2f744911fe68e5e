"""Reserving blocks: at once, or in the waiting line until there is room.

    try_reserve   under the lock: nobody waits (or only the dead): allocate, after a reap if that
                  helps
    wait          join the line; then, woken by the doorbell or by the clock: my turn? allocate
    wait_async    the same from asyncio, one thread for all coroutines of the process

Contract
- First come, first served over all processes and threads; see `line.py`.
- Leaving the line, for whatever reason (served, deadline, cancelled, interrupted), rings for the
  next.
- A wait that ends without blocks raises `PoolTimeoutError`, which says who holds how many blocks
  for which request since when. One that lasts logs the same, once, as a warning.
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import NamedTuple

import msgspec

from shmblocks._os.futex import LONGEST_SLEEP, Futex
from shmblocks._os.futex_asyncio import LoopWaiters
from shmblocks._os.wait import Run, seconds_left
from shmblocks._state import check as inspection
from shmblocks._state.blocks import ReservationKey
from shmblocks._state.layout import H_WAITERS
from shmblocks._state.pool_state import Ledger
from shmblocks._state.reclaim import is_due
from shmblocks._state.wait_queue import REQUEST_ID_BYTES, Ticket
from shmblocks.errors import PoolClosedError, PoolTimeoutError
from shmblocks.handle import BlockHandle

# Seconds after which a wait says, once, whom it waits for.
SAYS_SO_AFTER = 10.0
# Seconds between two looks of a waiter while a stream is to give blocks back. Shorter: more looks.
# Longer: it waits longer than the stream.
STREAM_POLL = 1e-3

_log = logging.getLogger("shmblocks")


class Want(msgspec.Struct, frozen=True):
    """What is to be reserved; `made` gets its key before anything is committed."""

    num_blocks: int
    num_tokens: int
    req_id: bytes
    made: list[ReservationKey]


class Bell(NamedTuple):
    """The word of this process's place that is rung when it is its turn, and who listens."""

    place: int
    futex: Futex
    loops: LoopWaiters


class Turn(NamedTuple):
    """What a look under the lock gave: a handle, or else what to sleep on."""

    handle: BlockHandle | None
    bell: Bell
    seen: int


class Waiting:
    """One wait of one thread or coroutine.

    `joined` gets its ticket before it is in the line, as the participant `who` (a word).
    """

    def __init__(self, want: Want, deadline: float | None) -> None:
        self.want = want
        self.deadline = deadline
        self.started = time.monotonic()
        self.said = False
        self.joined: list[Ticket] = []
        self.who = 0
        self.longest_sleep = LONGEST_SLEEP

    @property
    def seconds(self) -> float:
        """How long it waits already."""
        return time.monotonic() - self.started


class Reservations:
    """How one process reserves blocks; borrows the ledger."""

    def __init__(self, ledger: Ledger, run: Run) -> None:
        """`run` runs an operation under the lock, as a participant."""
        self._ledger = ledger
        self._run = run
        self._bell: Bell | None = None

    # ---- at once -----------------------------------------------------------------------------

    def try_reserve(self, want: Want) -> BlockHandle | None:
        """Reserve, if there is room now and nobody waits for it."""
        return self._run(self._unless_others_wait, want)

    def _unless_others_wait(self, want: Want) -> BlockHandle | None:
        if self.others_wait():
            return None
        return self._reserve_once(want) or self._reserve_again(want)

    def others_wait(self) -> bool:
        """Under the lock: whether a living process waits for blocks (the dead leave the line)."""
        ledger = self._ledger
        if not ledger.segment.words[H_WAITERS]:
            return False
        if ledger.line.first(ledger.participants.is_alive, time.monotonic_ns()) is not None:
            return True
        ledger.reap()
        return False

    def _reserve(self, want: Want) -> BlockHandle | None:
        return self._reserve_once(want) or self._reserve_again(want)

    def _reserve_again(self, want: Want) -> BlockHandle | None:
        """There was no room: look for what nobody needs any more."""
        ledger = self._ledger
        handle = None
        if ledger.collect():
            handle = self._reserve_once(want)
        if handle is None and is_due(ledger.blocks, ledger.participants):
            ledger.reap()
            handle = self._reserve_once(want)
        return handle

    def _reserve_once(self, want: Want) -> BlockHandle | None:
        me = self._ledger.participants.me
        return self._ledger.blocks.reserve(
            want.num_blocks,
            want.num_tokens,
            me.word if me else 0,
            want.req_id,
            time.monotonic_ns(),
            want.made,
        )

    # ---- in the line -------------------------------------------------------------------------

    def wait(self, want: Want, deadline: float | None) -> BlockHandle:
        """Reserve as soon as it is our turn and there is room."""
        waiting = Waiting(want, deadline)
        # Two nested clean-ups: an interrupt inside the first is mended by the second.
        try:
            try:
                self._run(self._join, waiting)
                while (turn := self._run(self._take_turn, waiting)).handle is None:
                    turn.bell.futex.wait(turn.seen, self._seconds_to_sleep(waiting))
                return turn.handle
            finally:
                self._leave_line(waiting)
        finally:
            self._leave_line(waiting)

    async def wait_async(self, want: Want, deadline: float | None) -> BlockHandle:
        """As `wait`, from asyncio."""
        handle = self.try_reserve(want)
        if handle is not None:
            return handle
        waiting = Waiting(want, deadline)
        try:
            try:
                self._run(self._join, waiting)
                while (turn := self._run(self._take_turn, waiting)).handle is None:
                    await turn.bell.loops.sleep(turn.seen, self._seconds_to_sleep(waiting))
                return turn.handle
            finally:
                self._leave_line(waiting)
        finally:
            self._leave_line(waiting)

    def _seconds_to_sleep(self, waiting: Waiting) -> float:
        """Until the clock looks (the dead ring no bells); the error of a deadline that has passed.

        Says once whom a long wait waits for.
        """
        left = seconds_left(waiting.deadline)
        if left <= 0:
            raise PoolTimeoutError(f"{self._waits(waiting)}\nfree some, or create a larger pool")
        if not waiting.said and waiting.seconds > SAYS_SO_AFTER:
            waiting.said = True
            _log.warning("%s", self._waits(waiting))
        return min(left, waiting.longest_sleep)

    def _longest_sleep(self) -> float:
        """Under the lock. Streams ring no bell either: while some are to give blocks back, look
        more often."""
        return STREAM_POLL if self._ledger.blocks.waits_for_streams else LONGEST_SLEEP

    def _join(self, waiting: Waiting) -> None:
        waiting.who = self._my_word
        want = waiting.want
        if self._ledger.line.is_full:
            self._ledger.reap()
        self._ledger.line.join(
            waiting.who,
            want.num_blocks,
            want.req_id[:REQUEST_ID_BYTES],
            time.monotonic_ns(),
            waiting.joined,
        )

    @property
    def _my_word(self) -> int:
        me = self._ledger.participants.me
        return me.word if me else 0

    def _leave_line(self, waiting: Waiting) -> None:
        # Not in a forked child that drops what it inherited of its parent's coroutines, and not
        # after a close: whoever closed the pool has taken us out.
        if waiting.who == self._my_word:
            for ticket in waiting.joined:
                with contextlib.suppress(PoolClosedError):
                    self._run(self._leave, ticket)
        waiting.joined.clear()

    def _leave(self, ticket: Ticket) -> None:
        self._ledger.line.leave(ticket)
        self._ledger.ring()

    def _take_turn(self, waiting: Waiting) -> Turn:
        ledger = self._ledger
        bell = self._my_bell()
        seen = bell.futex.value
        if is_due(ledger.blocks, ledger.participants):
            ledger.reap()
        is_alive, now = ledger.participants.is_alive, time.monotonic_ns()
        waiting.longest_sleep = self._longest_sleep()
        if not ledger.line.is_turn_of(waiting.joined[0], is_alive, now):
            return Turn(None, bell, seen)
        return Turn(self._reserve(waiting.want), bell, seen)

    def _my_bell(self) -> Bell:
        """Under the lock: our doorbell; another one after a fork."""
        me = self._ledger.participants.me
        place = me.place if me else 0
        if self._bell is None or self._bell.place != place:
            futex = self._ledger.doorbell(place)
            self._bell = Bell(place, futex, LoopWaiters(futex, notifies_all=True))
        return self._bell

    def close(self) -> None:
        """After the ledger was left: end the waits of this process, let go of the mapping."""
        bell, self._bell = self._bell, None
        if bell is not None:
            bell.futex.drop()
            bell.loops.close()

    # ---- whom it waits for -------------------------------------------------------------------

    def _waits(self, waiting: Waiting) -> str:
        return (
            f"pool {self._ledger.name}: waited {waiting.seconds:.1f} s for "
            f"{waiting.want.num_blocks} consecutive blocks; "
            f"{self._run(inspection.who_holds, self._ledger)}"
        )
