"""What can be seen of a pool or a queue, as plain values of one moment.

These structs are what `stats()`, `allocations()` and the other looking methods give, and what the
command line prints. They hold no reference to the segment. Every age is in seconds.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import msgspec

from shmblocks._state.states import State

_SLOT_BITS = 16


class ParticipantId(NamedTuple):
    """One attached process: a slot of the pool, and which of the slot's users in turn."""

    slot: int
    incarnation: int

    @property
    def word(self) -> int:
        """As it stands in records and leases; 0 is nobody."""
        return self.incarnation << _SLOT_BITS | self.slot

    @classmethod
    def of(cls, word: int) -> ParticipantId:
        """The participant that a word names."""
        return cls(word & ((1 << _SLOT_BITS) - 1), word >> _SLOT_BITS)


class ParticipantInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one participant.

    `pid` is its pid in the pid namespace with the inode number `pid_namespace`; `age_seconds`:
    since it attached; `has_device_memory`: it has the pool's CUDA memory open; `pinned_bytes`: how
    much of the segment it has registered with CUDA; `has_core`: it uses the compiled core.
    """

    slot: int
    incarnation: int
    pid: int
    pid_namespace: int
    is_alive: bool
    is_self: bool
    is_creator: bool
    age_seconds: float
    role: str
    uses_gpu: bool = False
    has_device_memory: bool = False
    pinned_bytes: int = 0
    has_core: bool = False

    def __str__(self) -> str:
        role = f", {self.role}" if self.role else ""
        dead = "" if self.is_alive else ", dead"
        return f"participant {self.slot} (pid {self.pid}{role}{dead})"


class LeaseInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One open lease; `holder` is None when nothing is recorded of its process any more.

    `kind` is `announced` when it is its holder's alone, which has not opened it yet.
    `is_pending`: it was released on a stream that has not got there yet.
    """

    holder_id: ParticipantId
    holder: ParticipantInfo | None
    kind: Literal["reads", "writes", "announced"]
    age_seconds: float
    is_pending: bool = False


class AllocationInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One allocation; `owner` is None when nothing is recorded of its process any more."""

    start_block: int
    num_blocks: int
    num_tokens: int
    generation: int
    state: State
    owner_id: ParticipantId
    owner: ParticipantInfo | None
    req_id: str
    age_seconds: float
    readers_left: int
    leases: list[LeaseInfo]


class WaiterInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One thread or coroutine in the wait queue for blocks, in order of arrival.

    `seconds_since_poll`: since it last looked whether it can be served; a stopped one does not.
    """

    participant_id: ParticipantId
    participant: ParticipantInfo | None
    num_blocks: int
    req_id: str
    age_seconds: float
    seconds_since_poll: float


class HistogramValues(msgspec.Struct, frozen=True, kw_only=True):
    """Durations that were counted.

    `buckets[i]`: how many took less than 2**i us, and at least half of that; the last one has all
    that took longer.
    """

    count: int
    sum_seconds: float
    buckets: list[int]

    def bound(self, share: float) -> float:
        """Seconds below which at least that share of all is; infinity: it is in the last bucket."""
        total = 0
        for number, count in enumerate(self.buckets[:-1]):
            total += count
            if total >= share * self.count:
                return (1 << number) / 1e6
        return math.inf


class CounterValues(msgspec.Struct, frozen=True, kw_only=True):
    """What all processes, the dead included, have done since the pool was made.

    `releases`: leases that were ended by their holder; `alloc_timeouts`: waits for blocks that
    ended without; `lock_takeovers`: changes that a process left half made (it died, or was
    interrupted) and another one completed. The words of the cache are those of `CacheStats`.

    Between nodes, of the servers of this pool: `node_reads` that readers have confirmed, their
    `node_sent_bytes`; `node_given_back`: begun, and left to be fetched again; `node_refusals`:
    questions answered with an error; `node_turned_away`: connections without the key, or too many.
    Of those who fetch into this pool: `node_fetches`, `node_received_bytes`, `node_failures`;
    `node_quarantined`: blocks that were kept apart since bytes could still come into them.

    Histograms: `alloc_wait` from the call to the blocks, of those that had to wait;
    `publish_to_open` for each lease; `lock_held` of one in 64 sections under the pool's lock.
    """

    allocations: int
    publishes: int
    opens: int
    releases: int
    reaped_blocks: int
    alloc_timeouts: int
    lock_takeovers: int
    lookups: int
    hits: int
    misses: int
    mismatches: int
    puts: int
    duplicates: int
    evictions: int
    evicted_blocks: int
    skipped: int
    takeovers: int
    waits: int
    node_reads: int
    node_sent_bytes: int
    node_given_back: int
    node_refusals: int
    node_turned_away: int
    node_fetches: int
    node_received_bytes: int
    node_failures: int
    node_quarantined: int
    alloc_wait: HistogramValues
    publish_to_open: HistogramValues
    lock_held: HistogramValues


class PoolStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of one moment, and `counters` since the pool was made.

    free + reserved + published + leased + draining + settling = total blocks.

    `block_bytes`: of the fields, in one block; `largest_free_run`: the most free blocks in a row.
    Of the content cache: `entries` in `entry_blocks`, of which `pinned_entry_blocks` cannot be
    evicted now (leased, held, awaited or incomplete).

    Of the GPU: `device_state` is empty for a pool in host memory, else `exported`, `creator dead`
    or `creator left` (those who have the memory open go on, nobody else can open it);
    `device_openers`: living processes that have it open; `pinned_bytes`: registered with CUDA, over
    all living processes; `pending_leases`, `settling_allocations`: what streams are still to give
    back.

    `node_peers`: readers on other nodes that are connected to the pool's servers.
    """

    name: str
    pool_id: int
    size_bytes: int
    block_size: int
    block_bytes: int
    total_blocks: int
    free_blocks: int
    largest_free_run: int
    reserved_blocks: int
    published_blocks: int
    leased_blocks: int
    draining_blocks: int
    settling_blocks: int
    allocations: int
    leases: int
    participants: int
    dead_participants: int
    waiters: int
    next_generation: int
    age_seconds: float
    entries: int
    entry_blocks: int
    pinned_entry_blocks: int
    counters: CounterValues
    device: str = "cpu"
    device_bytes: int = 0
    device_state: Literal["", "exported", "creator left", "creator dead"] = ""
    device_openers: int = 0
    gpu_users: int = 0
    pinned_bytes: int = 0
    pending_leases: int = 0
    settling_allocations: int = 0
    node_peers: int = 0


class EntryInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the content cache. `hold_seconds`: it is not evicted before so long."""

    key: bytes
    num_blocks: int
    num_tokens: int
    leases: int
    hits: int
    hold_seconds: float
    age_seconds: float
    unused_seconds: float


class CacheStats(msgspec.Struct, frozen=True, kw_only=True):
    """The content cache at one moment, and what all processes have done since the pool was made.

    `mismatches`: lookups whose entry had another number of tokens, width or dtype; `duplicates`:
    puts of a key that was there; `skipped`: puts for which there was no room; `takeovers`: claims
    of the dead that another took over; `waits`: waits for somebody's claim.
    """

    epoch: int
    entries: int
    bytes_in_entries: int
    leased_entries: int
    held_entries: int
    claims: int
    lookups: int
    hits: int
    misses: int
    mismatches: int
    puts: int
    duplicates: int
    evictions: int
    evicted_bytes: int
    skipped: int
    takeovers: int
    waits: int


class Violation(msgspec.Struct, frozen=True):
    """An invariant that does not hold: its number in docs/design.md, and what was seen."""

    invariant: int
    message: str


class NodePeerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A reader on another node that is connected to a node server of the pool.

    `server_slot`: the participant that serves it; `fetched`: fetches that it has confirmed.
    """

    address: str
    server_slot: int
    age_seconds: float
    fetched: int
    sent_bytes: int


class PoolSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """All that there is to know of a pool, of one and the same moment."""

    stats: PoolStats
    allocations: list[AllocationInfo]
    participants: list[ParticipantInfo]
    waiters: list[WaiterInfo]
    peers: list[NodePeerInfo]


class ReapReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `reap()` gave back."""

    reservations: int = 0
    leases: int = 0
    unclaimed: int = 0
    blocks: int = 0
    participants: int = 0


class PoolSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One pool or queue in a listing.

    `state`: `alive`, `dead` (all its processes died: a leftover), `incompatible` (of another layout
    version, or damaged). `stats` is None when they cannot be read; `problem` says why. A queue has
    no stats, and its living processes in `participants`.
    """

    name: str
    size_bytes: int
    state: Literal["alive", "dead", "incompatible"]
    kind: Literal["pool", "queue"] = "pool"
    stats: PoolStats | None = None
    problem: str = ""
    participants: int = 0
