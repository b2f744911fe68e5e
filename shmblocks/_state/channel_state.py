"""The channels of a pool: one method for each transaction.

Contract
- Everything that `pool_state.py` promises of a transaction.
- `send` publishes and announces in one commit, to one channel or to several. What was published and
  not announced does not exist.
- `receive` takes and opens in one commit. What was taken and not opened does not exist: a receiver
  that is killed behind the take is a dead lease, which the next reap gives back; on a channel that
  redelivers the message goes back to the front in the same commit.
- A message whose blocks were freed meanwhile is passed over.

What it does not do: wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from shmblocks._os.futex import Futex
from shmblocks._state.blocks import READS
from shmblocks._state.channels import Message
from shmblocks._state.counters import Counter, Histogram
from shmblocks._state.layout import FAILED
from shmblocks._state.mutex import transaction
from shmblocks._state.pool_state import Opened, PoolState, stamp
from shmblocks._state.states import NUMBER, STATES, State
from shmblocks.errors import InvalidStateError, TooManyLeasesError
from shmblocks.handle import BlockHandle

_RESERVED = NUMBER[State.RESERVED]
_PUBLISHED = NUMBER[State.PUBLISHED]
_LEASED = NUMBER[State.LEASED]


class Received(NamedTuple):
    """A message: a new lease of this process, and the user's bytes."""

    handle: BlockHandle
    opened: Opened
    data: bytes


class ChannelState:
    """The transactions on the channels of one pool; borrows the pool state."""

    def __init__(self, state: PoolState) -> None:
        self._state = state
        # What `transaction` needs.
        self.mutex = state.mutex
        self.entered: Callable[[], None] = state.entered
        self.describe_holder: Callable[[], str] = state.describe_holder
        self._channels = state.channels

    @transaction
    def make(self, name: str, capacity: int, redeliver: bool) -> int:
        """The channel of that name, made if there is none; ValueError when there is no room."""
        there = self._channels.find(name)
        if there >= 0:
            return there
        stores = self._channels.stores_to_make(name, capacity, redeliver)
        if isinstance(stores, str):
            raise ValueError(f"{self._state.what}: channel {name!r}: {stores}")
        channel = self._channels.count
        self._state.journal.commit(stores)
        return channel

    @transaction
    def send(
        self,
        channels: Sequence[int],
        handle: BlockHandle,
        num_tokens: int,
        readers: int,
        data: bytes,
        on_stream: bool,
    ) -> int:
        """Publish a reservation, unless it is published already, and announce it to all channels.

        The first channel that is full, and nothing was done; or -1.
        """
        for channel in channels:
            if self._channels.is_full(channel):
                return channel
        state = self._state
        record = state.blocks.find_exact(handle)
        stores = []
        if record.state == _RESERVED:
            state.refuse_writers(handle, record)
            now = time.monotonic_ns()
            until = now + state.unclaimed_ns
            stores += state.blocks.stores_to_publish(
                handle.start_block, record, num_tokens, readers, now, until, on_stream=on_stream
            )
            state.counters.add(Counter.PUBLISHES)
        elif record.state not in (_PUBLISHED, _LEASED):
            raise InvalidStateError(
                f"{handle}: expected a reservation or published blocks, they are "
                f"{STATES[record.state]}"
            )
        for channel in channels:
            stores += self._channels.stores_to_send(
                channel, handle.start_block, handle.generation, data
            )
        state.journal.commit(stores)
        # Wake while holding the lock, as `PoolState.wake_head` does and for its reason.
        for channel in channels:
            if self._channels.take_receiver(channel):
                self.arrivals(channel).wake(1)
        return -1

    def receive(self, channel: int, limit: int) -> list[Received]:
        """Take up to `limit` messages, oldest first, and open what they announce."""
        moment = stamp()
        try:
            return self._receive(channel, limit, moment)
        except BaseException:
            self._state.undo_receives(moment)
            raise

    @transaction
    def _receive(self, channel: int, limit: int, moment: int) -> list[Received]:
        received: list[Received] = []
        while len(received) < limit:
            message = self._channels.first(channel)
            if message is None:
                break
            try:
                taken = self._take(channel, message, moment)
            except TooManyLeasesError:
                if not received:
                    raise
                break  # the others stay in the channel
            if taken is not None:
                received.append(taken)
            if self._channels.take_sender(channel):
                self.head(channel).wake(1)
        return received

    def _take(self, channel: int, message: Message, moment: int) -> Received | None:
        """One message and its lease in one commit; None: its blocks are not there any more."""
        state = self._state
        head = self._channels.store_to_take(channel)
        record = state.blocks.record(message.start_block)
        is_there = (
            record.generation == message.generation
            and record.state in (_PUBLISHED, _LEASED)
            and record.readers_left
        )
        if not is_there or record.ready & FAILED:
            state.journal.commit([head])
            if is_there:
                raise state.blocks.died(self._handle(message, record.num_blocks, record.num_tokens))
            return None
        stores, key = state.lease_stores(message.start_block, record, READS, moment)
        stores.append(head)
        stores += state.blocks.stores_to_note_channel(
            key.slot, channel, message.data, message.number
        )
        state.journal.commit(stores)
        state.counters.add(Counter.OPENS)
        state.counters.observe(Histogram.PUBLISH_TO_OPEN, moment - record.published_ns)
        handle = self._handle(message, record.num_blocks, record.num_tokens)
        return Received(handle, Opened(key, record.ready == record.generation), message.data)

    def _handle(self, message: Message, num_blocks: int, num_tokens: int) -> BlockHandle:
        return BlockHandle(
            message.start_block, num_blocks, num_tokens, message.generation, self._state.pool_id
        )

    # ---- waiting -----------------------------------------------------------------------------

    def has_message(self, channel: int) -> bool:
        """Lock-free: whether `receive` would probably find one; True when closed."""
        try:
            return self._channels.length(channel) > 0
        except ValueError:
            return True

    def has_capacity(self, channel: int) -> bool:
        """Lock-free: whether `send` would probably find capacity; True when closed."""
        try:
            return self._channels.length(channel) < self._channels.capacity(channel)
        except ValueError:
            return True

    def length(self, channel: int) -> int:
        """Lock-free: messages in it, of this moment."""
        try:
            return max(0, self._channels.length(channel))
        except ValueError:
            raise self.mutex.closed() from None

    @transaction
    def receiver_sleeps(self, channel: int) -> int:
        """Register as asleep; the word to sleep on, or -1 when a message is there."""
        has_message = self._channels.length(channel) > 0
        return -1 if has_message else self._channels.receiver_sleeps(channel)

    @transaction
    def receiver_gives_up(self, channel: int, seen: int) -> bool:
        """Take back a registration; True: another must be woken."""
        return self._channels.receiver_gives_up(channel, seen)

    @transaction
    def sender_sleeps(self, channel: int) -> int:
        """Register as asleep; the word to sleep on, or -1 when there is capacity."""
        is_full = self._channels.is_full(channel)
        return self._channels.sender_sleeps(channel) if is_full else -1

    @transaction
    def sender_gives_up(self, channel: int, seen: int) -> bool:
        """Take back a registration; True: another must be woken."""
        return self._channels.sender_gives_up(channel, seen)

    def arrivals(self, channel: int) -> Futex:
        """The word that receivers sleep on."""
        return Futex(self._state.segment.mapping, self._channels.arrivals_offset(channel))

    def head(self, channel: int) -> Futex:
        """The word that senders sleep on."""
        return Futex(self._state.segment.mapping, self._channels.head_offset(channel))
