"""Whether a pool's shared state is right: every invariant that does not hold, by name.

`Evidence` is a copy made under the lock; the checks read it as a stranger would, so that they name
what is wrong instead of failing at it, and keep nobody waiting.
"""

from __future__ import annotations

from shmblocks._state.bitmap import longest_zeros
from shmblocks._state.blocks import ANNOUNCED
from shmblocks._state.info import ParticipantId, Violation
from shmblocks._state.layout import (
    H_CURSOR,
    H_ENTRIES,
    H_FREE_BLOCKS,
    H_NEXT_GENERATION,
    H_PENDING,
    H_SETTLING,
    H_UNCLAIMED,
    H_WAITERS,
    RECORD_WORDS,
    UNBOUNDED,
    WORD,
)
from shmblocks._state.pool_parts import PoolParts
from shmblocks._state.snapshot import Allocation, RawState
from shmblocks._state.states import STATES, State
from shmblocks.errors import DamagedPoolError

# Nanoseconds. Everyone in the queue polls at least every quarter of a second; one that did not for
# so long is stopped, or has gone away without leaving the queue.
SLOW_NS = 5_000_000_000


class Evidence:
    """A copy of all that the invariants speak of; made under the lock."""

    def __init__(self, parts: PoolParts) -> None:
        first = parts.layout.records // WORD
        end = first + parts.config.total_blocks * RECORD_WORDS
        # Of every block, also of those that the list of live allocations does not name.
        self.states = bytes(parts.segment.words[first:end:RECORD_WORDS].tobytes())
        self.used = parts.blocks.used_bits()
        self.damage = ""
        self.reachable: dict[int, bytes] = {}
        self.keyed: dict[int, bytes] = {}
        try:
            self.reachable = parts.keys.reachable()
            for start in parts.blocks.live_starts():
                if parts.keys.is_keyed(start):
                    self.keyed[start] = parts.keys.key_of(start)
            for start in parts.blocks.live_starts():
                parts.blocks.record(start)
            self.claims = [claim for _, claim in parts.claims.all()]
            self.raw: RawState | None = RawState(parts)
        except DamagedPoolError as error:
            self.raw = None
            self.damage = str(error)


def check(evidence: Evidence) -> list[Violation]:
    """Every invariant that does not hold; an empty list when the pool is right."""
    raw = evidence.raw
    if raw is None:
        return [Violation(2, evidence.damage)]
    live = raw.allocations()
    return [
        *_check_table(evidence, live),
        *_check_blocks(evidence, raw, live),
        *_check_owners(raw, live),
        *_check_leases(raw, live),
        *_check_generations(raw, live),
        *_check_queue(evidence, raw),
        *_check_streams(raw, live),
        *_check_keys(evidence, raw, live),
    ]


def _check_table(evidence: Evidence, live: list[Allocation]) -> list[Violation]:
    """Invariant 1: the list of live allocations names those that there are, each once."""
    words = memoryview(evidence.states).cast("Q")
    there = {block for block, state in enumerate(words.tolist()) if state}
    listed = [allocation.start_block for allocation in live]
    if sorted(there) == listed:
        return []
    wrong = sorted(there.symmetric_difference(listed)) or listed
    return [
        Violation(
            1,
            f"the table has {len(there)} allocations, the list names {len(listed)}: they differ "
            f"at block {wrong[0]}",
        )
    ]


def _check_blocks(evidence: Evidence, raw: RawState, live: list[Allocation]) -> list[Violation]:
    """Invariants 1 and 2: the table, the bitmap and the free count agree."""
    violations = []
    config, words = raw.parts.config, raw.words
    total = config.total_blocks
    bits = 0
    behind = 0
    for allocation in live:
        start, record = allocation.start_block, allocation.record
        if start < behind:
            violations.append(Violation(1, f"block {start} is in two allocations"))
        behind = max(behind, start + record.num_blocks)
        bits |= ((1 << record.num_blocks) - 1) << start
        if not 0 < record.num_tokens <= record.num_blocks * config.block_size:
            violations.append(
                Violation(2, f"{_name(allocation)} claims {record.num_tokens} tokens")
            )
    if evidence.used != bits:
        wrong = evidence.used ^ bits
        first = (wrong & -wrong).bit_length() - 1
        violations.append(
            Violation(
                1,
                f"bitmap and table differ in {wrong.bit_count()} blocks, the first is "
                f"{first}: the bitmap says {'used' if evidence.used >> first & 1 else 'free'}",
            )
        )
    free = total - bits.bit_count()
    if free != words[H_FREE_BLOCKS]:
        violations.append(
            Violation(1, f"{free} blocks are free, the count says {words[H_FREE_BLOCKS]}")
        )
    if words[H_CURSOR] >= total:
        violations.append(Violation(2, "the cursor is outside of the pool"))
    return violations


def _check_owners(raw: RawState, live: list[Allocation]) -> list[Violation]:
    """Invariant 3: somebody, or a deadline, will give every block back."""
    violations = []
    people = raw.people()
    for allocation in live:
        record = allocation.record
        state = STATES[record.state]
        owner = ParticipantId.of(record.owner)
        if state is State.RESERVED and owner not in people:
            violations.append(
                Violation(3, f"{_name(allocation)} belongs to nobody: {owner} is not there")
            )
        has_deadline = raw.words[H_UNCLAIMED] or record.readers_left >= UNBOUNDED
        if state is State.PUBLISHED and (record.readers_left < 1 or not has_deadline):
            violations.append(
                Violation(3, f"{_name(allocation)} has neither readers to come nor a deadline")
            )
        if state in (State.LEASED, State.DRAINING) and record.leases == 0:
            violations.append(Violation(3, f"{_name(allocation)} has no lease that would end it"))
    return violations


