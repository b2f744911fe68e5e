"""The shared state of a queue: a message ring of fixed slots in a segment of its own.

The byte layout is `QueueLayout` in layout.py.

Contract
- Order is FIFO over all putters. Every operation is a transaction and has one store that commits
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

from shmblocks import _core
from shmblocks._os.futex import Futex
from shmblocks._os.segment import create_unnamed, normal_name, open_existing
from shmblocks._state.identity import Identity
from shmblocks._state.layout import (
    H_NEXT_INCARNATION,
    IDENTITY,
    LAYOUT_VERSION,
    Q_GETTERS_ASLEEP,
    Q_HEAD,
    Q_PUTTERS_ASLEEP,
    Q_TAIL,
    QUEUE_MAGIC,
    WORD,
    QueueLayout,
)
from shmblocks._state.mutex import transaction
from shmblocks._state.shared_segment import SharedSegment
from shmblocks.errors import DamagedPoolError

_SIZES = struct.Struct("=2Q")
_SIZES_OFFSET = 24 * WORD

MAX_CAPACITY = 1 << 24
MAX_MESSAGE_BYTES = 1 << 20
DEFAULT_LOCK_TIMEOUT = 30.0

FULL = -1

# What the counts of sleepers are held to: one that wakes by itself and sleeps again is one too
# many. Larger: more needless system calls when a queue gets busy after it was idle. Smaller: with
# more threads than that asleep at once, some are woken only by their own clock.
MOST_ASLEEP = 1 << 12


class QueueState(SharedSegment):
    """One queue's segment as one process sees it."""

    kind = "queue"

    def __init__(
        self,
        fd: int,
        name: str,
        queue_id: int,
        layout: QueueLayout,
        message_bytes: int,
        lock_timeout: float = DEFAULT_LOCK_TIMEOUT,
    ) -> None:
        """Map the segment behind `fd` (which stays the caller's)."""
        super().__init__(fd, name, layout, layout.PARTICIPANTS, lock_timeout)
        self.queue_id = queue_id
        self.capacity = layout.capacity
        self.message_bytes = message_bytes
        self._slots = layout.slots
        self._slot_bytes = layout.slot_bytes
        # The compiled operations; None: there are none.
        self.core = self._compiled = _core.queue_core(
            self.segment.mapping,
            self.mutex.inside,
            (
                layout.journal // WORD,
                layout.capacity,
                message_bytes,
                layout.slots,
                layout.slot_bytes,
            ),
        )
        self.puts = Futex(self.segment.mapping, Q_TAIL * WORD)
        self.gets = Futex(self.segment.mapping, Q_HEAD * WORD)

    # ---- making and finding ------------------------------------------------------------------

    @classmethod
    def create(
        cls, name: str, capacity: int, message_bytes: int, group: str | None, role: str
    ) -> QueueState:
        """A new queue of that name; a dead leftover of the name is replaced."""
        name = normal_name(name)
        layout = QueueLayout(capacity, message_bytes)
        state: QueueState | None = None
        try:
            with create_unnamed(layout.segment_bytes, name, group, cls.kind) as file:
                fd = file.fileno()
                queue_id = secrets.randbits(64)
                identity = IDENTITY.pack(
                    QUEUE_MAGIC, LAYOUT_VERSION, queue_id, layout.segment_bytes, time.monotonic_ns()
                )
                os.pwrite(fd, identity, 0)
                os.pwrite(fd, (1).to_bytes(WORD, "little"), H_NEXT_INCARNATION * WORD)
                os.pwrite(fd, _SIZES.pack(capacity, message_bytes), _SIZES_OFFSET)
                state = cls(fd, name, queue_id, layout, message_bytes)
                state.publish_name(fd, role)
            return state
        except BaseException:
            if state is not None:
                state.leave()
            raise

    @classmethod
    def open_unjoined(cls, name: str, lock_timeout: float = DEFAULT_LOCK_TIMEOUT) -> QueueState:
        """The queue of that name, without becoming a participant."""
        name = normal_name(name)
        with open_existing(name, cls.kind) as file:
            fd = file.fileno()
            identity = Identity(fd, name, QUEUE_MAGIC)
            capacity, message_bytes = _SIZES.unpack(os.pread(fd, _SIZES.size, _SIZES_OFFSET))
            if not 1 <= capacity <= MAX_CAPACITY or not 1 <= message_bytes <= MAX_MESSAGE_BYTES:
                raise _damaged_header(name)
            layout = QueueLayout(capacity, message_bytes)
            if layout.segment_bytes != identity.size_bytes:
                raise _damaged_header(name)
            return cls(fd, name, identity.pool_id, layout, message_bytes, lock_timeout)

    @classmethod
    def attach(cls, name: str, role: str) -> QueueState:
        """The living queue of that name, with this process as a participant."""
        return cls.open_unjoined(name).join(role)

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
            raise self.mutex.closed() from None
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

    # ---- transactions ------------------------------------------------------------------------

    @transaction
    def put(self, message: bytes) -> int:
        """Append a message; how many sleeping getters must be woken, or `FULL`."""
        words = self.segment.words
        tail: int = words[Q_TAIL]
        there: int = tail - words[Q_HEAD]
        if there == self.capacity:
            return FULL
        if not 0 <= there < self.capacity or tail == _LAST:
            raise self._damaged(f"it counts {there} messages in {self.capacity} slots")
        offset = self._slots + tail % self.capacity * self._slot_bytes
        slot = len(message).to_bytes(WORD, "little") + message
        self.segment.memory[offset : offset + len(slot)] = slot
        words[Q_TAIL] = tail + 1
        asleep: int = words[Q_GETTERS_ASLEEP]
        if asleep:
            words[Q_GETTERS_ASLEEP] = asleep - 1
            return 1
        return 0

    @transaction
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
        offset = self._slots + number % self.capacity * self._slot_bytes
        length: int = self.segment.words[offset // WORD]
        if length > self.message_bytes:
            raise self._damaged(f"a message claims {length} of {self.message_bytes} bytes")
        return bytes(self.segment.memory[offset + WORD : offset + WORD + length])

    @transaction
    def getter_sleeps(self) -> int:
        """Register as asleep; the value of `tail` to sleep on, or -1 when a message is there."""
        return -1 if self.has_message() else self._sleeps(Q_TAIL, Q_GETTERS_ASLEEP)

    @transaction
    def getter_gives_up(self, seen: int) -> bool:
        """Take back a registration; True: a message is there, so that another must be woken."""
        return self._gives_up(Q_TAIL, Q_GETTERS_ASLEEP, seen, self.has_message())

    @transaction
    def putter_sleeps(self) -> int:
        """Register as asleep; the value of `head` to sleep on, or -1 when there is room."""
        return -1 if self.has_room() else self._sleeps(Q_HEAD, Q_PUTTERS_ASLEEP)

    @transaction
    def putter_gives_up(self, seen: int) -> bool:
        """Take back a registration; True: there is room, so that another must be woken."""
        return self._gives_up(Q_HEAD, Q_PUTTERS_ASLEEP, seen, self.has_room())

    def _sleeps(self, word: int, count: int) -> int:
        words = self.segment.words
        words[count] = min(words[count] + 1, MOST_ASLEEP)
        seen: int = words[word]
        return seen

    def _gives_up(self, word: int, count: int, seen: int, is_there: bool) -> bool:
        """Decrement the sleeper count, unless a put or get already did so for us: then the word
        changed and the item is gone again."""
        words = self.segment.words
        changed: bool = words[word] != seen
        if words[count] and (is_there or not changed):
            words[count] -= 1
        return changed and is_there

    def _damaged(self, why: str) -> DamagedPoolError:
        return DamagedPoolError(
            f"queue {self.name}: {why}: something else wrote into the segment; create it anew"
        )


_LAST = (1 << 64) - 1


def _damaged_header(name: str) -> DamagedPoolError:
    return DamagedPoolError(f"queue {name}: its header is damaged; create it anew")
