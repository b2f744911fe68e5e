"""The shared state of a queue: a ring of fixed slots in a segment of its own.

    offset
    0       header, words:  0-4 as in layout.py   8 removed   9 pid of the last lock holder
                            16 head: messages taken so far    18 getters asleep on `tail`
                            17 tail: messages put so far      19 putters asleep on `head`
                            24 capacity                       25 bytes per message
    4096    slot 0: length (8 bytes), then the message
            slot 1 ...      slot k holds message number n when n % capacity == k

Contract
- Order is FIFO over all putters. Every operation runs under the lock and has one store that commits
  it: of `tail` for a put, of `head` for a get. Killed before it, nothing happened; after it, a
  getter takes the messages that it had in hand with it, and nobody else notices.
- Lengths and counts read from the segment are checked before they are used.
- `asleep` counts may be too high (a sleeper died, or woke by itself and sleeps again), up to
  `MOST_ASLEEP`; each that is too many costs one needless system call of a later put or get, which
  counts it down. They are never too low.

What it does not do: wait, encode, or know what the messages mean.
"""

from __future__ import annotations

import os
import secrets
import struct
import time

from shmblocks._os.filelock import PLACE_BYTE, PLACE_BYTES
from shmblocks._os.futex import Futex
from shmblocks._os.segment import create_unnamed, normal_name, open_existing
from shmblocks._state.identity import Identity
from shmblocks._state.layout import (
    H_LOCK_HOLDER,
    H_REMOVED,
    HEADER_BYTES,
    IDENTITY,
    LAYOUT_VERSION,
    QUEUE_MAGIC,
    WORD,
)
from shmblocks._state.naming import anyone_lives, take_name
from shmblocks._state.shared_segment import SharedSegment
from shmblocks.errors import (
    IncompatiblePoolError,
    PoolClosedError,
    PoolNotFoundError,
    TooManyParticipantsError,
)

Q_HEAD = 16
Q_TAIL = 17
Q_GETTERS_ASLEEP = 18
Q_PUTTERS_ASLEEP = 19
_SIZES = struct.Struct("=2Q")
_SIZES_OFFSET = 24 * WORD

MAX_CAPACITY = 1 << 24
MAX_MESSAGE_BYTES = 1 << 20
LOCK_TIMEOUT = 30.0

FULL = -1

# What the counts of sleepers are held to: who wakes by itself and sleeps again is one too many.
# Larger: more needless system calls when a queue gets busy after it was idle. Smaller: with more
# threads than that asleep at once, some are woken only by their own clock.
MOST_ASLEEP = 1 << 12


