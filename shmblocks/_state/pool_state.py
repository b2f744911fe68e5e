"""The shared state of one pool: one method for each transaction.

Contract
- A method that `transaction` decorates runs under the pool's lock, on a state that is whole. It is
  one operation: after a death at any line it has happened or it has not. (`reap`, and what runs it,
  are several, each done or not.)
- `PoolState.create` and `attach` give a whole one or raise and leave nothing behind.
- What an interrupted operation has taken (blocks, a lease, an entry of the wait queue) is known by
  its owner and its `stamp`, which no other operation of this process has: so it is found again and
  given back (`open` by itself, `reserve` and `poll_queue` by their callers: `take_back`).
- A state can be open without being a participant (the inspector): then it keeps nothing alive.

What it does not do: know tensors, handles of other pools, or what a block is used for; or wait for
anything but the lock.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import msgspec

from shmblocks._os.futex import LONGEST_SLEEP, Futex
from shmblocks._os.segment import create_unnamed, normal_name, open_existing
from shmblocks._state import snapshot
from shmblocks._state.blocks import READS, WRITES, LeaseKey
from shmblocks._state.channels import Message
from shmblocks._state.check import Evidence, check
from shmblocks._state.counters import Counter, Histogram
from shmblocks._state.device import Export, note_creator_left, read_export, write_export
from shmblocks._state.eviction import MOST_ITEMS, Window, best_window
from shmblocks._state.identity import Identity
from shmblocks._state.info import (
    AllocationInfo,
    ParticipantId,
    PoolSnapshot,
    PoolStats,
    ReapReport,
    Violation,
    WaiterInfo,
)
from shmblocks._state.journal import Store
from shmblocks._state.layout import (
    CONFIG_BYTES,
    FAILED,
    H_FREE_BLOCKS,
    H_NEXT_GENERATION,
    H_NEXT_INCARNATION,
    H_NEXT_PLACE,
    H_UNCLAIMED,
    H_WAITERS,
    HEADER_BYTES,
    IDENTITY,
    LAYOUT_VERSION,
    MAGIC,
    R_TRACE,
    RECORD_WORDS,
    TRACE_BYTES,
    UNBOUNDED,
    WORD,
    Layout,
    LeaseRecord,
    Record,
)
from shmblocks._state.mutex import transaction
from shmblocks._state.pool_parts import PoolParts
from shmblocks._state.reclaim import is_due, reap, reclaim
from shmblocks._state.snapshot import RawState
from shmblocks._state.states import NUMBER, STATES, State
from shmblocks._state.wait_queue import Place
from shmblocks.config import PoolConfig
from shmblocks.errors import (
    DamagedPoolError,
    InvalidStateError,
    PeerDiedError,
    PoolClosedError,
    PoolTimeoutError,
    StaleHandleError,
    TooManyLeasesError,
)
from shmblocks.handle import BlockHandle

# Seconds between two polls of a waiter while a stream is to give blocks back. Shorter: more polls.
# Longer: it waits longer than the stream.
STREAM_POLL = 1e-3
# Seconds after which a dead producer whose end cannot be seen (participants.py) is believed to
# write nothing more. Measured on an H100: the last byte of a killed process arrived 6 ms after the
# kill at the latest.
DEAD_PATIENCE = 1.0

_FREE = NUMBER[State.FREE]
_RESERVED = NUMBER[State.RESERVED]
_PUBLISHED = NUMBER[State.PUBLISHED]
_LEASED = NUMBER[State.LEASED]
_DRAINING = NUMBER[State.DRAINING]
_SETTLING = NUMBER[State.SETTLING]

# A moment of the monotonic clock by which an operation of this process is known. No two are equal:
# the threads of a process call one after the other, and a call takes longer than the clock's
# nanosecond.
stamp = time.monotonic_ns


class DeviceUse(Protocol):
    """A device that accesses the segment asynchronously: a GPU."""

    def finish(self) -> None:
        """Before leaving: end its work. Idempotent."""
        ...

    def has_left(self, was_last: bool) -> None:
        """After leaving: let go; `was_last`: nobody else is there."""
        ...


class AllocRequest(msgspec.Struct, frozen=True, gc=False):
    """What is to be reserved, and the stamp by which it is known."""

    num_blocks: int
    num_tokens: int
    req_id: bytes
    stamp: int


class Poll(NamedTuple):
    """What a waiter found: a handle, or else the word to sleep on, and for how long at most."""

    handle: BlockHandle | None
    place: Place
    slot: int
    seen: int
    longest_sleep: float


class Opened(msgspec.Struct, frozen=True, gc=False):
    """A new lease, and whether what it is on is complete."""

    key: LeaseKey
    is_ready: bool


class PoolState(PoolParts):
    """The shared state of one pool as one process sees it."""

    def __init__(
        self,
        fd: int,
        name: str,
        config: PoolConfig,
        pool_id: int,
        lock_timeout: float | None = None,
    ) -> None:
        super().__init__(fd, name, config, pool_id, lock_timeout)
        self.device_use: DeviceUse | None = None
        # Computed once: each operation asks.
        self.unclaimed_ns = int(config.unclaimed_timeout * 1e9)
        self._first_record = self.layout.record_word(0)
        word = self.counters.word
        self._allocations, self._publishes = word(Counter.ALLOCATIONS), word(Counter.PUBLISHES)
        self._opens, self._releases = word(Counter.OPENS), word(Counter.RELEASES)

    # ---- making and finding ------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        name: str,
        config: PoolConfig,
        role: str,
        prepare: Callable[[PoolState], object] | None = None,
    ) -> PoolState:
        """A new pool of that name with this process as its first participant.

        `prepare` fills what others will find, before they can.
        """
        name = normal_name(name)
        state: PoolState | None = None
        try:
            with create_unnamed(Layout(config).segment_bytes, name, config.group) as file:
                fd = file.fileno()
                pool_id = secrets.randbits(64) or 1
                _write_header(fd, config, pool_id)
                state = cls(fd, name, config, pool_id)
                state.publish_name(fd, role, functools.partial(prepare or _nothing, state))
            return state
        except BaseException:
            if state is not None:
                state.leave()
            raise

    @classmethod
    def open_unjoined(cls, name: str, lock_timeout: float | None = None) -> PoolState:
        """The pool of that name, without becoming a participant.

        `lock_timeout` in seconds instead of the config's.
        """
        name = normal_name(name)
        with open_existing(name) as file:
            fd = file.fileno()
            identity = Identity(fd, name)
            config = _read_config(fd, name)
            if Layout(config).segment_bytes != identity.size_bytes:
                raise DamagedPoolError(
                    f"pool {name}: its config needs {Layout(config).segment_bytes} bytes, the "
                    f"segment has {identity.size_bytes}: the header is damaged"
                )
            return cls(fd, name, config, identity.pool_id, lock_timeout)

    @classmethod
    def attach(cls, name: str, role: str) -> PoolState:
        """The living pool of that name, with this process as a participant."""
        return cls.open_unjoined(name).join(role)

    # ---- reserving ---------------------------------------------------------------------------

    def reserve(self, request: AllocRequest) -> BlockHandle | None:
        """Reserve, if there are free blocks now and nobody waits for them.

        A caller that is interrupted before it has stored the handle calls `take_back`.
        """
        core = self.core
        if core is not None:
            num_blocks, num_tokens = request.num_blocks, request.num_tokens
            handle = core.reserve(num_blocks, num_tokens, request.req_id, request.stamp)
            if handle is not None:
                return handle
        return self._reserve(request)

    @transaction
    def _reserve(self, request: AllocRequest) -> BlockHandle | None:
        if self._others_wait():
            return None
        return self._reserve_now(request)

    def _reserve_now(self, request: AllocRequest) -> BlockHandle | None:
        """In a transaction: reserve, if need be after giving back what nobody needs any more."""
        handle = self._try(request)
        if handle is None and self._collect():
            handle = self._try(request)
        if handle is None and is_due(self.blocks, self.participants):
            self._reap()
            handle = self._try(request)
        if handle is None and self.keys.entries:
            handle = self._evict_for(request)
        if handle is not None:
            self._words[self._allocations] += 1
        return handle

    def _try(self, request: AllocRequest, near: int | None = None) -> BlockHandle | None:
        return self.blocks.reserve(
            request.num_blocks,
            request.num_tokens,
            self.participants.me_word,
            request.req_id,
            request.stamp,
            near,
        )

    def _evict_for(self, request: AllocRequest) -> BlockHandle | None:
        """In a transaction: free the best window of entries that nobody reads, and reserve there.

        One commit for each victim, then the reservation's: killed between, some are evicted and
        nothing is lost.
        """
        window = self._best_window(request.num_blocks)
        if window is None:
            return None
        for start in window.victims:
            record = self.blocks.record(start)
            self.blocks.free(start, record)
            self.counters.add(Counter.EVICTIONS)
            self.counters.add(Counter.EVICTED_BLOCKS, record.num_blocks)
        return self._try(request, window.start)

    def _best_window(self, num_blocks: int) -> Window | None:
        segment, now = self.segment, time.monotonic_ns()
        if self.core is not None:
            found = self.core.best_window(num_blocks, MOST_ITEMS, now)
            if found is not None:
                return Window(*found) if isinstance(found, tuple) else None
        memory, words = segment.memory, segment.words
        return best_window(memory, words, self.layout, num_blocks, now, MOST_ITEMS)

    def _others_wait(self) -> bool:
        """In a transaction: whether a living process waits for blocks."""
        if not self.segment.words[H_WAITERS]:
            return False
        if self.queue.head(self.participants.is_alive, time.monotonic_ns()) is not None:
            return True
        self._reap()
        return False

    def take_back(self, moment: int) -> None:
        """Give back what the interrupted reservation of that stamp has taken: blocks, its entry in
        the queue.

        Nothing happens when the pool was closed (it was given back then), or in a forked child (it
        is the parent's).
        """
        if self.participants.me is not None:
            with contextlib.suppress(PoolClosedError):
                self._take_back(moment)

    @transaction
    def _take_back(self, moment: int) -> None:
        place = self.queue.find(self.participants.me_word, moment)
        if place is not None:
            self.queue.leave(place)
        for start in self.blocks.live_starts():
            record = self.blocks.record(start)
            if (record.state, record.owner, record.created_ns) == (
                _RESERVED,
                self.participants.me_word,
                moment,
            ):
                self.blocks.free(start, record)
                break
        self.wake_head()

    # ---- the wait queue ----------------------------------------------------------------------

    @transaction
    def poll_queue(self, request: AllocRequest, place: Place | None = None) -> Poll:
        """One poll of a waiter, the first of which joins the queue; when it is served it leaves.

        `place`: what the last poll gave.
        """
        now = time.monotonic_ns()
        me = self.participants.me_word
        if place is None or not self.queue.is_of(place, me):
            if self.queue.is_full:
                self._reap()
            place = self.queue.join(me, request.num_blocks, request.req_id, request.stamp)
        elif is_due(self.blocks, self.participants):
            self._reap()
        slot = ParticipantId.of(me).slot
        seen: int = self.segment.words[self.layout.wake_word(slot)]
        handle = None
        if self.queue.is_head(place, self.participants.is_alive, now):
            handle = self._reserve_now(request)
            if handle is not None:
                self.queue.leave(place)
                self.wake_head()
                self.counters.observe(Histogram.ALLOC_WAIT, time.monotonic_ns() - request.stamp)
        # A CUDA stream cannot wake us: poll faster while one is about to release blocks.
        longest = STREAM_POLL if self.blocks.waits_for_streams else LONGEST_SLEEP
        return Poll(handle, place, slot, seen, longest)

    @transaction
    def count(self, counter: int) -> None:
        """Count something that happened outside of a transaction."""
        self.counters.add(counter)

    def wake_futex(self, slot: int) -> Futex:
        """The word that a participant's waiters sleep on."""
        return Futex(self.segment.mapping, self.participants.wake_offset(slot))

    def wake_head(self) -> None:
        """In a transaction, after blocks came free: wake the head of the wait queue.

        Wake while holding the lock. The woken process may have to retry, but waking after the
        unlock would add a point where an interrupt could lose the wake-up.
        """
        if self.segment.words[H_WAITERS]:
            slot = self.queue.head_to_wake(self.participants.is_alive, time.monotonic_ns())
            if slot is not None:
                self.wake_futex(slot).wake()

    # ---- allocations -------------------------------------------------------------------------

    @transaction
    def grow(self, handle: BlockHandle, num_tokens: int) -> BlockHandle | None:
        """Extend a reservation in place; None when that cannot be served now."""
        others_wait = self._others_wait()  # first: it may reap
        record = self.blocks.find_exact(handle)
        num_blocks = max(self.config.blocks_for(num_tokens), record.num_blocks)
        start = handle.start_block
        if others_wait and num_blocks > record.num_blocks:
            return None
        if not self.blocks.grow(start, record, num_blocks, num_tokens):
            return None
        return BlockHandle(start, num_blocks, num_tokens, handle.generation, handle.pool_id)

    def publish(
        self,
        handle: BlockHandle,
        num_tokens: int,
        readers: int,
        on_stream: bool = False,
        named: Sequence[ParticipantId] = (),
    ) -> None:
        """Make a reservation readable; `on_stream`: a stream will say when it is ready; `named`:
        readers with a claim of their own."""
        core = self.core
        if core is None or named or not core.publish(handle, num_tokens, readers, on_stream):
            self._publish(handle, num_tokens, readers, on_stream, named)

    @transaction
    def _publish(
        self,
        handle: BlockHandle,
        num_tokens: int,
        readers: int,
        on_stream: bool,
        named: Sequence[ParticipantId],
    ) -> None:
        for who in named:
            self._require_living(who)
        record = self.blocks.find_exact(handle)
        self.refuse_writers(handle, record)
        try:
            self._commit_publish(handle, record, num_tokens, readers, on_stream, named)
        except TooManyLeasesError:
            if not self._collect() and not self._reap().leases:
                raise
            record = self.blocks.find_exact(handle)
            self._commit_publish(handle, record, num_tokens, readers, on_stream, named)
        self._words[self._publishes] += 1

    def _commit_publish(
        self,
        handle: BlockHandle,
        record: Record,
        num_tokens: int,
        readers: int,
        on_stream: bool,
        named: Sequence[ParticipantId],
    ) -> None:
        now = time.monotonic_ns()
        stores = self.blocks.stores_to_publish(
            handle.start_block,
            record,
            num_tokens,
            readers,
            now,
            now + self.unclaimed_ns,
            on_stream=on_stream,
            named=[who.word for who in named],
        )
        self.journal.commit(stores)

    def _require_living(self, who: ParticipantId) -> None:
        if not self.participants.is_alive(who):
            raise PeerDiedError(
                f"{self.participants.describe(who)}: it has exited or left the pool, so that it "
                "cannot be a reader; announce to a living one (`find_participant`)"
            )

    @transaction
    def add_reader(self, handle: BlockHandle, who: ParticipantId) -> None:
        """Announce published blocks to one more participant."""
        self._require_living(who)
        record = self.blocks.find_exact(handle)
        self._require_published(handle, record)
        start, until = handle.start_block, time.monotonic_ns() + self.unclaimed_ns
        try:
            self.blocks.add_reader(start, record, who.word, time.monotonic_ns(), until)
        except TooManyLeasesError:
            if not self._collect() and not self._reap().leases:
                raise
            record = self.blocks.find_exact(handle)
            self.blocks.add_reader(start, record, who.word, time.monotonic_ns(), until)

    def _require_published(self, handle: BlockHandle, record: Record) -> None:
        self._refuse_freed(handle, record)
        if record.state not in (_PUBLISHED, _LEASED):
            raise InvalidStateError(
                f"{handle}: expected published blocks, they are {STATES[record.state]}"
            )

    @transaction
    def note_trace(self, handle: BlockHandle, context: bytes) -> None:
        """Keep a trace context (16 bytes trace id, 8 bytes span id) with an allocation."""
        self.blocks.find(handle)
        self.journal.commit([(self._trace_offset(handle), context)])

    @transaction
    def trace_of(self, handle: BlockHandle) -> bytes:
        """The trace context of an allocation; zeros: it has none."""
        self.blocks.find(handle)
        offset = self._trace_offset(handle)
        return bytes(self.segment.memory[offset : offset + TRACE_BYTES])

    def _trace_offset(self, handle: BlockHandle) -> int:
        return (self.layout.record_word(handle.start_block) + R_TRACE) * WORD

    @staticmethod
    def refuse_writers(handle: BlockHandle, record: Record) -> None:
        """In a transaction: what writers have open cannot be published."""
        if record.leases and record.state == _RESERVED:
            raise InvalidStateError(
                f"{handle}: {record.leases} writer's lease(s) are open; release them, then publish"
            )

    def free(self, handle: BlockHandle) -> None:
        """Give an allocation back; with open leases, the last one released does."""
        core = self.core
        if core is None or not core.free(handle):
            self._free(handle)

    @transaction
    def _free(self, handle: BlockHandle) -> None:
        record = self.blocks.find(handle)
        self._refuse_freed(handle, record)
        self.blocks.free(handle.start_block, record)
        self.wake_head()

    def _refuse_freed(self, handle: BlockHandle, record: Record) -> None:
        if record.state in (_DRAINING, _SETTLING):
            raise StaleHandleError(
                f"{handle}: its blocks were freed; they come back when the last of "
                f"{record.leases} lease(s) is released"
                if record.leases
                else f"{handle}: its blocks were freed; they come back when a stream is through"
            )

    @transaction
    def free_behind(self, handle: BlockHandle) -> bool:
        """Free a reservation of this process when its stream is through; False: it is none."""
        record = self.blocks.find(handle)
        if record.state != _RESERVED or record.owner != self.participants.me_word:
            return False
        self.blocks.free_behind(handle.start_block, record, time.monotonic_ns())
        return True

    @transaction
    def forgo(self, handle: BlockHandle, claims: int) -> None:
        """So many announced readers will not come."""
        record = self.blocks.find_exact(handle)
        self._require_published(handle, record)
        if record.readers_left >= UNBOUNDED or claims > record.readers_left:
            raise InvalidStateError(
                f"{handle}: expected at most the {record.readers_left} reader(s) that are still to "
                f"come, got {claims}"
                if record.readers_left < UNBOUNDED
                else f"{handle}: any number of readers may come; free it instead"
            )
        self.blocks.forgo(handle.start_block, record, claims)
        self.wake_head()

    @transaction
    def forgo_named(self, handle: BlockHandle, who: ParticipantId) -> bool:
        """That participant will not come; False: it has no claim of its own, or has come."""
        record = self.blocks.find_exact(handle)
        slot = self.blocks.find_announced(handle.start_block, record.generation, who.word)
        if slot < 0:
            return False
        self.blocks.release(slot, self.blocks.lease(slot))
        self.wake_head()
        return True

    @transaction
    def available_blocks(self) -> int:
        """Blocks in no allocation."""
        self._collect()
        return self.blocks.free_blocks

    @transaction
    def handle_at(self, start_block: int) -> BlockHandle:
        """The handle of the allocation that starts at a block."""
        record = self.blocks.record(start_block)
        if record.state == _FREE:
            raise StaleHandleError(f"block {start_block}: no allocation starts there")
        return BlockHandle(
            start_block, record.num_blocks, record.num_tokens, record.generation, self.pool_id
        )

    def seems_mine(self, handle: BlockHandle) -> bool:
        """Lock-free: whether it is a reservation of this process without open leases."""
        return self.blocks.seems_reserved(handle, self.participants.me_word)

    def is_mine(self, handle: BlockHandle) -> bool:
        """Lock-free, as `seems_mine`, but whatever leases are open and whatever its length is."""
        word = self.layout.record_word(handle.start_block)
        words = self.segment.words
        try:
            return bool(
                words[word] == _RESERVED
                and words[word + 1] == handle.generation
                and words[word + 4] == self.participants.me_word
            )
        except ValueError:
            return False  # released memory: the pool was closed

    def is_reserved(self, handle: BlockHandle) -> bool:
        """Lock-free: whether it is a reservation still, of whomever."""
        words, word = self._words, self._first_record + handle.start_block * RECORD_WORDS
        try:
            return bool(words[word] == _RESERVED and words[word + 1] == handle.generation)
        except ValueError:
            return False  # released memory: the pool was closed

    @transaction
    def require_mine(self, handle: BlockHandle) -> bool:
        """Raise when it is no reservation of this process; True: a writer's stream works on it."""
        record = self.blocks.find_exact(handle)
        if record.state != _RESERVED or record.owner != self.participants.me_word:
            owner = self.participants.describe(ParticipantId.of(record.owner))
            raise InvalidStateError(
                f"{handle}: expected a reservation of this process, it is {STATES[record.state]} "
                f"and belongs to {owner}: use `open` to read what is published, `open_for_write` "
                "for a reservation of another process"
            )
        if not record.leases or not self.blocks.waits_for_streams:
            return False
        self._collect()
        return any(
            lease.pending and lease.generation == handle.generation
            for _, lease in self.blocks.leases()
        )

    # ---- leases ------------------------------------------------------------------------------

    def open(self, handle: BlockHandle, *, for_write: bool = False) -> Opened:
        """A lease of this process on published blocks, or as a writer on a reservation."""
        moment = stamp()
        try:
            core = self.core
            taken = None if core is None or for_write else core.lease(handle, moment)
            if taken is not None:
                slot, generation, holder, opened_ns, is_ready = taken
                return Opened(LeaseKey(slot, generation, holder, opened_ns), is_ready)
            return self._open(handle, WRITES if for_write else READS, moment)
        except (PoolClosedError, PoolTimeoutError):
            raise  # nothing was taken, and the lock is not to be had
        except BaseException:
            self.undo_opens(moment)
            raise

    @transaction
    def _open(self, handle: BlockHandle, kind: int, moment: int) -> Opened:
        record = self.blocks.find_exact(handle)
        ready = record.ready
        if ready & FAILED:
            raise self.blocks.died(handle)
        if kind == READS and self.blocks.announced(handle.start_block):
            key = self._take_up(handle, record, moment)
            if key is not None:
                return Opened(key, ready == handle.generation)
        if not record.readers_left and kind == READS and record.state == _LEASED:
            raise InvalidStateError(
                f"{handle}: every reader that `publish(readers=...)` announced is there already, "
                "or it was announced to others by name"
            )
        stores, key = self.lease_stores(handle.start_block, record, kind, moment)
        self.journal.commit(stores)
        if kind == READS:
            self._words[self._opens] += 1
            self.counters.observe(Histogram.PUBLISH_TO_OPEN, moment - record.published_ns)
        return Opened(key, kind == WRITES or ready == handle.generation)

    def _take_up(self, handle: BlockHandle, record: Record, moment: int) -> LeaseKey | None:
        """In a transaction: the lease of this process that was announced to it, if one was."""
        me = self.participants.me_word
        slot = self.blocks.find_announced(handle.start_block, record.generation, me)
        if slot < 0:
            return None
        key = self.blocks.take_up(slot, moment)
        self._words[self._opens] += 1
        self.counters.observe(Histogram.PUBLISH_TO_OPEN, moment - record.published_ns)
        return key

    def lease_stores(
        self, start: int, record: Record, kind: int, moment: int
    ) -> tuple[list[Store], LeaseKey]:
        """In a transaction: the stores of a new lease, if need be after giving back others'."""
        blocks, me = self.blocks, self.participants.me_word
        try:
            return blocks.stores_to_open(start, record, kind, me, moment)
        except TooManyLeasesError:
            if not self._collect() and not self._reap().leases:
                raise
            again = blocks.record(start)
            if again.generation != record.generation:
                raise
            return blocks.stores_to_open(start, again, kind, me, moment)

    def undo_opens(self, moment: int) -> None:
        """Give back all leases that an interrupted operation took at that moment."""
        with contextlib.suppress(PoolClosedError):
            self._give_back_opened(moment)

    def undo_receives(self, moment: int) -> None:
        """Give back all leases and messages that an interrupted receive took at that moment."""
        with contextlib.suppress(PoolClosedError):
            self._give_back_received(moment)

    @transaction
    def _give_back_received(self, moment: int) -> None:
        me = self.participants.me_word
        keys = [
            LeaseKey(slot, lease.generation, me, moment)
            for slot, lease in self.blocks.leases()
            if lease.holder == me and lease.opened_ns == moment
        ]
        # The last one first, so that the first one is at the front again.
        keys.sort(key=lambda key: self.blocks.channel_of(key.slot)[2], reverse=True)
        for key in keys:
            lease = self.blocks.lease(key.slot)
            if not self._put_back(key.slot, lease):
                self.blocks.release(key.slot, lease, unread=True)
        self.wake_head()

    def _put_back(self, slot: int, lease: LeaseRecord) -> bool:
        """In a transaction: end a lease and put its message back, in one commit; False: no room."""
        channel, data, number = self.blocks.channel_of(slot)
        if channel < 0:
            return False
        message = Message(lease.start_block, lease.generation, data, number)
        stores = self.channels.stores_to_put_back(channel, message)
        if stores is None:
            return False
        now = time.monotonic_ns()
        stores += self.blocks.stores_to_release(slot, lease, unread=True, now_ns=now)
        until = now + self.unclaimed_ns
        if not 0 < self.blocks.unclaimed_ns <= until:
            stores.append((H_UNCLAIMED * WORD, until.to_bytes(WORD, "little")))
        self.journal.commit(stores)
        if self.channels.take_receiver(channel):
            Futex(self.segment.mapping, self.channels.arrivals_offset(channel)).wake(1)
        return True

    def _redeliver(self, slot: int, lease: LeaseRecord) -> bool:
        """In a transaction: what to do with the lease of one who is gone; True: it is done."""
        channel, _, _ = self.blocks.channel_of(slot)
        if channel < 0 or lease.kind != READS or not self.channels.redelivers(channel):
            return False
        return self._put_back(slot, lease)

    def undo_open(self, key: LeaseKey) -> None:
        """Give back a lease whose opening was interrupted, or failed, after it was taken."""
        with contextlib.suppress(PoolClosedError):
            self.release(key, unread=True)

    @transaction
    def _give_back_opened(self, moment: int) -> None:
        me = self.participants.me_word
        while (key := self.blocks.find_lease(me, moment)) is not None:
            self.blocks.release_key(key, unread=True)
        self.wake_head()

    def release(self, key: LeaseKey, *, unread: bool = False) -> None:
        """End a lease now; `unread`: as if it had never been there.

        Nothing happens when the pool was closed (it was given back then), or in a forked child
        (it is the parent's).
        """
        if key.holder == self.participants.me_word:
            self._release(key, unread)

    @transaction
    def _release(self, key: LeaseKey, unread: bool) -> None:
        if self.blocks.release_key(key, unread=unread):
            self._words[self._releases] += 1
            self.wake_head()

    @transaction
    def mark_pending(self, key: LeaseKey) -> None:
        """The lease ends when a stream has acknowledged it."""
        self.blocks.mark_pending(key)

    # ---- streams -----------------------------------------------------------------------------

    @transaction
    def fail(self, handle: BlockHandle) -> None:
        """What this process published will never be ready."""
        record = self.blocks.record(handle.start_block)
        if record.generation == handle.generation:
            self.blocks.fail(handle.start_block, record)

    @transaction
    def fail_if_over(
        self, start_block: int, generation: int, is_believed_dead: bool
    ) -> bool | None:
        """Whether what a stream waits for is ready or failed; None: its producer is dead.

        A producer that is *gone* has failed. `is_believed_dead`: so has one that was dead for long
        and whose end cannot be seen.
        """
        record = self.blocks.record(start_block)
        if record.generation != generation or record.ready >= generation:
            return True
        owner = ParticipantId.of(record.owner)
        if self.participants.is_alive(owner):
            return False
        if not is_believed_dead and not self.participants.is_gone(owner):
            return None
        self.blocks.fail(start_block, record)
        return True

    def is_ready(self, handle: BlockHandle) -> bool:
        """Lock-free: whether what this process has open is complete; `PeerDiedError`: never."""
        word: int = self.segment.words[self.layout.ready_word(handle.start_block)]
        if word & FAILED:
            raise self.blocks.died(handle)
        return word == handle.generation

    # ---- the GPU -----------------------------------------------------------------------------

    @transaction
    def become_gpu_user(self) -> None:
        """From now on what this process holds is kept apart until its last DMA is over."""
        self.participants.becomes_gpu_user(self.segment.mapped_fd)

    @transaction
    def end_gpu_use(self) -> None:
        """Nothing of this process runs on a GPU any more."""
        self.participants.was_gpu_user(self.segment.mapped_fd)

    @transaction
    def note_flags(self, flags: int) -> None:
        """Add flags to this process's record."""
        self.participants.note_flags(flags)

    @transaction
    def note_pinned(self, size: int) -> None:
        """Say how many bytes of the segment this process has registered with CUDA."""
        self.participants.note_pinned(size)

    @transaction
    def write_export(self, export: Export) -> None:
        """Say where the pool's CUDA memory is."""
        write_export(self.segment.memory, export)

    @transaction
    def read_export(self) -> Export:
        """Where the pool's CUDA memory is."""
        return read_export(self.segment.memory)

    # ---- looking -----------------------------------------------------------------------------

    @transaction
    def _raw(self) -> RawState:
        self._collect()
        return RawState(self)

    def stats(self) -> PoolStats:
        """Counts of blocks by state, allocations, leases and participants."""
        return snapshot.stats(self._raw())

    def allocations(self) -> list[AllocationInfo]:
        """Every allocation, by start block."""
        return snapshot.allocations(self._raw())

    def waiter_infos(self) -> list[WaiterInfo]:
        """The wait queue, first come first."""
        return snapshot.waiters(self._raw())

    def snapshot(self) -> PoolSnapshot:
        """All of it, of one moment."""
        return snapshot.snapshot(self._raw())

    def who_holds(self) -> str:
        """For messages: who holds how many blocks, for which request, since when."""
        return snapshot.who_holds(self._raw())

    def check(self) -> list[Violation]:
        """Every invariant that does not hold."""
        return check(self._evidence())

    @transaction
    def _evidence(self) -> Evidence:
        return Evidence(self)

    # ---- giving back -------------------------------------------------------------------------

    @transaction
    def reap(self) -> ReapReport:
        """Give back what the dead held and what nobody claimed in time."""
        return self._reap()

    @transaction
    def reap_if_due(self) -> bool:
        """`reap`, if somebody died or a deadline passed; whether it did."""
        if not is_due(self.blocks, self.participants):
            return False
        self._reap()
        return True

    def _reap(self) -> ReapReport:
        if not is_due(self.blocks, self.participants):
            return ReapReport()  # nobody died, nothing is overdue: no allocation need be looked at
        report = reap(
            self.blocks,
            self.queue,
            self.participants,
            self._end_claims,
            self._redeliver,
            self.config.unclaimed_timeout,
        )
        self.counters.add(Counter.REAPED_BLOCKS, report.blocks)
        self.wake_head()
        return report

    def reap_dead(self) -> bool:
        """In a transaction: `reap`, if somebody is dead; whether it did."""
        if not self.participants.dead():
            return False
        self._reap()
        return True

    def _end_claims(self, is_gone: Callable[[int], bool]) -> None:
        """In a transaction: end the claims of those who are gone."""
        for slot, claim in list(self.claims.all()):
            if is_gone(claim.owner):
                self.journal.commit(self.claims.stores_to_end(slot))
                Futex(self.segment.mapping, self.claims.wake_offset(slot)).wake()

    def _clear_dead(self) -> int:
        return self._reap().participants

    def _collect(self) -> int:
        """In a transaction: end what streams have finished since; how many things ended."""
        ended = self.blocks.collect() if self.blocks.waits_for_streams else 0
        if ended:
            self.wake_head()
        return ended

    def leave(self) -> None:
        device_use = self.device_use
        if device_use is None:
            super().leave()
            return
        device_use.finish()
        try:
            super().leave()
        finally:
            if self.is_closed:
                device_use.has_left(self._was_last)

    def _give_back(self, me: ParticipantId) -> None:
        word = me.word
        unclaimed = self.config.unclaimed_timeout
        reclaim(self.blocks, self.queue, self._end_claims, self._redeliver, word.__eq__, unclaimed)
        note_creator_left(self.segment.memory, word)
        self.wake_head()

    def reset_after_fork(self) -> None:
        self.device_use = None
        super().reset_after_fork()


def _nothing(_: PoolState) -> None:
    """There is nothing to prepare."""


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
        H_NEXT_PLACE: 1,  # place 0 is a free slot of the queue
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
        raise DamagedPoolError(f"pool {name}: its config is damaged ({length} bytes)")
    try:
        return _config_decoder.decode(os.pread(fd, length, HEADER_BYTES + WORD))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DamagedPoolError(f"pool {name}: its config is damaged: {error}") from error


_config_decoder = msgspec.msgpack.Decoder(PoolConfig)
