"""The shared state of one pool: segment, lock, journal, participants, blocks, put together.

Contract
- `Ledger.create` and `Ledger.open` give a whole one or raise and leave nothing behind.
- `run(body, ...)` is the only way in: `body` runs under the lock, on a state that is whole.
- A ledger can be open without being a participant (the inspector): then it keeps nothing alive.

Creating and attaching meet like this:

  creator   1 makes and fills a nameless segment, joins it, so that it is alive from the start
            2 gives it the name (naming.py)
  attacher  1 opens the name, checks the bytes, maps
            2 takes the lock; under it: the pool must live, not be removed, and still have its name
              (else a creator or the last leaver was faster: it is not found, and looked for again)
            3 joins
  leaver    under the lock: gives everything back, empties its place, and if nobody else lives marks
            the pool as removed and unlinks it

so that nobody joins a pool that is being replaced or removed, and nobody removes one that lives.

What it does not do: know tensors, handles of other pools, or what a block is used for.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from shmblocks._os.futex import Futex
from shmblocks._os.segment import create_unnamed, normal_name, open_existing
from shmblocks._state.blocks import BlockTable
from shmblocks._state.device import note_creator_left
from shmblocks._state.identity import Identity
from shmblocks._state.journal import Journal
from shmblocks._state.layout import (
    CONFIG_BYTES,
    H_CREATED,
    H_FREE_BLOCKS,
    H_LOCK_HOLDER,
    H_NEXT_GENERATION,
    H_NEXT_INCARNATION,
    H_NEXT_TICKET,
    H_REMOVED,
    H_WAITERS,
    HEADER_BYTES,
    IDENTITY,
    LAYOUT_VERSION,
    MAGIC,
    WORD,
    Layout,
)
from shmblocks._state.naming import take_name
from shmblocks._state.participants import ParticipantId, Participants
from shmblocks._state.reclaim import ReapReport, reap, reclaim
from shmblocks._state.shared_segment import SharedSegment
from shmblocks._state.wait_queue import WaitingLine
from shmblocks.config import PoolConfig
from shmblocks.errors import (
    IncompatiblePoolError,
    PoolNotFoundError,
    TooManyParticipantsError,
)


class Outside(Protocol):
    """Something outside of the CPU that works on the segment: a GPU."""

    def finish(self) -> None:
        """Before leaving: end its work. Idempotent."""
        ...

    def has_left(self, was_last: bool) -> None:
        """After leaving: let go; `was_last`: nobody else is there."""
        ...


class Ledger(SharedSegment):
    """The shared state of one pool as one process sees it. Owns the mapping and its file locks."""

    def __init__(
        self,
        fd: int,
        name: str,
        config: PoolConfig,
        pool_id: int,
        lock_timeout: float | None = None,
    ) -> None:
        """Map the segment behind `fd` (which stays the caller's)."""
        layout = Layout(config)
        timeout = config.lock_timeout if lock_timeout is None else lock_timeout
        super().__init__(fd, layout.segment_bytes, name, timeout)
        self.config = config
        self.pool_id = pool_id
        self.layout = layout
        memory, words = self.segment.memory, self.segment.words
        self.journal = Journal(
            memory, words, layout.journal, layout.journal_bytes, layout.ledger_bytes
        )
        self.participants = Participants(
            memory, words, layout, config.max_participants, self.locks, self.journal
        )
        self.line = WaitingLine(memory, words, layout, self.journal)
        self.blocks = BlockTable(
            memory, words, layout, config.block_size, config.max_leases, pool_id, self.journal
        )
        self.blocks.is_over = lambda who: self.participants.is_gone(ParticipantId.of(who))
        self.outside: Outside | None = None
        self._was_last = False

    # ---- making and finding --------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        name: str,
        config: PoolConfig,
        role: str,
        made: list[Ledger],
        prepare: Callable[[Ledger], object] | None = None,
    ) -> None:
        """A new pool of that name with this process as its first participant.

        `made` gets it before anybody can see it: a caller that is interrupted leaves what is there.
        `prepare` fills what others will find.
        """
        name = normal_name(name)
        with create_unnamed(Layout(config).segment_bytes, name, config.group) as file:
            fd = file.fileno()
            pool_id = secrets.randbits(64) or 1
            _write_header(fd, config, pool_id)
            ledger = cls(fd, name, config, pool_id)
            made.append(ledger)
            ledger.run(ledger.join, role, True)
            if prepare is not None:
                prepare(ledger)
            take_name(fd, name, config.lock_timeout)

    @classmethod
    def open(cls, name: str, lock_timeout: float | None = None) -> Ledger:
        """The pool of that name, without becoming a participant.

        `lock_timeout` in seconds instead of the config's.
        """
        name = normal_name(name)
        with open_existing(name) as file:
            fd = file.fileno()
            identity = Identity(fd, name)
            config = _read_config(fd, name)
            if Layout(config).segment_bytes != identity.size_bytes:
                raise IncompatiblePoolError(
                    f"pool {name}: its config needs {Layout(config).segment_bytes} bytes, the "
                    f"segment has {identity.size_bytes}: the header is damaged"
                )
            return cls(fd, name, config, identity.pool_id, lock_timeout)

    @classmethod
    def attach(cls, name: str, role: str, made: list[Ledger]) -> None:
        """The living pool of that name, with this process as a participant; `made` as above."""
        ledger = cls.open(name)
        made.append(ledger)
        ledger.run(ledger.join, role, False)

    def join(self, role: str, is_creator: bool) -> ParticipantId:
        """Under the lock: become a participant, if there is still something to join."""
        if not is_creator:
            if self.segment.words[H_REMOVED] or not self.segment.has_name:
                raise PoolNotFoundError(f"pool {self.name}: it was removed just now")
            if not self.participants.others_live():
                raise PoolNotFoundError(
                    f"pool {self.name}: all its processes are dead, what is there is a leftover; "
                    "the next `create` of that name replaces it (`shmblocks reap --all` removes it)"
                )
        return self.take_place(role, is_creator)

    def take_place(self, role: str, is_creator: bool) -> ParticipantId:
        """Under the lock: join; when every place is taken, the places of the dead are emptied."""
        try:
            return self.participants.join(role, is_creator=is_creator)
        except TooManyParticipantsError:
            if not self.reap().participants:
                raise
            return self.participants.join(role, is_creator=is_creator)

    @property
    def created_ns(self) -> int:
        """When the pool was created, on the system's monotonic clock."""
        moment: int = self.segment.words[H_CREATED]
        return moment

    # ---- the way in ----------------------------------------------------------------------------

    def entered(self) -> None:
        words = self.segment.words
        me = self.participants.me
        words[H_LOCK_HOLDER] = me[0] + 1 if me else 0
        if words[self.journal.head]:
            self.journal.replay()

    def describe_holder(self) -> str:
        place = self.segment.words[H_LOCK_HOLDER] - 1
        for who in self.participants.taken():
            if who.place == place:
                return self.participants.describe(who)
        return "a process that is not attached (an inspector, or one that has left since)"

    # ---- leaving -------------------------------------------------------------------------------

    def leave(self) -> None:
        outside = self.outside
        if outside is None:
            super().leave()
            return
        outside.finish()
        try:
            super().leave()
        finally:
            if self.is_closed:
                outside.has_left(self._was_last)

    def _leave(self) -> None:
        """Give everything back, as the last one remove the pool, and let go."""
        if self.participants.me is not None:
            self._give_back(self.participants.me)
        # Inside the section: no other thread is in it, or about to lock the descriptor. Our place
        # falls with it, and not before: until then it is ours, whatever interrupts.
        self.drop()
        self.participants.forget()

    def _give_back(self, me: ParticipantId) -> None:
        reclaim(self.blocks, self.line, lambda who: who == me, self.config.unclaimed_timeout)
        note_creator_left(self.segment.memory, me.word)
        self.participants.clear(me.place)
        self.ring()
        self._was_last = not self.participants.others_stay()
        if self._was_last:
            self.segment.words[H_REMOVED] = 1
            self.segment.unlink()

    def reap(self) -> ReapReport:
        """Under the lock: give back what the dead held and what nobody claimed in time."""
        report = reap(self.blocks, self.line, self.participants, self.config.unclaimed_timeout)
        self.ring()
        return report

    def collect(self) -> int:
        """Under the lock: end what streams have finished since; how many things ended."""
        ended = self.blocks.collect() if self.blocks.waits_for_streams else 0
        if ended:
            self.ring()
        return ended

    # ---- the waiting line ----------------------------------------------------------------------

    def doorbell(self, place: int) -> Futex:
        """The word that a participant's waiters sleep on."""
        return Futex(self.segment.mapping, self.layout.doorbell_word(place) * WORD)

    def ring(self) -> None:
        """Under the lock, after blocks came free: wake the first in the line.

        Waking under the lock costs the sleeper one more look at it; waking after it would be one
        more thing to be interrupted at, and only those who wait pay.
        """
        if self.segment.words[H_WAITERS]:
            place = self.line.turn(self.participants.is_alive, time.monotonic_ns())
            if place is not None:
                self.doorbell(place).wake()

    def forget_parent(self) -> None:
        self.participants.forget()
        self.outside = None