def _check_leases(raw: RawState, live: list[Allocation]) -> list[Violation]:
    """Invariant 3 for leases: each belongs to a living allocation that counts it."""
    violations = []
    counts: dict[int, int] = {}
    announced: dict[int, int] = {}
    records = {allocation.start_block: allocation.record for allocation in live}
    people = raw.people()
    for slot, lease in raw.leases():
        counts[lease.start_block] = counts.get(lease.start_block, 0) + 1
        if lease.kind == ANNOUNCED:
            announced[lease.start_block] = announced.get(lease.start_block, 0) + 1
        record = records.get(lease.start_block)
        if record is None or record.generation != lease.generation:
            violations.append(
                Violation(
                    3, f"lease {slot} is of generation {lease.generation}, which is not there"
                )
            )
        holder = ParticipantId.of(lease.holder)
        if holder not in people:
            violations.append(Violation(3, f"lease {slot} belongs to nobody: {holder}"))
    for allocation in live:
        counted, there = allocation.record.leases, counts.get(allocation.start_block, 0)
        if counted != there:
            violations.append(
                Violation(3, f"{_name(allocation)} counts {counted} leases, {there} are open")
            )
        expected = announced.get(allocation.start_block, 0)
        if expected != allocation.announced:
            violations.append(
                Violation(
                    3,
                    f"{_name(allocation)} counts {allocation.announced} readers by name who have "
                    f"not come, there are {expected}",
                )
            )
        if expected and not raw.words[H_UNCLAIMED]:
            violations.append(Violation(3, f"{_name(allocation)} waits for a reader without end"))
    return violations


def _check_generations(raw: RawState, live: list[Allocation]) -> list[Violation]:
    """Invariant 4: a generation is handed out once."""
    violations = []
    seen: set[int] = set()
    following = raw.words[H_NEXT_GENERATION]
    for allocation in live:
        generation = allocation.record.generation
        if generation in seen or not 0 < generation < following:
            violations.append(Violation(4, f"{_name(allocation)}: its generation is not its own"))
        seen.add(generation)
    return violations


def _check_queue(evidence: Evidence, raw: RawState) -> list[Violation]:
    """Invariant 5: nobody waits while what it waits for is there."""
    violations = []
    counted = raw.words[H_WAITERS]
    if len(raw.waiters) != counted:
        violations.append(Violation(5, f"{len(raw.waiters)} wait, the count says {counted}"))
    people = raw.people()
    for waiter in raw.waiters:
        who = people.get(ParticipantId.of(waiter.who))
        if who is None or not who.is_alive:
            continue
        unseen = raw.now_ns - max(waiter.since_ns, waiter.polled_ns)
        longest = longest_zeros(evidence.used, raw.parts.config.total_blocks)
        if waiter.num_blocks <= longest and unseen > SLOW_NS:
            violations.append(
                Violation(
                    5,
                    f"{who} waits for {waiter.num_blocks} blocks, {longest} are there, and it has "
                    f"not polled for {unseen / 1e9:.1f} s",
                )
            )
        break
    return violations


def _check_streams(raw: RawState, live: list[Allocation]) -> list[Violation]:
    """Invariant 3 for what streams give back: it is counted, or nobody would check."""
    pending = sum(bool(lease.pending) for _, lease in raw.leases())
    settling = sum(STATES[allocation.record.state] is State.SETTLING for allocation in live)
    counts = (raw.words[H_PENDING], raw.words[H_SETTLING])
    if counts == (pending, settling):
        return []
    return [
        Violation(
            3,
            f"{pending} leases and {settling} allocations wait for a stream, the counts say "
            f"{counts[0]} and {counts[1]}",
        )
    ]


def _check_keys(evidence: Evidence, raw: RawState, live: list[Allocation]) -> list[Violation]:
    """Invariant 6: a key is reachable exactly while its allocation is published under it; one
    allocation for each key; a claim has an owner."""
    violations = []
    if evidence.reachable != evidence.keyed:
        wrong = sorted(set(evidence.reachable.items()) ^ set(evidence.keyed.items()))
        violations.append(
            Violation(
                6,
                f"the index reaches {len(evidence.reachable)} entries, the table has "
                f"{len(evidence.keyed)}: they differ at block {wrong[0][0]}",
            )
        )
    if len(set(evidence.keyed.values())) != len(evidence.keyed):
        violations.append(Violation(6, "two allocations have the same key"))
    if raw.words[H_ENTRIES] != len(evidence.keyed):
        violations.append(
            Violation(6, f"{len(evidence.keyed)} entries, the count says {raw.words[H_ENTRIES]}")
        )
    readable = (State.PUBLISHED, State.LEASED)
    for allocation in live:
        is_keyed = allocation.start_block in evidence.keyed
        if is_keyed and STATES[allocation.record.state] not in readable:
            violations.append(Violation(6, f"{_name(allocation)} is under a key"))
    people = raw.people()
    violations += [
        Violation(6, "a claim belongs to nobody")
        for claim in evidence.claims
        if ParticipantId.of(claim.owner) not in people
    ]
    return violations


def _name(allocation: Allocation) -> str:
    return f"the {STATES[allocation.record.state]} allocation at block {allocation.start_block}"
