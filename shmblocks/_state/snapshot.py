"""What a pool's shared state says at one moment, as plain values.

    raw = RawState(parts)      in a transaction: bytes are copied, nothing is interpreted
    stats(raw), ...            after it: everything else

so that whoever looks holds the lock for as long as copying takes: some 0.3 us an allocation.
"""

from __future__ import annotations

import struct
import time
from typing import Literal, NamedTuple

from shmblocks._state.blocks import ANNOUNCED, READS, TAKEN, WRITES
from shmblocks._state.counters import counter_values
from shmblocks._state.device import CREATOR_LEFT, read_export
from shmblocks._state.info import (
    AllocationInfo,
    CounterValues,
    LeaseInfo,
    ParticipantId,
    ParticipantInfo,
    PoolSnapshot,
    PoolStats,
    WaiterInfo,
)
from shmblocks._state.layout import (
    COUNTER_BYTES,
    H_FREE_BLOCKS,
    H_NEXT_GENERATION,
    H_PEERS,
    H_PENDING,
    H_SETTLING,
    H_WAITERS,
    LEASE,
    LEASE_HEAD,
    PEER_ROWS,
    PEER_WORDS,
    R_ANNOUNCED,
    R_HOLD,
    R_REQUEST_ID,
    RECORD,
    UNBOUNDED,
    WORD,
    WORD_STRUCT,
    LeaseRecord,
    Record,
    WaiterRecord,
)
from shmblocks._state.peer_rows import peer_infos
from shmblocks._state.pool_parts import PoolParts
from shmblocks._state.states import STATES, State

# Lines of a message that names holders; the command line shows all.
MOST_LINES = 20

_LEASE_KINDS: dict[int, Literal["reads", "writes", "announced"]] = {
    READS: "reads",
    WRITES: "writes",
    ANNOUNCED: "announced",
    TAKEN: "reads",
}

_HEADER_WORDS = H_PEERS + PEER_ROWS * PEER_WORDS
_HEADER = struct.Struct(f"={_HEADER_WORDS}Q")


class Allocation(NamedTuple):
    """One allocation as it stands in the segment."""

    start_block: int
    record: Record
    req_id: str
    hold_ns: int
    announced: int

    def is_evictable(self, now_ns: int) -> bool:
        """Of an entry of the cache: whether an allocation may take its blocks; as `eviction.py`."""
        record = self.record
        return (
            STATES[record.state] is State.PUBLISHED
            and record.readers_left >= UNBOUNDED
            and not record.leases
            and record.ready == record.generation
            and self.hold_ns <= now_ns
        )


