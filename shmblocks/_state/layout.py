"""The byte layout of a segment, drawn once and computed nowhere else.

    offset
    0           header        identity words, control words (below)            4 KiB
    4096        config        length, then the msgspec-encoded PoolConfig      16 KiB
    20480       counters      what has been done so far (`counters.py`)        4 KiB
    journal     journal       the change that is being committed               `journal_bytes`
    participants[slot]        who is attached                                  128 B a slot
    waiters[slot]             who waits for blocks, in order of arrival        64 B a slot
    leases[slot]              open leases                                      160 B a slot
    claims[slot]              keys that somebody is encoding                   64 B a slot
    channels[n]               the ends of one message ring                     256 B a channel
    messages[slot]            the slots of all message rings                   96 B a slot
    records[block]            the allocation that starts at this block         256 B a block
    live[i]                   start blocks of all allocations, in no order     8 B a block
    buckets[hash]             first entry whose key has this hash              8 B a block
    bitmap                    one bit a block, 1 = in an allocation            8 B per 64 blocks
    aux[block]                int32[16], the user's                            64 B a block
    field 0 [total_tokens, *shape]
    field 1 ...               each region starts on a page

Of a pool in CUDA memory the segment ends behind aux, and the fields lie, drawn as here but from 0,
in one CUDA allocation of `device_bytes`.

Everything before `aux` is the *state*: written under the pool's lock, and only through the journal,
but for the single words that say so. All words are 64-bit, native (little-endian), 8-byte aligned.

The first 64 bytes of the header and the bytes that participants lock (filelock.py) are the same in
every layout version, so that any version can tell whether a pool is one, and whether it is in use.

    header words                            record words (`Record` in this order)
    0   magic "SHMBLKS\\0"                   0   state (`states.State`)
    1   layout version                      1   generation
    2   pool id                             2   num_blocks
    3   segment bytes                       3   num_tokens
    4   created, monotonic ns               4   owner, a participant word
    8   removed (1: its name is gone)       5   readers left: leases yet to be opened
    9   lock holder, slot + 1               6   leases: open now
    10  kept for a lock word, 2 words       7   created, monotonic ns
    12  clock offset of the creator's       8   published, monotonic ns
        time namespace, ns                  9   ready: generation, written in stream order
    16  cursor: where the search goes on    10  index in `live`
    17  next generation                     11  is keyed (1: the key below is entered)
    18  free blocks                         12  key, 4 words (16 bytes: the last two are 0)
    19  live: allocations that there are    16  next in the chain of its bucket, block + 1
    20  next incarnation                    17  hold: not evicted before, monotonic ns
    21  unclaimed: earliest time at which   18  used: last hit, monotonic ns (a hint)
        published blocks may be             19  hits (a hint)
        reclaimed, monotonic ns, 0: none    20  trace: W3C trace id 2 words, span id
    22  pending: leases that were released  23  announced: leases of kind 3 on it
        on a stream that has not got there  24  request id, 64 bytes, a Pascal string
    23  settling: allocations given back
        while their owner's stream works    waiter words
    24  next place of the wait queue        0   place, 0: free
    25  waiters: how many are in the queue  1   who waits, a participant word
    26  changes of the key index            2   blocks that it waits for
    28  epoch of the keys
    29  entries: allocations under a key    3   (free)
    30  channels that there are             4   since when it waits, monotonic ns
    31  message slots that are taken        5   when it last polled, monotonic ns
    128 device: 0 none, 1 CUDA memory is    6   request id, 16 bytes, a Pascal string
        exported, 2 its creator has left
    129 creator of the CUDA memory          participant words
    130 its GPU's UUID, 2 words             0   incarnation, 0: free
    132 IPC handle, 8 words                 1   pid, as its own pid namespace counts
    144 peers of node servers (below)       2   pid namespace, inode number
    lease words                             3   process start time, clock ticks since boot
    0   generation of its allocation,       4   attached, monotonic ns
        0: free                             5   flags (1: created the pool, 2: uses a GPU,
    1   start block                             4: has the pool's CUDA memory, 8: compiled core)
    2   holder, a participant word          6   wake word: counts how often its waiters were
    3   kind (1 reads, 2 writes,                woken (futex word)
        3 announced to its holder alone,    7   bytes of the segment registered with CUDA
        4 that, and it has come: reads)
    4   opened, or announced, monotonic ns  8   role, 64 bytes, a Pascal string
    5   acknowledged: generation,
        written in stream order             claim words
    6   pending: 1 when released, until     0   owner, a participant word, 0: free
        it is acknowledged                  1   since when, monotonic ns
    7   ticket: number of the ticket that   2   key, 4 words
        carries it, 0: none                 6   wake word: counts the claims that ended here
    8   channel + 1 that it came by, if a   7   asleep: how many wait for the end
        dead receiver's message goes back
    9   length of that message              channel words
    10  the message, 64 bytes               0   capacity, 0: free
    18  number of that message, 1 (free)    1   first message slot
                                            2   redeliver (1: the messages of the dead go back)
    message words                           8   name, 64 bytes, a Pascal string
    0   start block                         16  head: messages taken so far (futex word)
    1   generation, 0: none                 17  senders asleep on head
    2   length of the message               24  tail: messages sent so far
    4   the message, 64 bytes               25  receivers asleep on arrivals
                                            26  arrivals: counts messages that
                                                came (futex word)

    peer words (in the header, from word 144 on: 32 rows of 8 words)
    0   owner, a participant word (a node server), 0: free        2   fetches that were confirmed
    1   connected since, monotonic ns                             3   bytes that were sent
    4   address of the reader, 32 bytes, a Pascal string

A *participant word* is `incarnation << 16 | slot`: the slot alone would be wrong once a slot is
used again.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from shmblocks.config import PoolConfig

MAGIC = int.from_bytes(b"SHMBLKS\0", "little")
QUEUE_MAGIC = int.from_bytes(b"SHMBLKQ\0", "little")
LAYOUT_VERSION = 3

PAGE = 4096
WORD = 8
HEADER_BYTES = 4096
CONFIG_BYTES = 16384
COUNTER_BYTES = 4096

# Header words.
H_VERSION = 1
H_CREATED = 4
H_REMOVED = 8
H_LOCK_HOLDER = 9
H_CLOCK_OFFSET = 12
H_CURSOR = 16
H_NEXT_GENERATION = 17
H_FREE_BLOCKS = 18
H_LIVE = 19
H_NEXT_INCARNATION = 20
H_UNCLAIMED = 21
H_PENDING = 22
H_SETTLING = 23
H_NEXT_PLACE = 24
H_WAITERS = 25
H_EPOCH = 28
H_ENTRIES = 29
H_INDEX_CHANGES = 26
H_CHANNELS = 30
H_MESSAGE_SLOTS = 31
H_DEVICE_STATE = 128
H_PEERS = 144

IDENTITY = struct.Struct("=5Q")
# cursor, next generation, free blocks, live: one store of the journal, since they change together.
ALLOCATION_HEAD = struct.Struct("=4Q")
WORD_STRUCT = struct.Struct("=Q")
# The header's device region: state, creator, UUID, IPC handle.
DEVICE = struct.Struct("=2Q16s64s")

RECORD = struct.Struct("=12Q32s8Q64p")
# The words of a record that change after it was made; `ready`, which a GPU may write at any time,
# lies behind them.
RECORD_HEAD = struct.Struct("=9Q")
# The words that every operation reads (`Record`).
RECORD_BODY = struct.Struct("=12Q")
# The words of an entry, from `is keyed` on: keyed, key, chain, hold, used, hits.
ENTRY = struct.Struct("=Q32s4Q")
# The words up to `ready`: what tells who holds it and whether it is complete.
RECORD_READY = struct.Struct("=10Q")
R_STATE = 0
R_GENERATION = 1
R_NUM_BLOCKS = 2
R_READERS_LEFT = 5
R_LEASES = 6
R_CREATED = 7
R_PUBLISHED = 8
R_READY = 9
R_LIVE_INDEX = 10
R_KEYED = 11
R_KEY = 12
R_CHAIN = 16
R_HOLD = 17
R_USED = 18
R_HITS = 19
R_TRACE = 20
TRACE_BYTES = 24
R_ANNOUNCED = 23
R_REQUEST_ID = 24
# In `ready`: the owner died before it was ready. Bit 62, since a stream compares by the sign of a
# 64-bit difference: with bit 63 set it would wait on.
FAILED = 1 << 62
RECORD_HEAD_WORDS = RECORD_HEAD.size // WORD
RECORD_WORDS = RECORD.size // WORD
REQUEST_ID_BYTES = 63
KEY_BYTES = 32

# `readers left` of an allocation that any number of readers may open; only `free` or eviction ends
# it. Larger than any number of readers that can be announced, smaller than half a word.
UNBOUNDED = 1 << 48
# Readers that one publish may name. All of them are one commit, which must fit the journal
# (96 bytes each). Larger: a larger journal.
MOST_NAMED_READERS = 32

LEASE = struct.Struct("=10Q64s2Q")
# What is written when a lease is opened; the rest is the message of a channel.
LEASE_HEAD = struct.Struct("=10Q")
LEASE_WORDS = LEASE.size // WORD
# The words of the channel that a lease came by: channel + 1, length, the message, its number.
LEASE_CHANNEL = struct.Struct("=2Q64sQ")
L_CHANNEL = 8
L_OPENED = 4
L_ACKNOWLEDGED = 5
L_PENDING = 6

PARTICIPANT = struct.Struct("=8Q64p")
PARTICIPANT_WORDS = PARTICIPANT.size // WORD
ROLE_BYTES = 63

P_FLAGS = 5
# Word of a participant's record that its waiters sleep on.
P_WAKE = 6
P_PINNED = 7

WAITER = struct.Struct("=6Q16p")
W_POLLED = 5
WAITER_WORDS = WAITER.size // WORD
WAITER_REQUEST_ID_BYTES = 15

CLAIM = struct.Struct("=2Q32s2Q")
CLAIM_WORDS = CLAIM.size // WORD

PEER = struct.Struct("=4Q32p")
PEER_WORDS = PEER.size // WORD
# Peers that can be seen at once. More: they are served, and not shown.
PEER_ROWS = 32

CHANNEL_BYTES = 256
CHANNEL_WORDS = CHANNEL_BYTES // WORD
C_CAPACITY = 0
C_FIRST_SLOT = 1
C_REDELIVER = 2
C_NAME = 8
C_HEAD = 16
C_SENDERS_ASLEEP = 17
C_TAIL = 24
C_RECEIVERS_ASLEEP = 25
C_ARRIVALS = 26

MESSAGE_BYTES = 96
MESSAGE_WORDS = MESSAGE_BYTES // WORD
M_START_BLOCK = 0
M_GENERATION = 1
M_LENGTH = 2
M_DATA = 4
MOST_MESSAGE_BYTES = 64
# Slots that a ring has beyond its capacity: room for messages of dead receivers that go back to the
# front, also when senders have filled it.
SPARE_SLOTS = 16

# Words of a queue's header.
Q_HEAD = 16
Q_TAIL = 17
Q_GETTERS_ASLEEP = 18
Q_PUTTERS_ASLEEP = 19

AUX_BYTES = 64


class Record(NamedTuple):
    """The record of one allocation: its first twelve words."""

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
    live_index: int
    keyed: int


class LeaseRecord(NamedTuple):
    """One open lease, as the words above."""

    generation: int
    start_block: int
    holder: int
    kind: int
    opened_ns: int
    acknowledged: int
    pending: int
    ticket: int
    channel: int
    message_length: int


class WaiterRecord(NamedTuple):
    """One slot of the wait queue, as the words above."""

    place: int
    who: int
    num_blocks: int
    spare: int
    since_ns: int
    polled_ns: int
    req_id: bytes


def _page_up(offset: int) -> int:
    return -(-offset // PAGE) * PAGE


class Layout:
    """Offsets in bytes of every region, computed from the config alone."""

    def __init__(self, config: PoolConfig) -> None:
        blocks = config.total_blocks
        self.total_blocks = blocks
        self.counters = HEADER_BYTES + CONFIG_BYTES
        self.bitmap_bytes = -(-blocks // 64) * WORD
        # The largest change: the whole bitmap, some records, a message to every channel.
        self.journal_bytes = self.bitmap_bytes + 4096 + config.channels * 256
        self.journal = self.counters + COUNTER_BYTES
        self.participants = _page_up(self.journal + self.journal_bytes)
        self.max_waiters = config.max_waiters
        self.waiters = _page_up(self.participants + config.max_participants * PARTICIPANT.size)
        self.leases = _page_up(self.waiters + config.max_waiters * WAITER.size)
        self.claims = _page_up(self.leases + config.max_leases * LEASE.size)
        self.channels = _page_up(self.claims + config.max_claims * CLAIM.size)
        self.messages = self.channels + config.channels * CHANNEL_BYTES
        self.records = _page_up(self.messages + config.channel_slots * MESSAGE_BYTES)
        self.live = _page_up(self.records + blocks * RECORD.size)
        self.buckets = _page_up(self.live + blocks * WORD)
        self.bitmap = _page_up(self.buckets + blocks * WORD)
        self.aux = _page_up(self.bitmap + self.bitmap_bytes)
        self.state_bytes = self.aux
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
        """Index of the first word of a slot of the wait queue."""
        return self.waiters // WORD + slot * WAITER_WORDS

    def wake_word(self, slot: int) -> int:
        """Index of the word that a participant's waiters sleep on."""
        return self.participants // WORD + slot * PARTICIPANT_WORDS + P_WAKE

    def live_word(self, index: int) -> int:
        """Index of a word of the list of live allocations."""
        return self.live // WORD + index


class QueueLayout:
    """Offsets in bytes of a queue's segment.

    0        header   words 0-4, 8, 9, 20 as in a pool; and
                      16 head: messages taken so far    18 getters asleep on `tail`
                      17 tail: messages put so far      19 putters asleep on `head`
                      24 capacity                       25 bytes per message
    4096     journal
    8192     participants[slot]
    slots    slot k: length (8 bytes), then the message; it holds message number n when
             n % capacity == k
    """

    PARTICIPANTS = 256

    def __init__(self, capacity: int, message_bytes: int) -> None:
        self.capacity = capacity
        self.journal = HEADER_BYTES
        self.journal_bytes = PAGE
        self.participants = self.journal + PAGE
        self.slots = self.participants + self.PARTICIPANTS * PARTICIPANT.size
        self.slot_bytes = WORD + -(-message_bytes // WORD) * WORD
        self.state_bytes = self.slots
        self.segment_bytes = self.slots + capacity * self.slot_bytes
