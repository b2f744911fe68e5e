"""Message rings in the pool's own segment, one for each channel.

    message number n of a channel is in its slot n % slots while head <= n < tail

Contract
- Every change is given as stores, which the caller commits with those of the allocation that a
  message names: what is sent is published and announced in one commit, what is received is taken
  and opened in one.
- A ring has `SPARE_SLOTS` more than its capacity: room for messages of dead receivers that go back
  to the front, also when senders have filled it.
- A channel lives as long as its pool. Nothing read from the segment is believed.

What it does not do: publish, open, wait, or know who sends.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from shmblocks._state.journal import Store
from shmblocks._state.layout import (
    C_ARRIVALS,
    C_CAPACITY,
    C_FIRST_SLOT,
    C_HEAD,
    C_NAME,
    C_RECEIVERS_ASLEEP,
    C_REDELIVER,
    C_SENDERS_ASLEEP,
    C_TAIL,
    CHANNEL_BYTES,
    CHANNEL_WORDS,
    H_CHANNELS,
    H_MESSAGE_SLOTS,
    MESSAGE_BYTES,
    MOST_MESSAGE_BYTES,
    SPARE_SLOTS,
    WORD,
    WORD_STRUCT,
    Layout,
)
from shmblocks.config import PoolConfig
from shmblocks.errors import DamagedPoolError

NAME_BYTES = 63

# Messages are numbered from here on, so that one can go back in front of the first.
_FIRST_NUMBER = 1 << 32

_NAME = struct.Struct("=64p")
# Start block, generation, length, spare; the message.
_MESSAGE = struct.Struct("=4Q64s")

# What the counts of sleepers are held to, as in queue_state.py.
_MOST_ASLEEP = 1 << 12


class Message(NamedTuple):
    """What a slot says: an allocation, and the user's bytes."""

    start_block: int
    generation: int
    data: bytes
    number: int


