"""The block table: records, bitmap and leases, and every change that they know.

Contract
- Every method runs under the pool's lock. Every change is one commit of the journal: after a death
  at any line it has happened or it has not.
- The record at an allocation's start block is the truth; bitmap, counts and the list of live
  allocations follow it in the same commit. Records of other blocks are free, whatever else stands
  in them.
- Allocation is next fit: the search goes on where the last allocation ended, and wraps. Freed
  blocks rest longest before they are used again.
- What it costs to look at all allocations or leases follows their number, not the pool's size.
- Nothing read from the segment is believed: numbers that lead outside of the pool are
  `DamagedPoolError`.

Stream order (what GPUs still do after the CPU went on):
- A published record whose `ready` is not its generation yet is *in flight*: its owner's stream
  works on the blocks. Given back now, it is *settling* until the word says that this is over, or
  the owner is gone.
- A lease that was released on a stream is *pending* until its `acknowledged` is its generation; it
  counts as open until then. `collect` ends what is over.
- `ready` and `acknowledged` are compared for equality, so a late write from an earlier generation
  never matches.

Readers by name: a reader that a publish names gets its lease record at once, of the kind ANNOUNCED.
The record becomes TAKEN when that reader opens the blocks. So it ends with its holder, as every
lease does, and nobody else can take it.

What it does not do: decide who is dead, wait, or know of processes other than as numbers.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

import msgspec

from shmblocks._state.bitmap import find_zeros
from shmblocks._state.info import ParticipantId
from shmblocks._state.journal import Journal, Store
from shmblocks._state.key_index import KeyIndex
from shmblocks._state.layout import (
    ALLOCATION_HEAD,
    FAILED,
    H_CURSOR,
    H_FREE_BLOCKS,
    H_LIVE,
    H_NEXT_GENERATION,
    H_PENDING,
    H_SETTLING,
    H_UNCLAIMED,
    KEY_BYTES,
    L_CHANNEL,
    L_PENDING,
    LEASE,
    LEASE_CHANNEL,
    LEASE_HEAD,
    LEASE_WORDS,
    R_ANNOUNCED,
    R_CREATED,
    R_LIVE_INDEX,
    R_REQUEST_ID,
    RECORD,
    RECORD_BODY,
    RECORD_HEAD,
    RECORD_HEAD_WORDS,
    RECORD_READY,
    UNBOUNDED,
    WORD,
    WORD_STRUCT,
    Layout,
    LeaseRecord,
    Record,
)
from shmblocks._state.participants import Participants
from shmblocks._state.states import NUMBER, STATES, Event, State, transition
from shmblocks.errors import (
    DamagedPoolError,
    PeerDiedError,
    StaleHandleError,
    TooManyLeasesError,
)
from shmblocks.handle import BlockHandle

READS = 1
WRITES = 2
# Announced to its holder alone, who has not come yet; and one who has come.
ANNOUNCED = 3
TAKEN = 4

# Blocks searched before the whole bitmap. Smaller: the whole is read more often. Larger: each
# search handles longer integers (4,096 bits: 1 us).
WINDOW = 4096

_ZERO = bytes(WORD)
# What `Record._make` does, without its Python frame: each operation reads a record.
_new_tuple = tuple.__new__
_NO_KEY = bytes(KEY_BYTES)
_NUM_STATES = len(STATES)
_FREE = NUMBER[State.FREE]
_RESERVED = NUMBER[State.RESERVED]
_PUBLISHED = NUMBER[State.PUBLISHED]
_LEASED = NUMBER[State.LEASED]
_SETTLING = NUMBER[State.SETTLING]


class LeaseKey(msgspec.Struct, frozen=True, gc=False):
    """What tells one lease from every other that was ever in its slot."""

    slot: int
    generation: int
    holder: int
    opened_ns: int


class BlockTable:
    """Blocks, allocations and leases of one segment; borrows its memory."""

    def __init__(
        self,
        memory: memoryview,
        words: memoryview,
        layout: Layout,
        block_size: int,
        max_leases: int,
        pool_id: int,
        journal: Journal,
        participants: Participants,
        keys: KeyIndex,
        first_fit: bool,
    ) -> None:
        """`participants` say of whom nothing can be running on a GPU any more."""
        self._block_size = block_size
        self._pool_id = pool_id
        self._memory = memory
        self._words = words
        self._layout = layout
        self._total = layout.total_blocks
        self._records = layout.records
        self._live_words = layout.live // WORD
        self._bitmap = layout.bitmap
        self._max_leases = max_leases
        self._journal = journal
        self._participants = participants
        self._keys = keys
        self._first_fit = first_fit
        # [0]: where a free lease slot is looked for first. The compiled core has the same word.
        self.hints = array("Q", [0])

    # ---- reading -----------------------------------------------------------------------------

    @property
    def free_blocks(self) -> int:
        count: int = self._words[H_FREE_BLOCKS]
        return count

    @property
    def unclaimed_ns(self) -> int:
        """When published blocks may be reclaimed at the earliest; 0: none are there."""
        moment: int = self._words[H_UNCLAIMED]
        return moment

    def record(self, block: int, copy: bytes | None = None) -> Record:
        """The record at `block`, checked to lie inside the pool when it is not free.

        `copy`: read this copy of its bytes instead.
        """
        if copy is None:
            words = RECORD_BODY.unpack_from(self._memory, self._records + block * RECORD.size)
        else:
            words = RECORD_BODY.unpack_from(copy)
        state = words[0]
        # Refuse numbers that lead outside of the pool, or that no operation leaves behind. By
        # index: each operation passes here, and a name costs three times as much.
        if state and (
            state >= _NUM_STATES
            or not 0 < words[2] <= self._total - block
            or words[3] > words[2] * self._block_size
            or words[6] > self._max_leases
            or (state == _PUBLISHED and not words[5])
            or words[10] >= self._total
        ):
            raise _damaged(f"the record of block {block} says {Record._make(words)}")
        return _new_tuple(Record, words)

    def request_id(self, block: int) -> str:
        """For which request the allocation at `block` was made."""
        offset = self._records + block * RECORD.size + R_REQUEST_ID * WORD
        length = min(self._memory[offset], 63)
        return bytes(self._memory[offset + 1 : offset + 1 + length]).decode("utf-8", "replace")

    def find(self, handle: BlockHandle) -> Record:
        """The record of the allocation that the handle's generation names.

        `StaleHandleError` when it was freed, or its blocks given to another since.
        """
        if not 0 <= handle.start_block < self._total:
            raise StaleHandleError(
                f"{handle}: expected a start block from 0 to {self._total - 1}; the handle is "
                "damaged"
            )
        record = self.record(handle.start_block)
        if record.state == _FREE:
            if record.generation == handle.generation and record.ready & FAILED:
                raise self.died(handle)
            raise StaleHandleError(f"{handle}: its blocks were freed")
        if record.generation != handle.generation:
            raise StaleHandleError(
                f"{handle}: its blocks were freed; block {handle.start_block} now starts the "
                f"allocation of generation {record.generation}"
            )
        return record

    def seems_reserved(self, handle: BlockHandle, owner: int) -> bool:
        """Whether it is a reservation of this process, `owner`, that no lease is open on.

        Lock-free, and safe because:

        1. Only its owner ever makes something else of a reservation than free blocks. Another
           process may free it at any moment, so that a check under the lock would prove no more.
        2. A generation is handed out once: whoever has taken the blocks since has another one.
        3. Seen in the middle of a change, the words agree with neither and this says False; the
           caller then checks under the lock.
        """
        start = handle.start_block
        if not 0 <= start < self._total:
            return False
        try:
            words = RECORD_HEAD.unpack_from(self._memory, self._records + start * RECORD.size)
        except ValueError:
            return False  # released memory: the pool is being closed
        expected = (_RESERVED, handle.generation, handle.num_blocks, handle.num_tokens, owner, 0, 0)
        return words[:R_CREATED] == expected

    def find_exact(self, handle: BlockHandle) -> Record:
        """Like `find`; the handle must also agree on the sizes (grown since: stale)."""
        record = self.find(handle)
        if record.num_blocks != handle.num_blocks or record.num_tokens != handle.num_tokens:
            raise StaleHandleError(
                f"{handle}: the allocation has {record.num_blocks} blocks and {record.num_tokens} "
                "tokens: it was grown or published with another length since (use the handle that "
                "this returned), or the handle is damaged"
            )
        return record

    def live_starts(self) -> list[int]:
        """The start blocks of all allocations, in no order."""
        count = self._words[H_LIVE]
        if count > self._total:
            raise _damaged(f"it counts {count} allocations in {self._total} blocks")
        first = self._live_words
        starts: list[int] = self._words[first : first + count].tolist()
        if count and max(starts) >= self._total:
            raise _damaged("the list of allocations leads outside of the pool")
        return starts

    def heads(self) -> list[tuple[int, tuple[int, ...]]]:
        """Every allocation's start block and the words of its record up to `ready`, unchecked.

        For those who look at all and act on few: a third of the price of `record`.
        """
        unpack, memory, records = RECORD_READY.unpack_from, self._memory, self._records
        size = RECORD.size
        return [(start, unpack(memory, records + start * size)) for start in self.live_starts()]

    def live(self) -> Iterator[tuple[int, Record]]:
        """Every allocation, by start block."""
        for block in sorted(self.live_starts()):
            yield block, self.record(block)

    def leases(self) -> Iterator[tuple[int, LeaseRecord]]:
        """Every open lease, by slot."""
        for slot, generation in enumerate(self._lease_generations()):
            if generation:
                yield slot, self.lease(slot)

    def _lease_generations(self) -> list[int]:
        first = self._layout.leases // WORD
        generations: list[int] = self._words[
            first : first + self._max_leases * LEASE_WORDS : LEASE_WORDS
        ].tolist()
        return generations

    def used_bits(self) -> int:
        """The whole bitmap; bit b is set when block b is in an allocation."""
        start = self._layout.bitmap
        return int.from_bytes(self._memory[start : start + self._layout.bitmap_bytes], "little")

    # ---- allocations -------------------------------------------------------------------------

    def reserve(
        self,
        num_blocks: int,
        num_tokens: int,
        owner: int,
        req_id: bytes,
        now_ns: int,
        near: int | None = None,
    ) -> BlockHandle | None:
        """Take consecutive free blocks; None when there are none. `near`: search from there on."""
        words = self._words
        free: int = words[H_FREE_BLOCKS]
        if num_blocks > free:
            return None
        start: int = near if near is not None else 0 if self._first_fit else words[H_CURSOR]
        marked = self._marked_if_free(start, num_blocks)
        if marked is None:
            start = self._search(start, num_blocks)
            if start < 0:
                return None
            marked = self._marked(start, num_blocks, used=True)
        generation: int = words[H_NEXT_GENERATION]
        live: int = words[H_LIVE]
        if live >= self._total:
            raise _damaged(f"it counts {live} allocations in {self._total} blocks")
        handle = BlockHandle(start, num_blocks, num_tokens, generation, self._pool_id)
        record = RECORD.pack(
            _RESERVED, generation, num_blocks, num_tokens, owner, 0, 0, now_ns, 0, 0, live, 0,
            _NO_KEY, 0, 0, 0, 0, 0, 0, 0, 0, req_id,
        )  # fmt: skip
        # Before the commit, and no part of it: nobody reads it before the count says so.
        words[self._live_words + live] = start
        self._journal.commit(
            (
                (
                    H_CURSOR * WORD,
                    ALLOCATION_HEAD.pack(
                        (start + num_blocks) % self._total,
                        generation + 1,
                        free - num_blocks,
                        live + 1,
                    ),
                ),
                marked,
                (self._records + start * RECORD.size, record),
            )
        )
        return handle

    def grow(self, start: int, record: Record, num_blocks: int, num_tokens: int) -> bool:
        """Extend a reservation in place; False when the blocks behind it are not free."""
        transition(record.state, Event.GROW, record.leases, record.readers_left)
        end, new_end = start + record.num_blocks, start + num_blocks
        more = num_blocks - record.num_blocks
        if new_end > self._total or self._bits(end, new_end):
            return False
        words = self._words
        cursor: int = words[H_CURSOR]
        if end <= cursor < new_end:
            cursor = new_end % self._total
        stores = [
            self._rewritten(start, record._replace(num_blocks=num_blocks, num_tokens=num_tokens))
        ]
        if more:
            stores.append(self._head(cursor, self.free_blocks - more, words[H_LIVE]))
            stores.append(self._marked(end, more, used=True))
        self._journal.commit(stores)
        return True

    def stores_to_publish(
        self,
        start: int,
        record: Record,
        num_tokens: int,
        readers: int,
        now_ns: int,
        until_ns: int,
        *,
        on_stream: bool = False,
        named: Sequence[int] = (),
    ) -> list[Store]:
        """The stores that make a reservation readable by `readers` leases, unclaimed after
        `until_ns`; the caller commits them, maybe with others.

        `on_stream`: a stream will say when it is ready. `named`: participant words of readers who
        have a claim of their own beside those.
        """
        state = transition(record.state, Event.PUBLISH, 0, readers)
        leases = record.leases
        stores = []
        if named:
            leases = len(named)
            state = transition(state, Event.OPEN, leases, readers)
            stores = self._announced(start, record.generation, named, now_ns)
        if not on_stream:
            # Before the commit, and no part of it: nobody reads it before the state says so.
            self._words[self._layout.ready_word(start)] = record.generation
        head = RECORD_HEAD.pack(
            state, record.generation, record.num_blocks, num_tokens, record.owner,
            readers, leases, record.created_ns, now_ns,
        )  # fmt: skip
        stores.append((self._records + start * RECORD.size, head))
        if named or readers < UNBOUNDED:
            stores += self._unclaimed_after(until_ns)
        return stores

    def _unclaimed_after(self, until_ns: int) -> list[Store]:
        """The store that says when something may be reclaimed, if that is not noted already."""
        if 0 < self._words[H_UNCLAIMED] <= until_ns:
            return []
        return [_word(H_UNCLAIMED, until_ns)]

    def note_unclaimed(self, earliest_ns: int) -> None:
        """Set when published blocks may be reclaimed at the earliest (0: none are there)."""
        self._journal.commit([_word(H_UNCLAIMED, earliest_ns)])

    def forgo(self, start: int, record: Record, claims: int) -> None:
        """So many announced readers will not come; with the last one the blocks are free."""
        readers_left = record.readers_left - claims
        state = record.state
        if not readers_left and not record.leases:
            self._free(start, record, self._in_flight(record))
            return
        self._journal.commit(self._moved(start, record, state, record.leases, readers_left))

    def free(self, start: int, record: Record) -> None:
        """Give an allocation back: at once, or (draining) when its last lease is released."""
        self._free(start, record, self._in_flight(record))

    def free_failed(self, start: int, record: Record) -> None:
        """As `free`, of what its dead owner has not finished and will not."""
        self.fail(start, record)
        self._free(start, record, in_flight=False)

    def free_behind(self, start: int, record: Record, now_ns: int) -> None:
        """As `free`, of a reservation that its owner's stream works on and will mark as ready."""
        self._free(start, record._replace(published_ns=now_ns), in_flight=True)

    def _free(self, start: int, record: Record, in_flight: bool) -> None:
        # Those who have not come cannot come any more.
        ended = self._announced_ended(start, record.generation)
        leases = record.leases - len(ended)
        state = transition(record.state, Event.FREE, leases, 0, in_flight)
        stores = self._moved(start, record, state, leases, 0)
        if ended:
            stores += [*ended, self._count_announced(start, -len(ended))]
        if state == _SETTLING:
            stores.append(self._changed(H_SETTLING, +1))
        self._journal.commit(stores)

    # ---- stream order ------------------------------------------------------------------------

    def _in_flight(self, record: Record) -> bool:
        """Whether the owner's stream works on the blocks of a published record, or may."""
        return (
            record.ready != record.generation
            and record.published_ns != 0
            and not self._participants.is_gone(ParticipantId.of(record.owner))
        )

    def fail(self, start: int, record: Record) -> None:
        """The owner died before it was ready: let streams go on, and readers know.

        One store, which also satisfies what waits for the generation.
        """
        self._words[self._layout.ready_word(start)] = FAILED | record.generation

    @staticmethod
    def died(handle: BlockHandle) -> PeerDiedError:
        """What the reader of a failed allocation is told."""
        return PeerDiedError(
            f"{handle}: the process that published it died before its GPU had finished it; the "
            "data is incomplete; release the lease and retry the request"
        )

    def mark_pending(self, key: LeaseKey) -> bool:
        """A lease ends when its `acknowledged` is its generation; False when it has ended."""
        lease = self.lease(key.slot)
        if not _is_of(lease, key):
            return False
        if not lease.pending:
            word = self._layout.lease_word(key.slot) + L_PENDING
            self._journal.commit([_word(word, 1), self._changed(H_PENDING, +1)])
        return True

    def collect(self) -> int:
        """End what streams have finished since; how many things came to an end."""
        words = self._words
        ended = 0
        if words[H_PENDING]:
            for slot, lease in list(self.leases()):
                if lease.pending and lease.acknowledged == lease.generation:
                    self.release(slot, lease)
                    ended += 1
        if words[H_SETTLING]:
            for start in sorted(self.live_starts()):
                # Read anew for each: what is freed moves another one in the list.
                record = self.record(start)
                if record.state == _SETTLING and not self._in_flight(record):
                    self.settle(start, record)
                    ended += 1
        return ended

    def settle(self, start: int, record: Record) -> None:
        """Free a settling allocation: its owner's stream is through."""
        state = transition(record.state, Event.SETTLE, 0, 0)
        stores = self._moved(start, record, state, 0, 0)
        stores.append(self._changed(H_SETTLING, -1))
        self._journal.commit(stores)

    @property
    def waits_for_streams(self) -> bool:
        """Whether `collect` may find something, now or later."""
        return bool(self._words[H_PENDING] or self._words[H_SETTLING])

    def _changed(self, index: int, by: int) -> Store:
        return _word(index, max(0, self._words[index] + by))

    # ---- leases ------------------------------------------------------------------------------

    def open(self, start: int, record: Record, kind: int, holder: int, now_ns: int) -> LeaseKey:
        """Take a lease. For readers, one that was expected comes."""
        stores, key = self.stores_to_open(start, record, kind, holder, now_ns)
        self._journal.commit(stores)
        return key

    def stores_to_open(
        self, start: int, record: Record, kind: int, holder: int, now_ns: int
    ) -> tuple[list[Store], LeaseKey]:
        """The stores that take a lease; the caller commits them, maybe with others."""
        reads = kind == READS
        leases = record.leases + 1
        readers_left = record.readers_left
        if reads and readers_left < UNBOUNDED:
            readers_left -= 1
        event = Event.OPEN if reads else Event.WRITE
        state = transition(record.state, event, leases, readers_left)
        slot = self._free_lease()
        lease = LEASE_HEAD.pack(record.generation, start, holder, kind, now_ns, 0, 0, 0, 0, 0)
        stores = self._moved(start, record, state, leases, readers_left)
        stores.append((self._layout.leases + slot * LEASE.size, lease))
        self.hints[0] = slot + 1
        return stores, LeaseKey(slot, record.generation, holder, now_ns)

    def find_lease(self, holder: int, opened_ns: int) -> LeaseKey | None:
        """The lease that a process opened at that moment."""
        for slot, lease in self.leases():
            if (lease.holder, lease.opened_ns) == (holder, opened_ns) and lease.kind != ANNOUNCED:
                return LeaseKey(slot, lease.generation, holder, opened_ns)
        return None

    def release_key(self, key: LeaseKey, *, unread: bool = False) -> bool:
        """End the lease of that key; False when it has ended already."""
        lease = self.lease(key.slot)
        if not _is_of(lease, key):
            return False
        self.release(key.slot, lease, unread=unread)
        return True

    def stores_to_note_channel(
        self, slot: int, channel: int, data: bytes, number: int
    ) -> list[Store]:
        """The stores that note by which channel a lease came, with which message."""
        offset = self._layout.lease_word(slot) * WORD + L_CHANNEL * WORD
        return [(offset, LEASE_CHANNEL.pack(channel + 1, len(data), data, number))]

    def channel_of(self, slot: int) -> tuple[int, bytes, int]:
        """By which channel (-1: none) a lease came, with which message, and its number."""
        offset = self._layout.lease_word(slot) * WORD + L_CHANNEL * WORD
        channel, length, data, number = LEASE_CHANNEL.unpack_from(self._memory, offset)
        return channel - 1, data[:length], number

    def release(self, slot: int, lease: LeaseRecord, *, unread: bool = False) -> None:
        """End a lease, and the allocation with the last one that it waited for.

        `unread`: as if it had never been opened, so that its reader is still to come.
        """
        self._journal.commit(self.stores_to_release(slot, lease, unread=unread))

    def stores_to_release(
        self, slot: int, lease: LeaseRecord, *, unread: bool = False, now_ns: int = 0
    ) -> list[Store]:
        """The stores that end a lease; the caller commits them, maybe with others.

        `now_ns`: its reader has so long to come as after a publish at that moment.
        """
        if lease.start_block >= self._total:
            raise _damaged(f"lease {slot} is of block {lease.start_block} of {self._total}")
        record = self.record(lease.start_block)
        if record.generation != lease.generation or not record.leases:
            raise _damaged(f"lease {slot} is of an allocation that does not count it")
        if unread and lease.kind == TAKEN and record.state == _LEASED:
            return self._announced_again(slot, lease)
        leases = record.leases - 1
        readers_left = record.readers_left
        if unread and lease.kind == READS and readers_left < UNBOUNDED:
            readers_left += 1
        in_flight = not leases and record.ready != record.generation and self._in_flight(record)
        state = transition(record.state, Event.RELEASE, leases, readers_left, in_flight)
        if now_ns:
            record = record._replace(published_ns=now_ns)
        stores = self._moved(lease.start_block, record, state, leases, readers_left)
        stores.append((self._layout.leases + slot * LEASE.size, _ZERO))
        if state == _SETTLING:
            stores.append(self._changed(H_SETTLING, +1))
        if lease.pending:
            stores.append(self._changed(H_PENDING, -1))
        if lease.kind == ANNOUNCED:
            stores.append(self._count_announced(lease.start_block, -1))
        self.hints[0] = slot
        return stores

    def lease(self, slot: int) -> LeaseRecord:
        """The lease in a slot."""
        offset = self._layout.leases + slot * LEASE.size
        return _new_tuple(LeaseRecord, LEASE_HEAD.unpack_from(self._memory, offset))

    def _free_lease(self) -> int:
        hint = self.hints[0]
        if hint < self._max_leases and self._words[self._layout.lease_word(hint)] == 0:
            return hint
        try:
            return self._lease_generations().index(0)
        except ValueError:
            raise self._too_many() from None

    def _free_leases(self, count: int) -> list[int]:
        free = [slot for slot, used in enumerate(self._lease_generations()) if not used][:count]
        if len(free) < count:
            raise self._too_many()
        return free

    def _too_many(self) -> TooManyLeasesError:
        return TooManyLeasesError(
            f"all {self._max_leases} leases are open; release some, or create the pool with a "
            "larger PoolConfig(max_leases=...)"
        )

    # ---- readers by name ---------------------------------------------------------------------

    def announced(self, start: int) -> int:
        """How many readers were announced by name and have not come."""
        count: int = self._words[self._layout.record_word(start) + R_ANNOUNCED]
        return count

    def find_announced(self, start: int, generation: int, holder: int) -> int:
        """The slot of a claim that is announced to that participant, or -1."""
        if self.announced(start):
            for slot, lease in self.leases():
                if (lease.kind, lease.generation, lease.holder) == (ANNOUNCED, generation, holder):
                    return slot
        return -1

    def add_reader(self, start: int, record: Record, holder: int, now_ns: int, until: int) -> None:
        """Announce published blocks to one more participant."""
        leases = record.leases + 1
        state = transition(record.state, Event.OPEN, leases, record.readers_left)
        stores = self._announced(start, record.generation, [holder], now_ns)
        stores += self._moved(start, record, state, leases, record.readers_left)
        self._journal.commit(stores + self._unclaimed_after(until))

    def take_up(self, slot: int, now_ns: int) -> LeaseKey:
        """The holder of an announced claim has come."""
        lease = self.lease(slot)._replace(kind=TAKEN, opened_ns=now_ns)
        start = lease.start_block
        self._journal.commit([self._lease_store(slot, lease), self._count_announced(start, -1)])
        return LeaseKey(slot, lease.generation, lease.holder, now_ns)

    def _announced(
        self, start: int, generation: int, holders: Sequence[int], now_ns: int
    ) -> list[Store]:
        """The stores of a claim for each holder."""
        slots = self._free_leases(len(holders))
        stores = [
            self._lease_store(
                slot, LeaseRecord(generation, start, holder, ANNOUNCED, now_ns, 0, 0, 0, 0, 0)
            )
            for slot, holder in zip(slots, holders, strict=True)
        ]
        self.hints[0] = slots[-1] + 1
        return [*stores, self._count_announced(start, len(holders))]

    def _announced_again(self, slot: int, lease: LeaseRecord) -> list[Store]:
        """The stores after which its holder is still to come."""
        again = self._lease_store(slot, lease._replace(kind=ANNOUNCED))
        count = self._count_announced(lease.start_block, 1)
        # Due at once: the reap that follows finds when it is overdue, and notes that.
        return [again, count, *self._unclaimed_after(lease.opened_ns)]

    def _announced_ended(self, start: int, generation: int) -> list[Store]:
        """The stores that end what is announced by name; the count is the caller's."""
        if not self.announced(start):
            return []
        return [
            (self._layout.leases + slot * LEASE.size, _ZERO)
            for slot, lease in self.leases()
            if lease.kind == ANNOUNCED and lease.generation == generation
        ]

    def _count_announced(self, start: int, by: int) -> Store:
        index = self._layout.record_word(start) + R_ANNOUNCED
        return _word(index, max(0, self._words[index] + by))

    def _lease_store(self, slot: int, lease: LeaseRecord) -> Store:
        return (self._layout.leases + slot * LEASE.size, LEASE_HEAD.pack(*lease))

    # ---- stores ------------------------------------------------------------------------------

    def _moved(
        self, start: int, record: Record, state: int, leases: int, readers_left: int
    ) -> list[Store]:
        """The stores that bring an allocation into a state; into FREE its blocks come back.

        What is given back, at once or later, cannot be found by its key any more.
        """
        stores = []
        if record.keyed and state not in (_PUBLISHED, _LEASED):
            stores = self._keys.stores_to_take_out(start)
        if state != _FREE:
            head = RECORD_HEAD.pack(
                state, record.generation, record.num_blocks, record.num_tokens, record.owner,
                readers_left, leases, record.created_ns, record.published_ns,
            )  # fmt: skip
            stores.append((self._records + start * RECORD.size, head))
            return stores
        words = self._words
        last = words[H_LIVE] - 1
        stores += [
            self._head(words[H_CURSOR], words[H_FREE_BLOCKS] + record.num_blocks, last),
            self._marked(start, record.num_blocks, used=False),
            (self._records + start * RECORD.size, _ZERO),
        ]
        if record.live_index != last:
            # The last of the list takes the index that comes free.
            moved: int = words[self._live_words + last] if last < self._total else self._total
            if moved >= self._total:
                raise _damaged(f"the list of {last + 1} allocations leads outside of the pool")
            stores.append(_word(self._live_words + record.live_index, moved))
            stores.append(_word(self._layout.record_word(moved) + R_LIVE_INDEX, record.live_index))
        return stores

    def _rewritten(self, start: int, record: Record) -> Store:
        """The store of the words of a record that change after it was made."""
        return (self._records + start * RECORD.size, RECORD_HEAD.pack(*record[:RECORD_HEAD_WORDS]))

    def _head(self, cursor: int, free: int, live: int) -> Store:
        following = self._words[H_NEXT_GENERATION]
        return (H_CURSOR * WORD, ALLOCATION_HEAD.pack(cursor, following, free, live))

    def _marked_if_free(self, start: int, count: int) -> Store | None:
        """The store that sets the bits of some blocks; None unless all are there and free.

        What lies behind the cursor is free more often than not: this spares the search.
        """
        end = start + count
        if end > self._total:
            return None
        offset = self._bitmap + (start >> 6 << 3)
        size = ((end + 63) >> 6 << 3) - (start >> 6 << 3)
        bits = int.from_bytes(self._memory[offset : offset + size], "little")
        mask = ((1 << count) - 1) << (start & 63)
        if bits & mask:
            return None
        return (offset, (bits | mask).to_bytes(size, "little"))

    def _marked(self, start: int, count: int, *, used: bool) -> Store:
        """The words of the bitmap around some blocks, with those set or cleared."""
        offset = self._bitmap + (start >> 6 << 3)
        size = ((start + count + 63) >> 6 << 3) - (start >> 6 << 3)
        bits = int.from_bytes(self._memory[offset : offset + size], "little")
        mask = ((1 << count) - 1) << (start & 63)
        bits = bits | mask if used else bits & ~mask
        return (offset, bits.to_bytes(size, "little"))

    # ---- searching ---------------------------------------------------------------------------

    def _bits(self, start: int, end: int) -> int:
        """Bits `start .. end - 1` of the bitmap, `start` as the lowest."""
        low = start // 8
        offset = self._bitmap
        data = self._memory[offset + low : offset + (end + 7) // 8]
        bits = int.from_bytes(data, "little") >> (start - low * 8)
        return bits & ((1 << (end - start)) - 1)

    def _search(self, cursor: int, count: int) -> int:
        """Where the next `count` consecutive free blocks start at or behind the cursor, or -1.

        A window before the whole bitmap: the cost does not grow with the pool.
        """
        total = self._total
        cursor = min(cursor, total - 1)
        for end in (min(cursor + WINDOW, total), total):
            found = find_zeros(self._bits(cursor, end), end - cursor, count)
            if found >= 0:
                return cursor + found
        end = min(total, cursor + count - 1)
        return find_zeros(self._bits(0, end), end, count)


def _is_of(lease: LeaseRecord, key: LeaseKey) -> bool:
    """Whether that lease is still in its slot."""
    return (
        lease.opened_ns == key.opened_ns
        and lease.generation == key.generation
        and lease.holder == key.holder
    )


def _word(index: int, value: int) -> Store:
    return (index * WORD, WORD_STRUCT.pack(value))


def _damaged(what: str) -> DamagedPoolError:
    return DamagedPoolError(
        f"{what}: something else wrote into the segment; remove the pool (`shmblocks rm --force`) "
        "and create it anew"
    )