class Ring(SharedSegment):
    """One queue's segment as one process sees it."""

    def __init__(
        self, fd: int, name: str, queue_id: int, capacity: int, message_bytes: int
    ) -> None:
        """Map the segment behind `fd` (which stays the caller's)."""
        super().__init__(fd, segment_bytes(capacity, message_bytes), name, LOCK_TIMEOUT)
        self.queue_id = queue_id
        self.capacity = capacity
        self.message_bytes = message_bytes
        self._slot_bytes = _slot_bytes(message_bytes)
        # Asked once: a section tells who is in it.
        self._pid = os.getpid()
        self.place = -1
        self.puts = Futex(self.segment.mapping, Q_TAIL * WORD)
        self.gets = Futex(self.segment.mapping, Q_HEAD * WORD)

    # ---- making and finding ------------------------------------------------------------------

    @classmethod
    def create(
        cls, name: str, capacity: int, message_bytes: int, group: str | None, made: list[Ring]
    ) -> None:
        """A new queue of that name; a dead leftover of the name is replaced.

        `made` gets it before anybody can see it: a caller that is interrupted leaves what is there.
        """
        name = normal_name(name)
        size = segment_bytes(capacity, message_bytes)
        with create_unnamed(size, name, group) as file:
            fd = file.fileno()
            queue_id = secrets.randbits(64)
            identity = IDENTITY.pack(
                QUEUE_MAGIC, LAYOUT_VERSION, queue_id, size, time.monotonic_ns()
            )
            os.pwrite(fd, identity, 0)
            os.pwrite(fd, _SIZES.pack(capacity, message_bytes), _SIZES_OFFSET)
            ring = cls(fd, name, queue_id, capacity, message_bytes)
            made.append(ring)
            ring.run(ring.take_place)
            take_name(fd, name, LOCK_TIMEOUT)

    @classmethod
    def attach(cls, name: str, made: list[Ring]) -> None:
        """The living queue of that name; `made` as above."""
        name = normal_name(name)
        with open_existing(name) as file:
            fd = file.fileno()
            identity = Identity(fd, name, QUEUE_MAGIC)
            capacity, message_bytes = _SIZES.unpack(os.pread(fd, _SIZES.size, _SIZES_OFFSET))
            if (
                not 1 <= capacity <= MAX_CAPACITY
                or not 1 <= message_bytes <= MAX_MESSAGE_BYTES
                or segment_bytes(capacity, message_bytes) != identity.size_bytes
            ):
                raise IncompatiblePoolError(f"queue {name}: its header is damaged")
            ring = cls(fd, name, identity.pool_id, capacity, message_bytes)
            made.append(ring)
            ring.run(ring.join)

    def join(self) -> None:
        """Under the lock: take part, if there is still something to take part in."""
        if self.segment.words[H_REMOVED] or not self.segment.has_name:
            raise PoolNotFoundError(f"queue {self.name}: it was removed just now")
        if not anyone_lives(self.locks):
            raise PoolNotFoundError(
                f"queue {self.name}: all its processes are dead, what is there is a leftover; the "
                "next `create` of that name replaces it"
            )
        self.take_place()

    def take_place(self) -> None:
        """Lock a byte that says, for as long as this process lives, that the queue is in use."""
        for place in range(PLACE_BYTES):
            if self.locks.try_lock(PLACE_BYTE + place):
                self.place = place
                return
        raise TooManyParticipantsError(f"queue {self.name}: {PLACE_BYTES} processes use it")

    def entered(self) -> None:
        self.segment.words[H_LOCK_HOLDER] = self._pid

    def describe_holder(self) -> str:
        return f"a process with pid {self.segment.words[H_LOCK_HOLDER]}"

    def forget_parent(self) -> None:
        self.place = -1
        self._pid = os.getpid()

    def _leave(self) -> None:
        """The last one removes the queue with what is in it."""
        if self.place >= 0 and not anyone_lives(self.locks):
            self.segment.words[H_REMOVED] = 1
            self.segment.unlink()
        self.drop()

    def drop(self) -> None:
        super().drop()
        self.puts.drop()
        self.gets.drop()

    # ---- without the lock --------------------------------------------------------------------

    @property
    def messages(self) -> int:
        """Messages in it, of this moment."""
        words = self.segment.words
        try:
            there: int = words[Q_TAIL] - words[Q_HEAD]
        except ValueError:  # released memory
            raise PoolClosedError(
                f"queue {self.name}: closed in this process; attach it again"
            ) from None
        return min(max(0, there), self.capacity)

    def has_message(self) -> bool:
        """Whether a get would not find it empty, as far as can be seen; True when closed."""
        words = self.segment.words
        try:
            return bool(words[Q_TAIL] != words[Q_HEAD])
        except ValueError:
            return True

    def has_room(self) -> bool:
        """Whether a put would not find it full, as far as can be seen; True when closed."""
        words = self.segment.words
        try:
            return bool(words[Q_TAIL] - words[Q_HEAD] != self.capacity)
        except ValueError:
            return True

    # ---- under the lock ----------------------------------------------------------------------

    def put(self, message: bytes) -> int:
        """Append a message; how many sleeping getters must be woken, or `FULL`."""
        words = self.segment.words
        tail: int = words[Q_TAIL]
        there: int = tail - words[Q_HEAD]
        if there == self.capacity:
            return FULL
        if not 0 <= there < self.capacity or tail == _LAST:
            raise self._damaged(f"it counts {there} messages in {self.capacity} slots")
        offset = HEADER_BYTES + tail % self.capacity * self._slot_bytes
        slot = len(message).to_bytes(WORD, "little") + message
        self.segment.memory[offset : offset + len(slot)] = slot
        words[Q_TAIL] = tail + 1
        asleep: int = words[Q_GETTERS_ASLEEP]
        if asleep:
            words[Q_GETTERS_ASLEEP] = asleep - 1
            return 1
        return 0

    def get(self, limit: int) -> tuple[list[bytes], int]:
        """Take up to `limit` messages, oldest first (none when the queue is empty); and how many
        sleeping putters must be woken."""
        words = self.segment.words
        head: int = words[Q_HEAD]
        there: int = words[Q_TAIL] - head
        if not 0 <= there <= self.capacity:
            raise self._damaged(f"it counts {there} messages in {self.capacity} slots")
        count = min(limit, there)
        if not count:
            return [], 0
        messages = [self._message(number) for number in range(head, head + count)]
        words[Q_HEAD] = head + count
        asleep: int = words[Q_PUTTERS_ASLEEP]
        wake = min(asleep, count)
        if wake:
            words[Q_PUTTERS_ASLEEP] = asleep - wake
        return messages, wake

    def _message(self, number: int) -> bytes:
        offset = HEADER_BYTES + number % self.capacity * self._slot_bytes
        length: int = self.segment.words[offset // WORD]
        if length > self.message_bytes:
            raise self._damaged(f"a message claims {length} of {self.message_bytes} bytes")
        return bytes(self.segment.memory[offset + WORD : offset + WORD + length])

    def getter_sleeps(self) -> int:
        """Register as asleep; the value of `tail` to sleep on, or -1 when a message is there."""
        return -1 if self.has_message() else self._sleeps(Q_TAIL, Q_GETTERS_ASLEEP)

    def getter_gives_up(self, seen: int) -> bool:
        """Take back a registration; True: a message is there, so that another must be woken."""
        return self._gives_up(Q_TAIL, Q_GETTERS_ASLEEP, seen, self.has_message())

    def putter_sleeps(self) -> int:
        """Register as asleep; the value of `head` to sleep on, or -1 when there is room."""
        return -1 if self.has_room() else self._sleeps(Q_HEAD, Q_PUTTERS_ASLEEP)

    def putter_gives_up(self, seen: int) -> bool:
        """Take back a registration; True: there is room, so that another must be woken."""
        return self._gives_up(Q_HEAD, Q_PUTTERS_ASLEEP, seen, self.has_room())

    def _sleeps(self, word: int, count: int) -> int:
        words = self.segment.words
        words[count] = min(words[count] + 1, MOST_ASLEEP)
        seen: int = words[word]
        return seen

    def _gives_up(self, word: int, count: int, seen: int, is_there: bool) -> bool:
        """Count one off: ourselves, or the next if we were counted off by the change already.

        Nobody is counted off when what changed is gone again: we may have been, and those who are
        asleep now must stay counted.
        """
        words = self.segment.words
        changed: bool = words[word] != seen
        if words[count] and (is_there or not changed):
            words[count] -= 1
        return changed and is_there

    def _damaged(self, why: str) -> IncompatiblePoolError:
        return IncompatiblePoolError(
            f"queue {self.name}: {why}: something else wrote into the segment; create it anew"
        )


_LAST = (1 << 64) - 1


def _slot_bytes(message_bytes: int) -> int:
    return WORD + -(-message_bytes // WORD) * WORD


def segment_bytes(capacity: int, message_bytes: int) -> int:
    """Size of the segment of a queue."""
    return HEADER_BYTES + capacity * _slot_bytes(message_bytes)