class Channels:
    """All channels of one segment; borrows its memory."""

    def __init__(
        self, memory: memoryview, words: memoryview, layout: Layout, config: PoolConfig
    ) -> None:
        self._memory = memory
        self._words = words
        self._layout = layout
        self._most_channels = config.channels
        self._most_slots = config.channel_slots

    # ---- channels ----------------------------------------------------------------------------

    def _word(self, channel: int) -> int:
        return self._layout.channels // WORD + channel * CHANNEL_WORDS

    @property
    def count(self) -> int:
        """How many channels there are."""
        count: int = self._words[H_CHANNELS]
        return min(count, self._most_channels)

    def name(self, channel: int) -> str:
        """The name of a channel."""
        offset = (self._word(channel) + C_NAME) * WORD
        (name,) = _NAME.unpack_from(self._memory, offset)
        return str(name, "utf-8", "replace")

    def find(self, name: str) -> int:
        """The channel of that name, or -1."""
        for channel in range(self.count):
            if self.name(channel) == name:
                return channel
        return -1

    def capacity(self, channel: int) -> int:
        """Messages that senders may leave in it."""
        capacity: int = self._words[self._word(channel) + C_CAPACITY]
        if not 0 < capacity + SPARE_SLOTS <= self._most_slots:
            raise _damaged(f"channel {channel} has a capacity of {capacity}")
        return capacity

    def redelivers(self, channel: int) -> bool:
        """Whether messages of dead receivers go back."""
        if channel >= self._most_channels:
            raise _damaged(f"a lease came by channel {channel} of {self._most_channels}")
        return bool(self._words[self._word(channel) + C_REDELIVER])

    def stores_to_make(self, name: str, capacity: int, redeliver: bool) -> list[Store] | str:
        """The stores that make a channel, or why there is no room for one."""
        words = self._words
        count, first = self.count, words[H_MESSAGE_SLOTS]
        slots = capacity + SPARE_SLOTS
        if count >= self._most_channels:
            return (
                f"the pool has {count} channels and no room for more; create it with a larger "
                "PoolConfig(channels=...)"
            )
        if first + slots > self._most_slots:
            return (
                f"a capacity of {capacity} needs {slots} message slots, {self._most_slots - first} "
                "are left; create the pool with a larger PoolConfig(channel_slots=...), or the "
                "channel with a smaller capacity"
            )
        base = self._word(count) * WORD
        header = bytearray(CHANNEL_BYTES)
        struct.pack_into("=3Q", header, 0, capacity, first, redeliver)
        _NAME.pack_into(header, C_NAME * WORD, name.encode())
        struct.pack_into("=Q", header, C_HEAD * WORD, _FIRST_NUMBER)
        struct.pack_into("=Q", header, C_TAIL * WORD, _FIRST_NUMBER)
        return [
            (base, bytes(header)),
            (H_CHANNELS * WORD, WORD_STRUCT.pack(count + 1)),
            (H_MESSAGE_SLOTS * WORD, WORD_STRUCT.pack(first + slots)),
        ]

    # ---- messages ----------------------------------------------------------------------------

    def length(self, channel: int) -> int:
        """Messages in it."""
        word = self._word(channel)
        length: int = self._words[word + C_TAIL] - self._words[word + C_HEAD]
        return length

    def _checked_length(self, channel: int) -> int:
        length = self.length(channel)
        if not 0 <= length <= self.capacity(channel) + SPARE_SLOTS:
            raise _damaged(f"channel {channel} counts {length} messages")
        return length

    def is_full(self, channel: int) -> bool:
        """Whether senders must wait."""
        return self._checked_length(channel) >= self.capacity(channel)

    def _slot(self, channel: int, number: int) -> int:
        slots = self.capacity(channel) + SPARE_SLOTS
        first: int = self._words[self._word(channel) + C_FIRST_SLOT]
        if first + slots > self._most_slots:
            raise _damaged(f"channel {channel} begins at slot {first}")
        return self._layout.messages + (first + number % slots) * MESSAGE_BYTES

    def stores_to_send(self, channel: int, start: int, generation: int, data: bytes) -> list[Store]:
        """The stores that append a message."""
        word = self._word(channel)
        tail: int = self._words[word + C_TAIL]
        return [
            (self._slot(channel, tail), _MESSAGE.pack(start, generation, len(data), 0, data)),
            ((word + C_TAIL) * WORD, WORD_STRUCT.pack(tail + 1)),
            self._arrived(word),
        ]

    def _arrived(self, word: int) -> Store:
        arrivals = (self._words[word + C_ARRIVALS] + 1) & 0xFFFFFFFF
        return ((word + C_ARRIVALS) * WORD, WORD_STRUCT.pack(arrivals))

    def first(self, channel: int) -> Message | None:
        """The oldest message."""
        if not self._checked_length(channel):
            return None
        head: int = self._words[self._word(channel) + C_HEAD]
        start, generation, length, _, data = _MESSAGE.unpack_from(
            self._memory, self._slot(channel, head)
        )
        if start >= self._layout.total_blocks or length > MOST_MESSAGE_BYTES:
            raise _damaged(f"a message of channel {channel} names block {start}")
        return Message(start, generation, data[:length], head)

    def store_to_take(self, channel: int) -> Store:
        """The store that takes the oldest message."""
        word = self._word(channel)
        return ((word + C_HEAD) * WORD, WORD_STRUCT.pack(self._words[word + C_HEAD] + 1))

    def stores_to_put_back(self, channel: int, message: Message) -> list[Store] | None:
        """The stores that put a message in front of the first; None: there is no slot for it."""
        if channel >= self.count:
            raise _damaged(f"a lease came by channel {channel} of {self.count}")
        if self._checked_length(channel) >= self.capacity(channel) + SPARE_SLOTS:
            return None
        word = self._word(channel)
        head: int = self._words[word + C_HEAD] - 1
        start, generation, data, _ = message
        return [
            (self._slot(channel, head), _MESSAGE.pack(start, generation, len(data), 0, data)),
            ((word + C_HEAD) * WORD, WORD_STRUCT.pack(head)),
            self._arrived(word),
        ]

    # ---- sleepers ----------------------------------------------------------------------------

    def arrivals_offset(self, channel: int) -> int:
        """Where the word lies that receivers sleep on, in bytes."""
        return (self._word(channel) + C_ARRIVALS) * WORD

    def head_offset(self, channel: int) -> int:
        """Where the word lies that senders sleep on, in bytes."""
        return (self._word(channel) + C_HEAD) * WORD

    def receiver_sleeps(self, channel: int) -> int:
        """Count one more receiver asleep; the word to sleep on."""
        return self._sleeps(channel, C_RECEIVERS_ASLEEP, C_ARRIVALS)

    def sender_sleeps(self, channel: int) -> int:
        """Count one more sender asleep; the word to sleep on."""
        return self._sleeps(channel, C_SENDERS_ASLEEP, C_HEAD)

    def _sleeps(self, channel: int, count: int, word: int) -> int:
        words, base = self._words, self._word(channel)
        words[base + count] = min(words[base + count] + 1, _MOST_ASLEEP)
        seen: int = words[base + word]
        return seen

    def receiver_gives_up(self, channel: int, seen: int) -> bool:
        """Take back a registration; True: a message is there, so that another must be woken."""
        is_there = self.length(channel) > 0
        return self._gives_up(channel, C_RECEIVERS_ASLEEP, C_ARRIVALS, seen, is_there)

    def sender_gives_up(self, channel: int, seen: int) -> bool:
        """Take back a registration; True: there is capacity, so that another must be woken."""
        is_there = self.length(channel) < self.capacity(channel)
        return self._gives_up(channel, C_SENDERS_ASLEEP, C_HEAD, seen, is_there)

    def _gives_up(self, channel: int, count: int, word: int, seen: int, is_there: bool) -> bool:
        words, base = self._words, self._word(channel)
        changed: bool = words[base + word] != seen
        if words[base + count] and (is_there or not changed):
            words[base + count] -= 1
        return changed and is_there

    def take_receiver(self, channel: int) -> bool:
        """Whether a receiver sleeps; counts one off, who is to be woken."""
        return self._take_sleeper(self._word(channel) + C_RECEIVERS_ASLEEP)

    def take_sender(self, channel: int) -> bool:
        """Whether a sender sleeps; counts one off, who is to be woken."""
        return self._take_sleeper(self._word(channel) + C_SENDERS_ASLEEP)

    def _take_sleeper(self, word: int) -> bool:
        asleep: int = self._words[word]
        if asleep:
            self._words[word] = asleep - 1
        return bool(asleep)


def _damaged(what: str) -> DamagedPoolError:
    return DamagedPoolError(
        f"{what}: something else wrote into the segment; remove the pool (`shmblocks rm --force`) "
        "and create it anew"
    )
