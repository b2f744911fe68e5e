"""The content cache of a pool: one method for each transaction on keys, claims and tickets.

Contract
- Everything that `pool_state.py` promises of a transaction.
- One allocation for each key. Of two processes that publish one key, one enters it; the other's
  blocks are free in the same transaction.
- A claim ends in the commit that publishes its key.
- A lease that travels (`give`) stays its giver's until it is adopted, by one store in one commit:
  the giver's death before that gives it back, its death after that changes nothing.

What it does not do: wait, or know tensors.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable
from typing import NamedTuple

from shmblocks._os.futex import Futex
from shmblocks._state.blocks import READS, WRITES, LeaseKey
from shmblocks._state.counters import Counter
from shmblocks._state.info import CacheStats, EntryInfo, ParticipantId
from shmblocks._state.key_index import stored_key
from shmblocks._state.layout import (
    ENTRY,
    FAILED,
    H_EPOCH,
    LEASE,
    LEASE_HEAD,
    R_GENERATION,
    R_HITS,
    R_HOLD,
    R_KEYED,
    R_USED,
    RECORD,
    WORD,
    WORD_STRUCT,
    Record,
)
from shmblocks._state.mutex import transaction
from shmblocks._state.pool_state import Opened, PoolState, stamp
from shmblocks._state.states import NUMBER, State
from shmblocks.errors import DamagedPoolError, InvalidStateError, StaleHandleError
from shmblocks.handle import BlockHandle

# Entries that `drop_all` frees in one transaction. Smaller: more of them. Larger: the lock is held
# longer (some 15 us each).
DROPPED_AT_ONCE = 16

_PUBLISHED = NUMBER[State.PUBLISHED]
_LEASED = NUMBER[State.LEASED]
_READABLE = (_PUBLISHED, _LEASED)


class Found(NamedTuple):
    """An entry at one moment; `is_ready`: what is in its blocks is complete."""

    handle: BlockHandle
    is_ready: bool


class ClaimAnswer(NamedTuple):
    """What a process that wants to encode a key is told.

    `slot` -1: the claim was given without a slot (all are taken). `seen` is what to sleep on.
    """

    state: str
    owner: ParticipantId | None = None
    since_ns: int = 0
    slot: int = -1
    seen: int = 0


class Ticket(NamedTuple):
    """A lease on its way to another process."""

    slot: int
    number: int
    handle: BlockHandle


class _Raw(NamedTuple):
    """What was copied under the lock: entries by start block, claims, counters."""

    records: list[tuple[int, bytes]]
    claims: int
    counters: tuple[int, ...]


class _Entry(NamedTuple):
    """One entry, as it was when it was copied."""

    key: bytes
    record: Record
    hold_ns: int
    used_ns: int
    hits: int


class CacheState:
    """The transactions of the content cache of one pool; borrows the pool state."""

    def __init__(self, state: PoolState) -> None:
        self._state = state
        # What `transaction` needs.
        self.mutex = state.mutex
        self.entered: Callable[[], None] = state.entered
        self.describe_holder: Callable[[], str] = state.describe_holder
        self._keys = state.keys
        self._blocks = state.blocks
        self._claims = state.claims
        self._words = state.segment.words
        self._count = state.counters.add

    # ---- publishing --------------------------------------------------------------------------

    @transaction
    def publish(
        self,
        handle: BlockHandle,
        num_tokens: int,
        readers: int,
        key: bytes,
        hold_seconds: float,
        on_stream: bool,
    ) -> BlockHandle | None:
        """Publish under a key, and end the claim on it; else the handle that the key has already,
        and the reservation is free (`on_stream`: it is the caller's to free)."""
        state = self._state
        stored = stored_key(key)
        record = self._blocks.find_exact(handle)
        state.refuse_writers(handle, record)
        claim = self._claims.find(stored)
        there = self._keys.find(stored)
        if there >= 0:
            self._count(Counter.DUPLICATES)
            if not on_stream:
                self._blocks.free(handle.start_block, record)
                state.wake_head()
            self._end_claim(claim)
            return self._handle_of(there, self._blocks.record(there))
        now = time.monotonic_ns()
        until = now + state.unclaimed_ns
        stores = self._blocks.stores_to_publish(
            handle.start_block, record, num_tokens, readers, now, until, on_stream=on_stream
        )
        hold_ns = now + int(hold_seconds * 1e9) if hold_seconds else 0
        stores += self._keys.stores_to_enter(handle.start_block, stored, hold_ns, now)
        if claim >= 0:
            stores += self._claims.stores_to_end(claim)
        state.journal.commit(stores)
        self._count(Counter.PUTS)
        self._count(Counter.PUBLISHES)
        self._wake_claimants(claim)
        # What it is in may be evicted from now on.
        state.wake_head()
        return None

    # ---- looking up --------------------------------------------------------------------------

    def find(self, key: bytes) -> Found | None:
        """The entry of a key, of this moment: touches nothing, and is only a hint.

        Lock-free. What it says of an entry is checked against the record before and after; a miss
        that was seen while others changed the index is looked up again, with the lock.
        """
        core = self._state.core
        if core is not None:
            seen = core.find(key)
            if isinstance(seen, BlockHandle):
                return Found(seen, True)
            if seen is False:
                return None
        stored = stored_key(key)
        with contextlib.suppress(DamagedPoolError, ValueError):
            changes = self._changes()
            start = self._keys.find(stored)
            if start >= 0:
                found = self._seen(start, stored)
                if found is not None:
                    return found
            elif changes == self._changes():
                return None
        # Seen in the middle of a change (then a record can look damaged), or in memory that was
        # released by `close`: ask with the lock, which tells the one from the other.
        return self._find(stored)

    def _seen(self, start: int, stored: bytes) -> Found | None:
        """Lock-free: the entry at `start`, if it was whole and under that key while we read it."""
        record = self._blocks.record(start)
        if record.state not in _READABLE or self._keys.key_of(start) != stored:
            return None
        found = Found(self._handle_of(start, record), record.ready == record.generation)
        return found if self._blocks.record(start).generation == record.generation else None

    def _changes(self) -> tuple[int, int]:
        """What every change of the index changes, or shows to be going on."""
        return self._keys.changes, self._words[self._state.journal.head]

    @transaction
    def _find(self, stored: bytes) -> Found | None:
        start = self._keys.find(stored)
        if start < 0:
            return None
        record = self._blocks.record(start)
        return Found(self._handle_of(start, record), record.ready == record.generation)

    @transaction
    def touch(self, key: bytes, hold_seconds: float) -> bool:
        """Make an entry young, and hold it; False: there is none."""
        start = self._keys.find(stored_key(key))
        if start < 0:
            return False
        now = time.monotonic_ns()
        word = self._state.layout.record_word(start)
        self._words[word + R_USED] = now
        until = now + int(hold_seconds * 1e9)
        if hold_seconds and self._words[word + R_HOLD] < until:
            self._words[word + R_HOLD] = until
        return True

    def get(self, key: bytes, leases: int, tokens: int | None) -> list[tuple[BlockHandle, Opened]]:
        """So many leases of this process on a key's entry, in one transaction; none: a miss.

        `tokens`: another number of tokens than these is a miss as well.
        """
        moment = stamp()
        try:
            return self._get(stored_key(key), leases, tokens, moment)
        except BaseException:
            self._state.undo_opens(moment)
            raise

    @transaction
    def _get(
        self, stored: bytes, leases: int, tokens: int | None, moment: int
    ) -> list[tuple[BlockHandle, Opened]]:
        return self._taken(stored, leases, tokens, moment)

    def _taken(
        self, stored: bytes, leases: int, tokens: int | None, moment: int
    ) -> list[tuple[BlockHandle, Opened]]:
        self._count(Counter.LOOKUPS)
        start = self._keys.find(stored)
        if start < 0:
            self._count(Counter.MISSES)
            return []
        record = self._blocks.record(start)
        if record.ready != record.generation:
            # A stream has not finished it, or never will: a promise that it is there could break.
            self._count(Counter.MISSES)
            return []
        if record.readers_left < leases:
            # Its announced readers have come, or are fewer than wanted here.
            self._count(Counter.MISSES)
            return []
        if tokens is not None and record.num_tokens != tokens:
            self._count(Counter.MISMATCHES)
            return []
        handle = self._handle_of(start, record)
        opened = []
        for _ in range(leases):
            stores, key = self._state.lease_stores(start, record, READS, moment)
            self._state.journal.commit(stores)
            opened.append((handle, Opened(key, True)))
            record = self._blocks.record(start)
        word = self._state.layout.record_word(start)
        self._words[word + R_USED] = time.monotonic_ns()
        self._words[word + R_HITS] += 1
        self._count(Counter.HITS)
        self._count(Counter.OPENS, leases)
        return opened

    def _handle_of(self, start: int, record: Record) -> BlockHandle:
        return BlockHandle(
            start, record.num_blocks, record.num_tokens, record.generation, self._state.pool_id
        )

    # ---- dropping ----------------------------------------------------------------------------

    @transaction
    def drop(self, key: bytes) -> bool:
        """Free an entry: at once, or when its last lease is released. False: there is none."""
        start = self._keys.find(stored_key(key))
        if start < 0:
            return False
        self._drop(start)
        return True

    def drop_all(self) -> int:
        """Free every entry that is there now; how many there were.

        A few in each transaction: nobody waits until all are gone.
        """
        there = self._entered()
        return sum(
            self._drop_some(there[first : first + DROPPED_AT_ONCE])
            for first in range(0, len(there), DROPPED_AT_ONCE)
        )

    @transaction
    def _entered(self) -> list[tuple[int, int]]:
        """Start block and generation of every entry."""
        words, word_of = self._words, self._state.layout.record_word
        return [
            (start, words[word_of(start) + R_GENERATION])
            for start in self._blocks.live_starts()
            if self._keys.is_keyed(start)
        ]

    @transaction
    def _drop_some(self, entries: list[tuple[int, int]]) -> int:
        dropped = 0
        for start, generation in entries:
            record = self._blocks.record(start)
            if record.keyed and record.generation == generation:
                self._drop(start)
                dropped += 1
        return dropped

    def _drop(self, start: int) -> None:
        self._blocks.free(start, self._blocks.record(start))
        self._state.wake_head()

    @property
    def epoch(self) -> int:
        """The epoch that keys are made with now; lock-free."""
        epoch: int = self._words[H_EPOCH]
        return epoch

    @transaction
    def bump_epoch(self) -> int:
        """Raise the epoch: keys that are made from now on reach nothing older."""
        epoch: int = self._words[H_EPOCH] + 1
        self._state.journal.commit([(H_EPOCH * WORD, WORD_STRUCT.pack(epoch))])
        return epoch

    # ---- claims ------------------------------------------------------------------------------

    @transaction
    def claim(self, key: bytes) -> ClaimAnswer:
        """`mine` (encode it), `busy` (somebody does) or `ready` (it is there)."""
        stored = stored_key(key)
        if self._is_there(stored):
            return ClaimAnswer("ready")
        participants, claims = self._state.participants, self._claims
        me = participants.me_word
        slot = claims.find(stored)
        takes_over = False
        if slot >= 0:
            there = claims.record(slot)
            owner = ParticipantId.of(there.owner)
            if participants.is_alive(owner):
                claims.note_asleep(slot)
                seen = claims.wake_value(slot)
                return ClaimAnswer("busy", owner, there.since_ns, slot, seen)
            takes_over = True
        else:
            slot = claims.free_slot()
            if slot < 0 and self._state.reap_dead():
                slot = claims.free_slot()
        now = time.monotonic_ns()
        if slot >= 0:
            self._state.journal.commit(claims.stores_to_take(slot, me, stored, now))
        if takes_over:
            self._count(Counter.TAKEOVERS)
        return ClaimAnswer("mine", ParticipantId.of(me), now, slot)

    def _is_there(self, stored: bytes) -> bool:
        """Whether a key has an entry that is complete, or will be."""
        start = self._keys.find(stored)
        if start < 0:
            return False
        record = self._blocks.record(start)
        if record.ready == record.generation:
            return True
        # A stream is to complete it. If its producer is dead that will not happen.
        if self._state.reap_dead():
            start = self._keys.find(stored)
            if start < 0:
                return False
            record = self._blocks.record(start)
        if record.ready & FAILED:
            self._drop(start)
            return False
        return True

    @transaction
    def claimant(self, key: bytes) -> ParticipantId | None:
        """The living process that has claimed a key."""
        slot = self._claims.find(stored_key(key))
        if slot < 0:
            return None
        owner = ParticipantId.of(self._claims.record(slot).owner)
        return owner if self._state.participants.is_alive(owner) else None

    @transaction
    def end_claim(self, key: bytes, answer: ClaimAnswer | None = None) -> bool:
        """Give up this process's claim on a key; False: it has none.

        `answer`: the claim that was given with it, whoever's it is, and no later one.
        """
        slot = self._claims.find(stored_key(key))
        if slot < 0:
            return False
        claim = self._claims.record(slot)
        if answer is None:
            is_meant = claim.owner == self._state.participants.me_word
        else:
            given = ("mine", claim.owner, claim.since_ns)
            is_meant = (answer.state, answer.owner and answer.owner.word, answer.since_ns) == given
        if is_meant:
            self._end_claim(slot)
        return is_meant

    @transaction
    def is_claimed(self, answer: ClaimAnswer) -> bool:
        """Whether the claim of a `busy` answer is there still, and its owner lives."""
        claim = self._claims.record(answer.slot)
        owner = answer.owner
        return (
            owner is not None
            and (claim.owner, claim.since_ns) == (owner.word, answer.since_ns)
            and self._state.participants.is_alive(owner)
        )

    def _end_claim(self, slot: int) -> None:
        if slot >= 0:
            self._state.journal.commit(self._claims.stores_to_end(slot))
            self._wake_claimants(slot)

    def _wake_claimants(self, slot: int) -> None:
        if slot >= 0 and self._claims.take_asleep(slot):
            self.claim_futex(slot).wake()

    def claim_futex(self, slot: int) -> Futex:
        """The word that those sleep on who wait for the end of a claim."""
        return Futex(self._state.segment.mapping, self._claims.wake_offset(slot))

    # ---- tickets -----------------------------------------------------------------------------

    def get_given(self, key: bytes, leases: int) -> list[Ticket]:
        """So many leases on a key's entry that travel already, in one transaction; none: a miss."""
        moment = stamp()
        try:
            return self._get_given(stored_key(key), leases, moment)
        except BaseException:
            self._state.undo_opens(moment)
            raise

    @transaction
    def _get_given(self, stored: bytes, leases: int, moment: int) -> list[Ticket]:
        return [
            Ticket(opened.key.slot, self._given(opened.key), handle)
            for handle, opened in self._taken(stored, leases, None, moment)
        ]

    @transaction
    def give(self, key: LeaseKey) -> int:
        """Let a lease of this process travel; the number of its ticket."""
        return self._given(key)

    def _given(self, key: LeaseKey) -> int:
        lease = self._blocks.lease(key.slot)
        if lease.opened_ns != key.opened_ns or lease.holder != key.holder or lease.pending:
            raise InvalidStateError("ticket: the lease has ended; take another one")
        if lease.kind == WRITES:
            raise InvalidStateError("ticket: expected a reader's lease, this is a writer's")
        number = secrets.randbits(63) | 1
        self._rewrite(key.slot, lease.holder, lease.opened_ns, number)
        return number

    def adopt(self, ticket: Ticket) -> Opened:
        """Make a lease that travels this process's own."""
        moment = stamp()
        try:
            return self._adopt(ticket, moment)
        except BaseException:
            self._state.undo_opens(moment)
            raise

    @transaction
    def _adopt(self, ticket: Ticket, moment: int) -> Opened:
        if not self._travels(ticket):
            raise StaleHandleError(
                f"ticket of {ticket.handle}: it was used, or revoked, or the process that gave it "
                "has died or left; look the key up again"
            )
        record = self._blocks.find_exact(ticket.handle)
        me = self._state.participants.me_word
        self._rewrite(ticket.slot, me, moment, 0)
        key = LeaseKey(ticket.slot, record.generation, me, moment)
        return Opened(key, record.ready == record.generation)

    @transaction
    def revoke(self, ticket: Ticket) -> bool:
        """End a lease that travels and was not adopted; False: it was, or has ended."""
        if not self._travels(ticket):
            return False
        lease = self._blocks.lease(ticket.slot)
        if lease.holder != self._state.participants.me_word:
            return False
        self._blocks.release(ticket.slot, lease)
        self._state.wake_head()
        return True

    def _travels(self, ticket: Ticket) -> bool:
        if not 0 <= ticket.slot < self._state.config.max_leases or not ticket.number:
            return False
        lease = self._blocks.lease(ticket.slot)
        return (
            lease.ticket == ticket.number
            and lease.generation == ticket.handle.generation
            and lease.start_block == ticket.handle.start_block
        )

    def _rewrite(self, slot: int, holder: int, opened_ns: int, ticket: int) -> None:
        lease = self._blocks.lease(slot)._replace(holder=holder, opened_ns=opened_ns, ticket=ticket)
        offset = self._state.layout.leases + slot * LEASE.size
        self._state.journal.commit([(offset, LEASE_HEAD.pack(*lease))])

    # ---- looking -----------------------------------------------------------------------------

    @transaction
    def _raw(self) -> _Raw:
        memory, records, size = self._state.segment.memory, self._state.layout.records, RECORD.size
        starts = self._blocks.live_starts() if self._keys.entries else []
        return _Raw(
            [
                (start, bytes(memory[records + start * size : records + (start + 1) * size]))
                for start in starts
                if self._keys.is_keyed(start)
            ],
            sum(1 for _ in self._claims.all()),
            self._state.counters.values(),
        )

    def _read(self, raw: _Raw) -> list[_Entry]:
        """What was copied, the entry that was used the longest ago first."""
        found = []
        for start, data in raw.records:
            record = self._blocks.record(start, data)
            _, key, _, hold, used, hits = ENTRY.unpack_from(data, R_KEYED * WORD)
            found.append(_Entry(key, record, hold, used, hits))
        return sorted(found, key=lambda entry: entry.used_ns)

    def entries(self) -> list[EntryInfo]:
        """Every entry, the one that was used the longest ago first."""
        now = time.monotonic_ns()
        return [
            EntryInfo(
                key=key,
                num_blocks=record.num_blocks,
                num_tokens=record.num_tokens,
                leases=record.leases,
                hits=hits,
                hold_seconds=max(0, hold - now) / 1e9,
                age_seconds=max(0, now - record.published_ns) / 1e9,
                unused_seconds=max(0, now - used) / 1e9,
            )
            for key, record, hold, used, hits in self._read(self._raw())
        ]

    def stats(self) -> CacheStats:
        """Counts of the cache."""
        raw = self._raw()
        found, counters = self._read(raw), raw.counters
        now = time.monotonic_ns()
        config = self._state.config
        block_bytes = config.block_size * config.token_bytes
        return CacheStats(
            epoch=self.epoch,
            entries=len(found),
            bytes_in_entries=sum(entry.record.num_blocks for entry in found) * block_bytes,
            leased_entries=sum(entry.record.leases > 0 for entry in found),
            held_entries=sum(entry.hold_ns > now for entry in found),
            claims=raw.claims,
            lookups=counters[Counter.LOOKUPS],
            hits=counters[Counter.HITS],
            misses=counters[Counter.MISSES],
            mismatches=counters[Counter.MISMATCHES],
            puts=counters[Counter.PUTS],
            duplicates=counters[Counter.DUPLICATES],
            evictions=counters[Counter.EVICTIONS],
            evicted_bytes=counters[Counter.EVICTED_BLOCKS] * block_bytes,
            skipped=counters[Counter.SKIPPED],
            takeovers=counters[Counter.TAKEOVERS],
            waits=counters[Counter.CLAIM_WAITS],
        )

    @transaction
    def count(self, counter: int) -> None:
        """Count something that happened outside of a transaction."""
        self._count(counter)
