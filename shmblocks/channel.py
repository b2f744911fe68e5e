"""`Channel`: published blocks from process to process, announced inside the pool itself.

    sender     channel = pool.channel("images")
               with pool.reserve(num_tokens) as r:
                   encoder(out=r["input_embeddings"])
                   channel.send(r, message=b"request-1")

    receiver   channel = pool.channel("images")
               with channel.receive(timeout=30.0) as lease:
                   lease["input_embeddings"], lease.message

Contract
- FIFO, bounded, any number of processes and threads on either side; all of them attached to the
  pool. A channel is made by whoever asks first and lives as long as the pool.
- `send` publishes and announces in one commit, `receive` takes and opens in one commit. A sender
  that dies has sent it or has nothing published; a receiver that dies has not taken it, or holds a
  lease, which comes back.
- With `redeliver=True` the message of a receiver that died, or left without a release, goes back to
  the front of the channel, for the next receiver.
- A message whose blocks were freed meanwhile (`unclaimed_timeout`) is passed over.
- Nobody waiting: no system call but for the lock. Waiting: a short spin, then sleep.

What it does not do: carry anything but blocks of its pool and 64 bytes (`HandleQueue` does).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, NoReturn, Protocol

from shmblocks._os.wait import Sleeper, deadline_of, seconds_left
from shmblocks._state.channel_state import ChannelState, Received
from shmblocks._state.layout import MOST_MESSAGE_BYTES
from shmblocks._state.pool_state import Opened, PoolState
from shmblocks.config import PoolConfig
from shmblocks.errors import PoolTimeoutError
from shmblocks.handle import BlockHandle
from shmblocks.lease import Lease, LeaseMeans, Reservation

if TYPE_CHECKING:
    from shmblocks.cuda.order import StreamOrder
    from shmblocks.cuda.use import Order, Stream


class ReadyToSend(NamedTuple):
    """What a channel is to publish; `order`: the stream that writes it."""

    handle: BlockHandle
    published: BlockHandle
    readers: int
    order: Order | None


class Carries(Protocol):
    """What a channel asks of the pool that it is of."""

    state: PoolState
    channel_state: ChannelState
    streams: StreamOrder

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> PoolConfig: ...

    def prepare_send(
        self, handle: BlockHandle, readers: int, num_tokens: int | None, stream: Stream | None
    ) -> ReadyToSend: ...

    def reading_means(self) -> LeaseMeans | None: ...

    def lease_received(self, handle: BlockHandle, opened: Opened, message: bytes) -> Lease: ...


class Channel:
    """One channel of a pool, as this process uses it. Get it from `BlockPool.channel`.

    Keeps its pool alive. It needs no closing: it ends with the pool.
    """

    def __init__(
        self, pool: Carries, state: ChannelState, index: int, name: str, spin: float
    ) -> None:
        """For `BlockPool.channel`."""
        self.pool = pool
        self.name = name
        self.index = index
        self._state = state
        # Streams order what lies on a GPU: that is Python's.
        self._core = None if pool.config.is_on_gpu else pool.state.core
        self._receiving = Sleeper(
            state.arrivals(index),
            lambda: state.receiver_sleeps(index),
            lambda seen: state.receiver_gives_up(index, seen),
            lambda: state.has_message(index),
            spin,
        )
        self._sending = Sleeper(
            state.head(index),
            lambda: state.sender_sleeps(index),
            lambda seen: state.sender_gives_up(index, seen),
            lambda: state.has_capacity(index),
            spin,
        )

    def __len__(self) -> int:
        """Messages in it, of this moment."""
        return self._state.length(self.index)

    def __bool__(self) -> bool:
        return True

    # ---- sending -----------------------------------------------------------------------------

    def send(
        self,
        blocks: Reservation | BlockHandle,
        *,
        readers: int = 1,
        message: bytes = b"",
        num_tokens: int | None = None,
        stream: Stream | None = None,
        timeout: float | None = None,
    ) -> BlockHandle:
        """Publish blocks and announce them, in one commit; the handle that receivers open.

        blocks      a reservation of this process (published by this), or published blocks
        readers     how many leases will be opened on them, over all channels
        message     up to 64 bytes that the receiver finds in `lease.message`
        num_tokens  the length actually written, if it is not the reservation's
        stream      as in `BlockPool.publish`
        timeout     seconds to wait while the channel is full (None: for ever), then
                    `PoolTimeoutError`; the reservation is the caller's as before
        """
        core = self._core
        if core is not None and stream is None and (timeout is None or timeout >= 0):
            handle = blocks.handle if isinstance(blocks, Reservation) else blocks
            sent = core.send(self.index + 1, handle, num_tokens, readers, message)
            if sent is not None:
                if isinstance(blocks, Reservation):
                    blocks.note_published()
                return sent
        return send(
            [self],
            blocks,
            readers=readers,
            message=message,
            num_tokens=num_tokens,
            stream=stream,
            timeout=timeout,
        )

    async def send_async(
        self,
        blocks: Reservation | BlockHandle,
        *,
        readers: int = 1,
        message: bytes = b"",
        num_tokens: int | None = None,
        stream: Stream | None = None,
        timeout: float | None = None,
    ) -> BlockHandle:
        """`send` that waits in asyncio."""
        deadline = deadline_of(timeout)
        sending = _Sending([self], blocks, readers, message, num_tokens, stream)
        while (full := sending.attempt()) is not None:
            changed = await full._sending.until_changed_async(deadline)
            if not changed and seconds_left(deadline) <= 0:
                raise full._is_full(timeout)
        return sending.published

    def _is_full(self, timeout: float | None) -> PoolTimeoutError:
        return PoolTimeoutError(
            f"channel {self.name} of pool {self.pool.name}: full for {timeout:g} s, {len(self)} "
            "messages wait: nobody receives, or the channel is too small"
        )

    # ---- receiving ---------------------------------------------------------------------------

    def receive(self, timeout: float | None = None) -> Lease:
        """The oldest message, as a lease on what it announces; release it.

        Waits up to `timeout` seconds (None: for ever), then raises `PoolTimeoutError`. Raises
        `PeerDiedError` when the sender's GPU died before it had finished.
        """
        return self.receive_many(1, timeout)[0]

    def receive_nowait(self) -> Lease | None:
        """The oldest message, or None."""
        leases = self._take(1)
        return leases[0] if leases else None

    def receive_many(self, limit: int, timeout: float | None = None) -> list[Lease]:
        """At least one and up to `limit` messages, oldest first, under one lock."""
        if limit < 1:
            raise ValueError(f"limit: expected at least 1, got {limit}")
        deadline = deadline_of(timeout)
        leases: list[Lease] = []
        try:
            spin = self._take_compiled(limit, leases, deadline)
            while not leases and not (leases := self._take(limit)):
                if not self._receiving.until_changed(deadline, spin):
                    raise self._is_empty(timeout)
                spin = self._take_compiled(limit, leases, deadline)
            return leases
        except BaseException:
            self._put_back(leases)
            raise

    async def receive_async(self, timeout: float | None = None) -> Lease:
        """`receive` for asyncio; cancelling it takes no message."""
        return (await self.receive_many_async(1, timeout))[0]

    async def receive_many_async(self, limit: int, timeout: float | None = None) -> list[Lease]:
        """`receive_many` for asyncio; cancelling it takes no message."""
        if limit < 1:
            raise ValueError(f"limit: expected at least 1, got {limit}")
        deadline = deadline_of(timeout)
        leases: list[Lease] = []
        try:
            while not (leases := self._take(limit)):
                changed = await self._receiving.until_changed_async(deadline)
                if not changed and seconds_left(deadline) <= 0:
                    raise self._is_empty(timeout)
            return leases
        except BaseException:
            self._put_back(leases)
            raise

    def _is_empty(self, timeout: float | None) -> PoolTimeoutError:
        return PoolTimeoutError(
            f"channel {self.name} of pool {self.pool.name}: no message for {timeout:g} s"
        )

    def _take_compiled(self, limit: int, leases: list[Lease], deadline: float | None) -> int:
        """As `_take`, by the compiled core if it is there, which spins for a message meanwhile: for
        how many ns. What it takes is in `leases`, also when this is interrupted."""
        core = self._core
        means = None if core is None else self.pool.reading_means()
        if core is None or means is None:
            return 0
        spin = self._receiving.budget_ns(deadline)
        core.receive(self.index + 1, limit, means, self.pool, leases, spin)
        return spin

    def _take(self, limit: int) -> list[Lease]:
        if not self._state.has_message(self.index):
            # No lock taken to see that. The wait that follows checks again under the lock.
            return []
        received: list[Received] = []
        leases: list[Lease] = []
        try:
            received = self._state.receive(self.index, limit)
            for each in received:
                lease = self.pool.lease_received(each.handle, each.opened, each.data)
                leases.append(lease)
            return leases
        except BaseException:
            # What was made is known here: a list that is lost half-made would release its leases,
            # and the messages would be gone.
            for made in leases:
                made.disown()
            if received:
                self.pool.state.undo_receives(received[0].opened.key.opened_ns)
            raise

    def _put_back(self, leases: list[Lease]) -> None:
        """Interrupted before the caller had them: the messages are at the front again."""
        moments = {lease.disown() for lease in leases}
        for moment in moments:
            self.pool.state.undo_receives(moment)

    # ---- life --------------------------------------------------------------------------------

    def end_waits(self) -> None:
        """For the pool, when it has closed: whoever waits here gets its error."""
        self._receiving.close()
        self._sending.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self!r}: send the pool, and call `pool.channel({self.name!r})` there")

    def __repr__(self) -> str:
        return f"Channel({self.name!r} of {self.pool!r})"


def send(
    channels: Sequence[Channel],
    blocks: Reservation | BlockHandle,
    *,
    readers: int | None = None,
    message: bytes = b"",
    num_tokens: int | None = None,
    stream: Stream | None = None,
    timeout: float | None = None,
) -> BlockHandle:
    """`Channel.send` to several channels of one pool, in one commit: all of them or none.

    `readers`: None: one for each channel.
    """
    count = len(channels) if readers is None else readers
    deadline = deadline_of(timeout)
    sending = _Sending(channels, blocks, count, message, num_tokens, stream)
    while (full := sending.attempt()) is not None:
        if not full._sending.until_changed(deadline):
            raise full._is_full(timeout)
    return sending.published


class _Sending:
    """What is to be sent, checked once."""

    def __init__(
        self,
        channels: Sequence[Channel],
        blocks: Reservation | BlockHandle,
        readers: int,
        message: bytes,
        num_tokens: int | None,
        stream: Stream | None,
    ) -> None:
        if not channels or any(channel.pool is not channels[0].pool for channel in channels):
            raise ValueError("channels: expected at least one, all of one pool object")
        _require_message(message)
        self._channels = channels
        self._blocks = blocks
        self._message = message
        self._reservation = blocks if isinstance(blocks, Reservation) else None
        handle = blocks.handle if isinstance(blocks, Reservation) else blocks
        self._ready = channels[0].pool.prepare_send(handle, readers, num_tokens, stream)
        self.published = self._ready.published

    def attempt(self) -> Channel | None:
        """Send it; a channel that is full, and nothing was done."""
        ready = self._ready
        pool = self._channels[0].pool
        indices = [channel.index for channel in self._channels]
        full = pool.channel_state.send(
            indices,
            ready.handle,
            ready.published.num_tokens,
            ready.readers,
            self._message,
            ready.order is not None,
        )
        if full >= 0:
            return self._channels[indices.index(full)]
        if self._reservation is not None:
            self._reservation.note_published()
        if ready.order is not None:
            pool.streams.make_ready(ready.order, ready.handle)
        return None


def _require_message(message: object) -> None:
    if not isinstance(message, bytes):
        raise TypeError(f"message: expected bytes, got {type(message).__name__}")
    if len(message) > MOST_MESSAGE_BYTES:
        raise ValueError(
            f"message: expected at most {MOST_MESSAGE_BYTES} bytes, got {len(message)}"
        )
