"""What a pool's shared state says, as plain values, and whether it is right.

Everything here runs under the pool's lock and changes nothing. `check` reads the state as a
stranger would, so that it names what is wrong instead of failing at it.
"""

from __future__ import annotations

import time

import msgspec

from shmblocks._state.bitmap import longest_zeros
from shmblocks._state.blocks import READS
from shmblocks._state.device import CREATOR_LEFT, read_export
from shmblocks._state.layout import (
    H_CURSOR,
    H_NEXT_GENERATION,
    H_PENDING,
    H_SETTLING,
    LeaseRecord,
    Record,
)
from shmblocks._state.participants import ParticipantId, ParticipantInfo
from shmblocks._state.pool_state import Ledger
from shmblocks._state.states import STATES, State
from shmblocks.errors import IncompatiblePoolError

# Nanoseconds. Everyone in the line looks at least every quarter of a second; one that did not for
# so long is stopped, or has gone away without leaving the line.
SLOW_NS = 5_000_000_000
# Lines of a message that names holders; the inspector shows all.
MOST_LINES = 20


class LeaseInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One open lease; `holder` is None when nothing is recorded of its process any more.

    `is_pending`: it was released on a stream that has not got there yet.
    """

    place: int
    incarnation: int
    holder: ParticipantInfo | None
    kind: str
    age: float
    is_pending: bool = False


class AllocationInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One allocation; ages are seconds since it was made."""

    start_block: int
    num_blocks: int
    num_tokens: int
    generation: int
    state: State
    owner_place: int
    owner_incarnation: int
    owner: ParticipantInfo | None
    req_id: str
    age: float
    readers_left: int
    leases: list[LeaseInfo]