def _write_header(fd: int, config: PoolConfig, pool_id: int) -> None:
    layout = Layout(config)
    encoded = msgspec.msgpack.encode(config)
    if len(encoded) + WORD > CONFIG_BYTES:
        raise ValueError(
            f"config: expected at most {CONFIG_BYTES - WORD} bytes when encoded, got "
            f"{len(encoded)}: use fewer fields or shorter names"
        )
    first_words = {
        H_NEXT_GENERATION: 1,
        H_FREE_BLOCKS: config.total_blocks,
        H_NEXT_INCARNATION: 1,
        H_NEXT_TICKET: 1,  # ticket 0 is a free place in the line
    }
    for index, value in first_words.items():
        os.pwrite(fd, value.to_bytes(WORD, "little"), index * WORD)
    os.pwrite(fd, len(encoded).to_bytes(WORD, "little") + encoded, HEADER_BYTES)
    identity = IDENTITY.pack(
        MAGIC, LAYOUT_VERSION, pool_id, layout.segment_bytes, time.monotonic_ns()
    )
    os.pwrite(fd, identity, 0)


def _read_config(fd: int, name: str) -> PoolConfig:
    length = int.from_bytes(os.pread(fd, WORD, HEADER_BYTES), "little")
    if length > CONFIG_BYTES - WORD:
        raise IncompatiblePoolError(f"pool {name}: its config is damaged ({length} bytes)")
    try:
        return _config_decoder.decode(os.pread(fd, length, HEADER_BYTES + WORD))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise IncompatiblePoolError(f"pool {name}: its config is damaged: {error}") from error


_config_decoder = msgspec.msgpack.Decoder(PoolConfig)
