"""The byte layout of a segment, drawn once and computed nowhere else.

    offset
    0           header        identity words, control words (below)            4 KiB
    4096        config        length, then the msgspec-encoded PoolConfig      16 KiB
    journal     journal       the change that is being committed               `journal_bytes`
    participants[place]       who is attached                                  128 B a place
    waiters[slot]             who waits for blocks, in order of arrival        64 B a slot
    leases[slot]              open leases                                      64 B a slot
    records[block]            the allocation that starts at this block         160 B a block
    bitmap                    one bit a block, 1 = in an allocation            8 B per 64 blocks
    aux[block]                int32[16], the user's                            64 B a block
    field 0 [total_tokens, *shape]
    field 1 ...               each region starts on a page

Of a pool in CUDA memory the segment ends behind aux, and the fields lie, drawn as here but from 0,
in one CUDA allocation of `device_bytes`.

Everything before `aux` is the *ledger*: written under the pool's lock, and only through the
journal, but for the single words that say so. All words are 64-bit, native (little-endian), 8-byte
aligned.

The first 64 bytes of the header and the bytes that participants lock (filelock.py) are the same in
every layout version, so that any version can tell whether a pool is one, and whether it is in use.

    header words                            record words (`Record` in this order)
    0   magic "SHMBLKS\\0"                    0   state (`states.State`)
    1   layout version                      1   generation
    2   pool id                             2   num_blocks
    3   segment bytes                       3   num_tokens
    4   created, monotonic ns               4   owner, a participant word
    8   removed (1: its name is gone)       5   readers left: leases yet to be opened
    9   lock holder, place + 1              6   leases: open now
    16  cursor: where the search goes on    7   created, monotonic ns
    17  next generation                     8   published, monotonic ns
    18  free blocks                         9   ready: generation, written in stream order
    19  next incarnation                    10  key, 2 words (lookup by content)
    20  unclaimed: earliest time at which   12  request id, 64 bytes, a Pascal string
        published blocks may be
        reclaimed, monotonic ns, 0: none
    24  next ticket of the waiting line     waiter words
    25  waiters: how many are in the line   0   ticket, 0: free
    26  pending: leases that were released  1   who waits, a participant word
        on a stream that has not got there  2   blocks that it waits for
    27  settling: allocations given back    3   (free)
        while their owner's stream works
    128 device: 0 none, 1 CUDA memory is    4   since when it waits, monotonic ns
        exported, 2 its creator has left    5   when it last looked, monotonic ns
    129 creator of the CUDA memory          6   request id, 16 bytes, a Pascal string
    130 its GPU's UUID, 2 words
    132 IPC handle, 8 words

    lease words                             participant words
    0   generation of its allocation, 0: free   0   incarnation, 0: free
    1   start block                         1   pid, as its own pid namespace counts
    2   holder, a participant word          2   pid namespace, inode number
    3   kind (1 reads, 2 writes)            3   process start time, clock ticks since boot
    4   opened, monotonic ns                4   attached, monotonic ns
    5   acknowledged: generation,           5   flags (1: created the pool, 2: uses a GPU,
        written in stream order                 4: has the pool's CUDA memory)
    6   pending: 1 when released, until     6   doorbell: counts its turns in the waiting
        it is acknowledged                      line (futex word)
                                            7   bytes of the segment registered with CUDA
                                            8   role, 32 bytes, a Pascal string

A *participant word* is `incarnation << 16 | place`: the place alone would be wrong once a place is
used again.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from shmblocks.config import PoolConfig

MAGIC = int.from_bytes(b"SHMBLKS\0", "little")
QUEUE_MAGIC = int.from_bytes(b"SHMBLKQ\0", "little")
LAYOUT_VERSION = 2

PAGE = 4096
WORD = 8
HEADER_BYTES = 4096
CONFIG_BYTES = 16384

# Header words.
H_MAGIC = 0
H_VERSION = 1
H_POOL_ID = 2
H_SEGMENT_BYTES = 3
H_CREATED = 4
H_REMOVED = 8
H_LOCK_HOLDER = 9
H_CURSOR = 16
H_NEXT_GENERATION = 17
H_FREE_BLOCKS = 18
H_NEXT_INCARNATION = 19
H_UNCLAIMED = 20
H_NEXT_TICKET = 24
H_WAITERS = 25
H_PENDING = 26
H_SETTLING = 27
H_DEVICE_STATE = 128

IDENTITY = struct.Struct("=5Q")
# cursor, next generation, free blocks: one store of the journal, since they change together.
ALLOCATION_HEAD = struct.Struct("=3Q")
WORD_STRUCT = struct.Struct("=Q")
# The header's device region: state, creator, UUID, IPC handle.
DEVICE = struct.Struct("=2Q16s64s")

RECORD = struct.Struct("=12Q64p")
# The words of a record that change after it was made; `ready`, which a GPU may write at any time,
# lies behind them.
RECORD_HEAD = struct.Struct("=9Q")
R_CREATED = 7
R_READY = 9
# In `ready`: the owner died before it was ready. Bit 62, since a stream compares by the sign of a
# 64-bit difference: with bit 63 set it would wait on.
FAILED = 1 << 62
RECORD_HEAD_WORDS = RECORD_HEAD.size // WORD
RECORD_WORDS = RECORD.size // WORD
REQUEST_ID_BYTES = 63

LEASE = struct.Struct("=8Q")
LEASE_WORDS = LEASE.size // WORD
L_ACKNOWLEDGED = 5
L_PENDING = 6

PARTICIPANT = struct.Struct("=8Q32p32x")
PARTICIPANT_WORDS = PARTICIPANT.size // WORD
ROLE_BYTES = 31

P_FLAGS = 5
# Word of a participant's record that its waiters sleep on.
P_DOORBELL = 6
P_PINNED = 7

WAITER = struct.Struct("=6Q16p")
W_LOOKED = 5
WAITER_WORDS = WAITER.size // WORD
# Threads and coroutines, over all processes, that can wait for blocks at once.
MAX_WAITERS = 256

AUX_BYTES = 64


class Record(NamedTuple):
    """The record of one allocation, as the words above."""

    state: int
    generation: int
    num_blocks: int
    num_tokens: int
    owner: int
    readers_left: int
    leases: int
    created_ns: int
    published_ns: int
    ready: int
    key_low: int
    key_high: int
    req_id: bytes


class LeaseRecord(NamedTuple):
    """One open lease, as the words above."""

    generation: int
    start_block: int
    holder: int
    kind: int
    opened_ns: int
    acknowledged: int
    pending: int
    spare: int


class WaiterRecord(NamedTuple):
    """One place in the waiting line, as the words above."""

    ticket: int
    who: int
    num_blocks: int
    spare: int
    since_ns: int
    looked_ns: int
    req_id: bytes


def _page_up(offset: int) -> int:
    return -(-offset // PAGE) * PAGE


class Layout:
    """Offsets in bytes of every region, computed from the config alone."""

    def __init__(self, config: PoolConfig) -> None:
        blocks = config.total_blocks
        self.total_blocks = blocks
        self.bitmap_bytes = -(-blocks // 64) * WORD
        # Room for the largest change: the whole bitmap, one record, a few words.
        self.journal_bytes = self.bitmap_bytes + 2048
        self.journal = HEADER_BYTES + CONFIG_BYTES
        self.participants = _page_up(self.journal + self.journal_bytes)
        self.waiters = _page_up(self.participants + config.max_participants * PARTICIPANT.size)
        self.leases = _page_up(self.waiters + MAX_WAITERS * WAITER.size)
        self.records = _page_up(self.leases + config.max_leases * LEASE.size)
        self.bitmap = _page_up(self.records + blocks * RECORD.size)
        self.aux = _page_up(self.bitmap + self.bitmap_bytes)
        self.ledger_bytes = self.aux
        offset = _page_up(self.aux + blocks * AUX_BYTES)
        self.fields: dict[str, int] = {}
        self.segment_bytes = offset
        if config.is_on_gpu:
            offset = 0
        for field in config.fields:
            self.fields[field.name] = offset
            offset = _page_up(offset + config.total_tokens * field.token_bytes)
        if config.is_on_gpu:
            self.device_bytes = max(offset, PAGE)
        else:
            self.device_bytes = 0
            self.segment_bytes = offset

    def record_word(self, block: int) -> int:
        """Index of the first word of a block's record."""
        return self.records // WORD + block * RECORD_WORDS

    def ready_word(self, block: int) -> int:
        """Index of the word that a producer's stream writes."""
        return self.record_word(block) + R_READY

    def acknowledged_word(self, slot: int) -> int:
        """Index of the word that a reader's stream writes."""
        return self.lease_word(slot) + L_ACKNOWLEDGED

    def lease_word(self, slot: int) -> int:
        """Index of the first word of a lease slot."""
        return self.leases // WORD + slot * LEASE_WORDS

    def waiter_word(self, slot: int) -> int:
        """Index of the first word of a place in the waiting line."""
        return self.waiters // WORD + slot * WAITER_WORDS

    def doorbell_word(self, place: int) -> int:
        """Index of the word that a participant's waiters sleep on."""
        return self.participant_word(place) + P_DOORBELL

    def participant_word(self, place: int) -> int:
        """Index of the first word of a participant's place."""
        return self.participants // WORD + place * PARTICIPANT_WORDS
