"""Reserving blocks: at once, or in the waiting line until there is room.

    try_reserve   under the lock: nobody waits (or only the dead): allocate, after a reap if that
    helps wait          join the line; then, woken by the doorbell or by the clock: my turn?
    allocate wait_async    the same from asyncio, one thread for all coroutines of the process

Contract
- First come, first served over all processes and threads; see `line.py`.
- Leaving the line, for whatever reason (served, deadline, cancelled, interrupted), rings for the
  next.
- A wait that ends without blocks raises `PoolTimeoutError`, which says who holds how many blocks
  for which request since when. One that lasts logs the same, once, as a warning.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from shmblocks import inspection
from shmblocks.blocks import ReservationKey
from shmblocks.errors import PoolTimeoutError
from shmblocks.futex import LONGEST_SLEEP, Futex
from shmblocks.handle import BlockHandle
from shmblocks.ledger import Ledger
from shmblocks.line import REQUEST_ID_BYTES, Ticket
from shmblocks.loops import LoopWaiters
from shmblocks.reclaim import is_due
from shmblocks.waiting import Run, seconds_left

# Seconds after which a wait says, once, whom it waits for.
SAYS_SO_AFTER = 10.0
# Seconds between two looks of a waiter while a stream is to give blocks back. Shorter: more looks.
# Longer: it waits longer than the stream.
STREAM_POLL = 1e-3

_log = logging.getLogger("shmblocks")


class Want(NamedTuple):
    """What is to be reserved; `made` gets its key before anything is committed."""

    num_blocks: int
    num_tokens: int
    req_id: bytes
    made: list[ReservationKey]


class Reservations:
    """How one process reserves blocks; borrows the ledger."""

    def __init__(self, ledger: Ledger, run: Run) -> None:
        """`run` runs an operation under the lock, as a participant."""
        self._ledger = ledger
        self._run = run
        self._bell: tuple[int, Futex, LoopWaiters] | None = None

    # ---- at once -----------------------------------------------------------------------------

    def try_reserve(self, want: Want) -> BlockHandle | None:
        """Reserve, if there is room now and nobody waits for it."""
        return self._run(self._unless_others_wait, want)

    def _unless_others_wait(self, want: Want) -> BlockHandle | None:
        line = self._ledger.line
        if line.length:
            if line.first(self._ledger.participants.is_alive, time.monotonic_ns()) is not None:
                return None
            self._ledger.reap()
        return self._reserve(want)

    def _reserve(self, want: Want) -> BlockHandle | None:
        blocks, participants = self._ledger.blocks, self._ledger.participants
        me = participants.me
        owner = me.word if me else 0
        now = time.monotonic_ns()
        handle = blocks.reserve(*want[:2], owner, want.req_id, now, want.made)
        if handle is None and self._ledger.collect():
            handle = blocks.reserve(*want[:2], owner, want.req_id, now, want.made)
        if handle is None and is_due(blocks, participants):
            self._ledger.reap()
            handle = blocks.reserve(*want[:2], owner, want.req_id, now, want.made)
        return handle

    # ---- in the line -------------------------------------------------------------------------

    def wait(self, want: Want, deadline: float | None) -> BlockHandle:
        """Reserve as soon as it is our turn and there is room."""
        started = time.monotonic()
        said = False
        with self._in_line(want) as ticket:
            while True:
                handle, seen = self._run(self._take_turn, ticket, want)
                if handle is not None:
                    return handle
                left = seconds_left(deadline)
                if left <= 0:
                    raise self._timed_out(want, started)
                if not said and time.monotonic() - started > SAYS_SO_AFTER:
                    said = True
                    _log.warning("%s", self._waits(want, started))
                self._my_bell()[1].wait(seen, min(left, self._longest_sleep()))

    async def wait_async(self, want: Want, deadline: float | None) -> BlockHandle:
        """As `wait`, from asyncio."""
        import asyncio

        handle = self.try_reserve(want)
        if handle is not None:
            return handle
        started = time.monotonic()
        with self._in_line(want) as ticket:
            while True:
                handle, seen = self._run(self._take_turn, ticket, want)
                if handle is not None:
                    return handle
                left = seconds_left(deadline)
                if left <= 0:
                    raise self._timed_out(want, started)
                # The clock looks too: the dead ring no bells.
                try:
                    await asyncio.wait_for(
                        self._my_bell()[2].sleep(seen), min(left, self._longest_sleep())
                    )
                except (asyncio.TimeoutError, TimeoutError):
                    continue

    def _longest_sleep(self) -> float:
        """Streams ring no bell either: while some are to give blocks back, look more often."""
        return STREAM_POLL if self._ledger.blocks.waits_for_streams else LONGEST_SLEEP

    @contextmanager
    def _in_line(self, want: Want) -> Iterator[Ticket]:
        joined: list[Ticket] = []
        try:
            self._run(self._join, want, joined)
            yield joined[0]
        finally:
            if joined:
                self._run(self._leave, joined[0])

    def _join(self, want: Want, joined: list[Ticket]) -> None:
        me = self._ledger.participants.me
        req_id = want.req_id[:REQUEST_ID_BYTES]
        now = time.monotonic_ns()
        self._ledger.line.join(me.word if me else 0, want.num_blocks, req_id, now, joined)

    def _leave(self, ticket: Ticket) -> None:
        self._ledger.line.leave(ticket)
        self._ledger.ring()

    def _take_turn(self, ticket: Ticket, want: Want) -> tuple[BlockHandle | None, int]:
        """(handle, -) when served, else (None, value of the doorbell to sleep on)."""
        ledger = self._ledger
        seen = self._my_bell()[1].value
        if is_due(ledger.blocks, ledger.participants):
            ledger.reap()
        if not ledger.line.is_turn_of(ticket, ledger.participants.is_alive, time.monotonic_ns()):
            return None, seen
        return self._reserve(want), seen

    def _my_bell(self) -> tuple[int, Futex, LoopWaiters]:
        """Our doorbell (place, word, those who await it); another one after a fork."""
        me = self._ledger.participants.me
        place = me.place if me else 0
        if self._bell is None or self._bell[0] != place:
            futex = self._ledger.doorbell(place)
            self._bell = (place, futex, LoopWaiters(futex, tells_all=True))
        return self._bell

    def close(self) -> None:
        """End the waits of this process's event loops; let go of the mapping."""
        bell, self._bell = self._bell, None
        if bell is not None:
            bell[2].close()
            bell[1].drop()

    # ---- whom it waits for -------------------------------------------------------------------

    def _timed_out(self, want: Want, started: float) -> PoolTimeoutError:
        return PoolTimeoutError(f"{self._waits(want, started)}\nfree some, or create a larger pool")

    def _waits(self, want: Want, started: float) -> str:
        return (
            f"pool {self._ledger.name}: waited {time.monotonic() - started:.1f} s for "
            f"{want.num_blocks} consecutive blocks; {self._run(inspection.who_holds, self._ledger)}"
        )