class RawState:
    """A copy of everything that can be looked at; made under the lock."""

    def __init__(self, parts: PoolParts) -> None:
        memory, layout = parts.segment.memory, parts.layout
        records, size = layout.records, RECORD.size
        starts = parts.blocks.live_starts()
        self.now_ns = time.monotonic_ns()
        self._header = bytes(memory[: _HEADER.size])
        self._counters = bytes(memory[layout.counters : layout.counters + COUNTER_BYTES])
        self._starts = starts
        self._records = [bytes(memory[at : at + size]) for at in _offsets(records, size, starts)]
        leases = layout.leases
        self._leases = bytes(memory[leases : leases + parts.config.max_leases * LEASE.size])
        self.waiters: list[WaiterRecord] = (
            [waiter for _, waiter in parts.queue.waiters()] if parts.queue.length else []
        )
        self.participants = parts.participants.infos()
        self._export = read_export(memory)
        self.parts = parts

    @property
    def header(self) -> bytes:
        """The bytes of the header, up to the end of the peers."""
        return self._header

    @property
    def words(self) -> tuple[int, ...]:
        """The words of the header."""
        return _HEADER.unpack(self._header)

    def counters(self) -> CounterValues:
        """What has been done so far."""
        return counter_values(self._counters)

    def allocations(self) -> list[Allocation]:
        """Every allocation, by start block; `DamagedPoolError` for one that cannot be."""
        found = []
        for start, data in sorted(zip(self._starts, self._records, strict=True)):
            record = self.parts.blocks.record(start, data)
            text = data[R_REQUEST_ID * WORD :]
            req_id = text[1 : 1 + min(text[0], 63)].decode("utf-8", "replace")
            (hold_ns,) = WORD_STRUCT.unpack_from(data, R_HOLD * WORD)
            (announced,) = WORD_STRUCT.unpack_from(data, R_ANNOUNCED * WORD)
            found.append(Allocation(start, record, req_id, hold_ns, announced))
        return found

    def leases(self) -> list[tuple[int, LeaseRecord]]:
        """Every open lease, by slot."""
        found = []
        for slot in range(len(self._leases) // LEASE.size):
            lease = LeaseRecord._make(LEASE_HEAD.unpack_from(self._leases, slot * LEASE.size))
            if lease.generation:
                found.append((slot, lease))
        return found

    def people(self) -> dict[ParticipantId, ParticipantInfo]:
        """Everyone with a record, by id."""
        return {ParticipantId(info.slot, info.incarnation): info for info in self.participants}

    def device_state(self) -> Literal["", "exported", "creator left", "creator dead"]:
        """What became of the pool's CUDA memory."""
        if not self.parts.config.is_on_gpu:
            return ""
        if self._export.state == CREATOR_LEFT:
            return "creator left"
        creator = self.people().get(ParticipantId.of(self._export.creator))
        return "exported" if creator is not None and creator.is_alive else "creator dead"


def _offsets(records: int, size: int, starts: list[int]) -> list[int]:
    return [records + start * size for start in starts]


def allocations(raw: RawState) -> list[AllocationInfo]:
    """Every allocation, by start block."""
    people = raw.people()
    leases: dict[int, list[LeaseInfo]] = {}
    for _, lease in raw.leases():
        holder = ParticipantId.of(lease.holder)
        info = LeaseInfo(
            holder_id=holder,
            holder=people.get(holder),
            kind=_LEASE_KINDS.get(lease.kind, "writes"),
            age_seconds=max(0, raw.now_ns - lease.opened_ns) / 1e9,
            is_pending=bool(lease.pending),
        )
        leases.setdefault(lease.start_block, []).append(info)
    return [
        _allocation_info(allocation, people, leases.get(allocation.start_block, []), raw.now_ns)
        for allocation in raw.allocations()
    ]


def _allocation_info(
    allocation: Allocation,
    people: dict[ParticipantId, ParticipantInfo],
    leases: list[LeaseInfo],
    now_ns: int,
) -> AllocationInfo:
    record = allocation.record
    owner = ParticipantId.of(record.owner)
    return AllocationInfo(
        start_block=allocation.start_block,
        num_blocks=record.num_blocks,
        num_tokens=record.num_tokens,
        generation=record.generation,
        state=STATES[record.state],
        owner_id=owner,
        owner=people.get(owner),
        req_id=allocation.req_id,
        age_seconds=max(0, now_ns - record.created_ns) / 1e9,
        readers_left=record.readers_left,
        leases=leases,
    )


def waiters(raw: RawState) -> list[WaiterInfo]:
    """The wait queue, first come first."""
    people = raw.people()
    return [
        WaiterInfo(
            participant_id=(who := ParticipantId.of(waiter.who)),
            participant=people.get(who),
            num_blocks=waiter.num_blocks,
            req_id=waiter.req_id.decode("utf-8", "replace"),
            age_seconds=max(0, raw.now_ns - waiter.since_ns) / 1e9,
            seconds_since_poll=max(0, raw.now_ns - waiter.polled_ns) / 1e9,
        )
        for waiter in raw.waiters
    ]


def stats(raw: RawState) -> PoolStats:
    """Counts of blocks by state, of allocations, leases and participants."""
    parts, words = raw.parts, raw.words
    config = parts.config
    blocks = dict.fromkeys(State, 0)
    live = raw.allocations()
    for allocation in live:
        blocks[STATES[allocation.record.state]] += allocation.record.num_blocks
    entries = [allocation for allocation in live if allocation.record.keyed]
    pinned = [entry for entry in entries if not entry.is_evictable(raw.now_ns)]
    living = [info for info in raw.participants if info.is_alive]
    users = [info for info in living if info.uses_gpu]
    return PoolStats(
        name=parts.name,
        pool_id=parts.pool_id,
        size_bytes=parts.layout.segment_bytes,
        block_size=config.block_size,
        block_bytes=config.block_size * config.token_bytes,
        total_blocks=config.total_blocks,
        free_blocks=words[H_FREE_BLOCKS],
        largest_free_run=_largest_free_run(live, config.total_blocks),
        reserved_blocks=blocks[State.RESERVED],
        published_blocks=blocks[State.PUBLISHED],
        leased_blocks=blocks[State.LEASED],
        draining_blocks=blocks[State.DRAINING],
        settling_blocks=blocks[State.SETTLING],
        allocations=len(live),
        leases=len(raw.leases()),
        participants=len(living),
        dead_participants=len(raw.participants) - len(living),
        waiters=words[H_WAITERS],
        next_generation=words[H_NEXT_GENERATION],
        age_seconds=max(0, raw.now_ns - words[4]) / 1e9,
        entries=len(entries),
        entry_blocks=_blocks(entries),
        pinned_entry_blocks=_blocks(pinned),
        counters=raw.counters(),
        device=config.device,
        device_bytes=parts.layout.device_bytes,
        device_state=raw.device_state(),
        device_openers=sum(info.has_device_memory for info in users),
        gpu_users=len(users),
        pinned_bytes=sum(info.pinned_bytes for info in users),
        pending_leases=words[H_PENDING],
        settling_allocations=words[H_SETTLING],
        node_peers=len(peer_infos(raw.header, raw.people(), raw.now_ns)),
    )


def _blocks(allocations: list[Allocation]) -> int:
    return sum(allocation.record.num_blocks for allocation in allocations)


def _largest_free_run(live: list[Allocation], total_blocks: int) -> int:
    largest = position = 0
    for start, record, *_ in live:
        largest = max(largest, start - position)
        position = start + record.num_blocks
    return max(largest, total_blocks - position)


def snapshot(raw: RawState) -> PoolSnapshot:
    """All of it."""
    return PoolSnapshot(
        stats=stats(raw),
        allocations=allocations(raw),
        participants=raw.participants,
        waiters=waiters(raw),
        peers=peer_infos(raw.header, raw.people(), raw.now_ns),
    )


def who_holds(raw: RawState) -> str:
    """One line per holder: how many blocks in which allocation, for which request, since when."""
    total = raw.parts.config.total_blocks
    lines = [f"{raw.words[H_FREE_BLOCKS]} of {total} blocks are free"]
    for allocation in allocations(raw):
        holders = [str(lease.holder or "a process that is gone") for lease in allocation.leases]
        if allocation.state in (State.RESERVED, State.PUBLISHED) or not holders:
            holders.append(str(allocation.owner or "a process that is gone"))
        request = f" for request {allocation.req_id}" if allocation.req_id else ""
        lines.append(
            f"{allocation.num_blocks} blocks from {allocation.start_block}{request}: "
            f"{allocation.state} since {allocation.age_seconds:.1f} s, held by {', '.join(holders)}"
        )
    for number, waiter in enumerate(waiters(raw), 1):
        who = waiter.participant or f"participant {waiter.participant_id.slot} (gone)"
        lines.append(f"{number}. in the wait queue: {waiter.num_blocks} blocks for {who}")
    if len(lines) > MOST_LINES:
        lines[MOST_LINES:] = [f"and {len(lines) - MOST_LINES} more (`shmblocks stat`)"]
    return "\n  ".join(lines)