class PoolStats(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers of one moment. free + reserved + published + leased + draining = total blocks.

    Of the GPU: `device_state` is empty for a pool in host memory, else `exported`, `creator dead`
    or `creator left` (those who have the memory open go on, nobody else can open it);
    `device_openers`: living processes that have it open; `pinned_bytes`: registered with CUDA, over
    all living processes; `pending_leases`, `settling_allocations`: what streams are still to give
    back.
    """

    name: str
    pool_id: int
    size_bytes: int
    block_size: int
    total_blocks: int
    free_blocks: int
    reserved_blocks: int
    published_blocks: int
    leased_blocks: int
    draining_blocks: int
    allocations: int
    leases: int
    participants: int
    dead_participants: int
    waiters: int
    next_generation: int
    age: float
    device: str = "cpu"
    device_bytes: int = 0
    device_state: str = ""
    device_openers: int = 0
    gpu_users: int = 0
    pinned_bytes: int = 0
    pending_leases: int = 0
    settling_allocations: int = 0


class Violation(msgspec.Struct, frozen=True):
    """An invariant that does not hold: its number in the README, and what was seen."""

    invariant: int
    message: str


def allocations(ledger: Ledger) -> list[AllocationInfo]:
    """Every allocation, by start block."""
    leases: dict[int, list[LeaseInfo]] = {}
    now = time.monotonic_ns()
    for _, lease in ledger.blocks.leases():
        leases.setdefault(lease.start_block, []).append(_lease_info(ledger, lease, now))
    return [
        _allocation_info(ledger, start, record, leases.get(start, []), now)
        for start, record in ledger.blocks.live()
    ]


def _lease_info(ledger: Ledger, lease: LeaseRecord, now_ns: int) -> LeaseInfo:
    holder = ParticipantId.of(lease.holder)
    return LeaseInfo(
        place=holder.place,
        incarnation=holder.incarnation,
        holder=ledger.participants.info(holder),
        kind="reads" if lease.kind == READS else "writes",
        age=max(0, now_ns - lease.opened_ns) / 1e9,
        is_pending=bool(lease.pending),
    )


def _allocation_info(
    ledger: Ledger, start: int, record: Record, leases: list[LeaseInfo], now_ns: int
) -> AllocationInfo:
    owner = ParticipantId.of(record.owner)
    return AllocationInfo(
        start_block=start,
        num_blocks=record.num_blocks,
        num_tokens=record.num_tokens,
        generation=record.generation,
        state=STATES[record.state],
        owner_place=owner.place,
        owner_incarnation=owner.incarnation,
        owner=ledger.participants.info(owner),
        req_id=record.req_id.decode("utf-8", "replace"),
        age=max(0, now_ns - record.created_ns) / 1e9,
        readers_left=record.readers_left,
        leases=leases,
    )


def who_holds(ledger: Ledger) -> str:
    """One line per holder: how many blocks in which allocation, for which request, since when."""
    lines = [f"{ledger.blocks.free_blocks} of {ledger.config.total_blocks} blocks are free"]
    for allocation in allocations(ledger):
        holders = [str(lease.holder or "a process that is gone") for lease in allocation.leases]
        if allocation.state in (State.RESERVED, State.PUBLISHED) or not holders:
            holders.append(str(allocation.owner or "a process that is gone"))
        request = f" for request {allocation.req_id}" if allocation.req_id else ""
        lines.append(
            f"{allocation.num_blocks} blocks from {allocation.start_block}{request}: "
            f"{allocation.state} since {allocation.age:.1f} s, held by {', '.join(holders)}"
        )
    for place, (_, waiter) in enumerate(ledger.line.waiters()):
        who = ledger.participants.describe(ParticipantId.of(waiter.who))
        lines.append(f"{place + 1}. in the waiting line: {waiter.num_blocks} blocks for {who}")
    if len(lines) > MOST_LINES:
        lines[MOST_LINES:] = [f"and {len(lines) - MOST_LINES} more (`shmblocks stat`)"]
    return "\n  ".join(lines)


def stats(ledger: Ledger) -> PoolStats:
    """Counts of blocks by state, of allocations, leases and participants."""
    blocks = dict.fromkeys(State, 0)
    live = list(ledger.blocks.live())
    for _, record in live:
        blocks[STATES[record.state]] += record.num_blocks
    taken = sum(1 for _ in ledger.participants.taken())
    dead = len(ledger.participants.dead())
    users = [info for info in ledger.participants.infos() if info.uses_gpu and info.is_alive]
    return PoolStats(
        name=ledger.name,
        pool_id=ledger.pool_id,
        size_bytes=ledger.segment.size_bytes,
        block_size=ledger.config.block_size,
        total_blocks=ledger.config.total_blocks,
        free_blocks=ledger.blocks.free_blocks,
        reserved_blocks=blocks[State.RESERVED],
        published_blocks=blocks[State.PUBLISHED],
        leased_blocks=blocks[State.LEASED],
        draining_blocks=blocks[State.DRAINING],
        allocations=len(live),
        leases=sum(1 for _ in ledger.blocks.leases()),
        participants=taken - dead,
        dead_participants=dead,
        waiters=ledger.line.length,
        next_generation=ledger.segment.words[H_NEXT_GENERATION],
        age=max(0, time.monotonic_ns() - ledger.created_ns) / 1e9,
        device=ledger.config.device,
        device_bytes=ledger.layout.device_bytes,
        device_state=_device_state(ledger),
        device_openers=sum(info.has_device_memory for info in users),
        gpu_users=len(users),
        pinned_bytes=sum(info.pinned_bytes for info in users),
        pending_leases=ledger.segment.words[H_PENDING],
        settling_allocations=ledger.segment.words[H_SETTLING],
    )


def _device_state(ledger: Ledger) -> str:
    export = read_export(ledger.segment.memory)
    if not ledger.config.is_on_gpu:
        return ""
    if export.state == CREATOR_LEFT:
        return "creator left"
    if not ledger.participants.is_alive(ParticipantId.of(export.creator)):
        return "creator dead"
    return "exported"


def check(ledger: Ledger) -> list[Violation]:
    """Every invariant that does not hold; an empty list when the pool is right."""
    try:
        live = list(ledger.blocks.live())
    except IncompatiblePoolError as error:
        return [Violation(2, str(error))]
    return [
        *_check_blocks(ledger, live),
        *_check_owners(ledger, live),
        *_check_leases(ledger, live),
        *_check_generations(ledger, live),
        *_check_line(ledger),
        *_check_streams(ledger, live),
    ]


def _check_blocks(ledger: Ledger, live: list[tuple[int, Record]]) -> list[Violation]:
    """Invariants 1 and 2: the table, the bitmap and the free count tell the same."""
    violations = []
    total = ledger.config.total_blocks
    bits = 0
    behind = 0
    for start, record in live:
        if start < behind:
            violations.append(Violation(1, f"block {start} is in two allocations"))
        behind = max(behind, start + record.num_blocks)
        bits |= ((1 << record.num_blocks) - 1) << start
        if not 0 < record.num_tokens <= record.num_blocks * ledger.config.block_size:
            violations.append(
                Violation(2, f"{_name(start, record)} claims {record.num_tokens} tokens")
            )
    used = ledger.blocks.used_bits()
    if used != bits:
        wrong = used ^ bits
        first = (wrong & -wrong).bit_length() - 1
        violations.append(
            Violation(
                1,
                f"bitmap and table differ in {wrong.bit_count()} blocks, the first is "
                f"{first}: the bitmap says {'used' if used >> first & 1 else 'free'}",
            )
        )
    free = total - bits.bit_count()
    if free != ledger.blocks.free_blocks:
        violations.append(
            Violation(1, f"{free} blocks are free, the count says {ledger.blocks.free_blocks}")
        )
    if ledger.segment.words[H_CURSOR] >= total:
        violations.append(Violation(2, "the cursor is outside of the pool"))
    return violations


def _check_owners(ledger: Ledger, live: list[tuple[int, Record]]) -> list[Violation]:
    """Invariant 3: somebody, or a deadline, will give every block back."""
    violations = []
    for start, record in live:
        state = STATES[record.state]
        owner = ParticipantId.of(record.owner)
        if state is State.RESERVED and not ledger.participants.is_recorded(owner):
            violations.append(
                Violation(3, f"{_name(start, record)} belongs to nobody: {owner} is not there")
            )
        if state is State.PUBLISHED and (record.readers_left < 1 or not ledger.blocks.unclaimed_ns):
            violations.append(
                Violation(3, f"{_name(start, record)} has neither readers to come nor a deadline")
            )
        # Counted, if a stream is to give it back (`_check_streams`).
        settling = state is State.DRAINING and record.published_ns != 0
        if state in (State.LEASED, State.DRAINING) and record.leases == 0 and not settling:
            violations.append(
                Violation(3, f"{_name(start, record)} has no lease that would end it")
            )
    return violations


def _check_leases(ledger: Ledger, live: list[tuple[int, Record]]) -> list[Violation]:
    """Invariant 3 for leases: each belongs to a living allocation that counts it."""
    violations = []
    counts: dict[int, int] = {}
    records = dict(live)
    for slot, lease in ledger.blocks.leases():
        counts[lease.start_block] = counts.get(lease.start_block, 0) + 1
        record = records.get(lease.start_block)
        if record is None or record.generation != lease.generation:
            violations.append(
                Violation(
                    3, f"lease {slot} is of generation {lease.generation}, which is not there"
                )
            )
        holder = ParticipantId.of(lease.holder)
        if not ledger.participants.is_recorded(holder):
            violations.append(Violation(3, f"lease {slot} belongs to nobody: {holder}"))
    for start, record in live:
        if record.leases != counts.get(start, 0):
            violations.append(
                Violation(
                    3,
                    f"{_name(start, record)} counts {record.leases} leases, "
                    f"{counts.get(start, 0)} are open",
                )
            )
    return violations


def _check_generations(ledger: Ledger, live: list[tuple[int, Record]]) -> list[Violation]:
    """Invariant 4: a generation is handed out once."""
    violations = []
    seen: set[int] = set()
    following: int = ledger.segment.words[H_NEXT_GENERATION]
    for start, record in live:
        if record.generation in seen or not 0 < record.generation < following:
            violations.append(
                Violation(4, f"{_name(start, record)}: its generation is not its own")
            )
        seen.add(record.generation)
    return violations


def _check_line(ledger: Ledger) -> list[Violation]:
    """Invariant 5: nobody waits while what it waits for is there."""
    violations = []
    waiters = list(ledger.line.waiters())
    if len(waiters) != ledger.line.length:
        violations.append(Violation(5, f"{len(waiters)} wait, the count says {ledger.line.length}"))
    living = (w for _, w in waiters if ledger.participants.is_alive(ParticipantId.of(w.who)))
    first = next(living, None)
    if first is None:
        return violations
    unseen = time.monotonic_ns() - max(first.since_ns, first.looked_ns)
    longest = longest_zeros(ledger.blocks.used_bits(), ledger.config.total_blocks)
    if first.num_blocks <= longest and unseen > SLOW_NS:
        who = ledger.participants.describe(ParticipantId.of(first.who))
        violations.append(
            Violation(
                5,
                f"{who} waits for {first.num_blocks} blocks, {longest} are there, and it has not "
                f"looked for {unseen / 1e9:.1f} s",
            )
        )
    return violations


def _check_streams(ledger: Ledger, live: list[tuple[int, Record]]) -> list[Violation]:
    """Invariant 3 for what streams give back: it is counted, or nobody would look."""
    pending = sum(bool(lease.pending) for _, lease in ledger.blocks.leases())
    settling = sum(
        STATES[record.state] is State.DRAINING and record.leases == 0 and record.published_ns != 0
        for _, record in live
    )
    counts: tuple[int, int] = (
        ledger.segment.words[H_PENDING],
        ledger.segment.words[H_SETTLING],
    )
    if counts == (pending, settling):
        return []
    return [
        Violation(
            3,
            f"{pending} leases and {settling} allocations wait for a stream, the counts say "
            f"{counts[0]} and {counts[1]}",
        )
    ]


def _name(start: int, record: Record) -> str:
    return f"the {STATES[record.state]} allocation at block {start}"
