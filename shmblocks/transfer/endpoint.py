"""What both endpoints are: a line to the peer, open rooms, and one lock around them.

    poll()    everything that can be done now: send what is unsent, take what has arrived, look
              whether the peer lives, let every room go on. Never sleeps
    wait      poll until one room has ended, asleep on the queue in between

Any thread may call anything. All state is behind `_turn`. Of the threads that wait, one at a time
reads the queue, without the lock:

  1. under the lock, nobody else being the reader, it becomes the reader;
  2. it lets go of the lock and sleeps in the queue's own get, for a bounded time;
  3. what it got goes to the inbox *before* it takes the lock again, and until it has it again
     nobody else takes from the queue (poll sees that there is a reader). So messages are
     handled in the order in which they came.

The others sleep on `_turn` and are woken when the reader is back.

What it does not do: know the messages of rooms (the two endpoints do), own the pool or the queues,
or work in another process than the one that made it.
"""

from __future__ import annotations

import abc
import os
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec

from shmblocks._state.info import ParticipantId
from shmblocks.errors import InvalidStateError, PeerDiedError, PoolTimeoutError
from shmblocks.transfer.channel import QueueLike
from shmblocks.transfer.holders import who_holds_blocks
from shmblocks.transfer.link import Link
from shmblocks.transfer.messages import Bye, Hello, RoomMessage
from shmblocks.transfer.pools import Pools
from shmblocks.transfer.recent import Recent
from shmblocks.transfer.returns import Returns
from shmblocks.transfer.room import Room
from shmblocks.transfer.status import Status

if TYPE_CHECKING:
    from typing_extensions import Self

    from shmblocks.pool import BlockPool

R = TypeVar("R", bound=Room)

# Seconds asleep in one go while only a message can help. Smaller: more wake-ups for nothing.
# Larger: a dead peer is noticed later, and a second thread's room waits longer for its turn to
# read.
LONGEST_SLICE = 0.05
# The same while blocks, or room in a full queue, can help too, which nothing wakes us for: it grows
# from the first to the second. Smaller: less latency, more looks at the pool (a few us each).
FIRST_NAP = 0.0002
LONGEST_NAP = 0.01
# Seconds for which close(), and a wait that has ended, try to send what a full queue has not taken.
# Longer: they take longer when the other side does not read. Shorter: it may not be told the end of
# a room when this side's user polls no more.
SEND_PATIENCE = 0.2

# Ended attempts that are remembered, to tell their late messages. Fewer: a very late message of a
# busy endpoint is taken for an early one, and kept for a while. More: more memory (some 200 bytes).
REMEMBERED = 4096
REMEMBERED_SECONDS = 600.0


class EndpointStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counts since the endpoint was made, and what is open now.

    malformed, foreign, late and duplicate are messages that were dropped: not a message at all; of
    a participant that is not the peer; of a room that has ended or never was; had before.
    spilled are the rounds (of all rooms, as soon as they went over) that went through the spill
    pool.
    """

    peer: str
    sent: int
    received: int
    malformed: int
    foreign: int
    late: int
    duplicate: int
    rooms_open: int
    rooms_succeeded: int
    rooms_failed: int
    rounds: int
    spilled: int
    tokens: int
    bytes: int
    unsent: int


class Endpoint(abc.ABC, Generic[R]):
    """One side of a pair: `EmbeddingEndpoint` or `LanguageEndpoint`. Borrows pools and queues."""

    def __init__(
        self, pool: BlockPool, tx: QueueLike, rx: QueueLike, *, spill: BlockPool | None = None
    ) -> None:
        """`tx` of one side is `rx` of the other.

        `spill`: a pool in host memory with the same fields and block size, used whenever `pool`
        (most of the time one on a GPU) is full. Both sides give the same, or neither does.
        """
        if not pool.config.fields:
            raise ValueError(f"pool {pool.name}: expected at least one field to transfer, got none")
        self._pool = pool
        self._pools = Pools(pool, spill)
        self._link = Link(self._pools, tx, rx)
        self._returns = Returns(self._pools)
        self._rooms: dict[int, R] = {}
        self._ended: Recent[int, bool] = Recent(REMEMBERED, REMEMBERED_SECONDS)
        self._turn = threading.Condition(threading.Lock())
        self._has_reader = False
        self._is_closed = False
        self._num_bytes = 0
        self._pid = os.getpid()
        self._link.greet()

    # ---- for users ---------------------------------------------------------------------------

    @property
    def pool(self) -> BlockPool:
        """The pool that both sides are attached to."""
        return self._pool

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._is_closed

    @property
    def stats(self) -> EndpointStats:
        """What was counted up to now."""
        with self._turn:
            counts, link = self._link.counts, self._link
            return EndpointStats(
                peer=link.peer_name,
                sent=counts.sent,
                received=counts.received,
                malformed=counts.malformed,
                foreign=counts.foreign,
                late=counts.late,
                duplicate=counts.duplicate,
                rooms_open=sum(not room.is_over for room in self._rooms.values()),
                rooms_succeeded=counts.succeeded,
                rooms_failed=counts.failed,
                rounds=counts.rounds,
                spilled=counts.spilled,
                tokens=counts.tokens,
                bytes=self._num_bytes,
                unsent=link.unsent,
            )

    def poll(self) -> None:
        """Do everything that can be done now, for every room. Never sleeps.

        What arrives can never make it raise. It raises `InvalidStateError` on a closed endpoint,
        and what the pool raises about itself (`PoolClosedError`).
        """
        with self._turn:
            self._check_usable()
            self._pump()

    def close(self) -> None:
        """Fail every open room, tell the other side, give everything back; idempotent.

        Results that were handed out stay valid until they are released. The pool and the queues
        stay open: they are the caller's.
        """
        if os.getpid() != self._pid:
            return  # a forked child: rooms and blocks are the parent's
        with self._turn:
            if self._is_closed:
                return
            for room in self._rooms.values():
                room.fail("the endpoint was closed")
            self._sweep()
            self._discard_untaken()
            self._link.part()
            self._is_closed = True
            self._turn.notify_all()
        self._send_the_rest(SEND_PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else f"{len(self._rooms)} rooms"
        peer = self._link.peer_name or "no peer yet"
        return f"{type(self).__name__}({self._pool.name!r}, {state}, {peer})"

    # ---- rooms -------------------------------------------------------------------------------

    def _start(self, room: R) -> None:
        """Open a room and let it go as far as it can.

        What has arrived is taken first, so that a request that was withdrawn since is not begun.
        """
        with self._turn:
            self._check_usable()
            self._pump()
            self._open(room)
            try:
                self._begin(room)
                self._pump()
            except BaseException:
                room.fail("it could not be started")
                self._sweep()
                raise

    def _begin(self, room: R) -> None:
        """Give a new room what came for it before it was opened."""

    def _open(self, room: R) -> None:
        self._check_usable()
        self._sweep()
        if not 0 <= room.room < 1 << 64:
            raise ValueError(f"room: expected 0 to 2**64 - 1, got {room.room}")
        if room.room in self._rooms:
            raise ValueError(
                f"room {room.room}: is open already ({self._rooms[room.room].status}); end it "
                "first, or take another number"
            )
        self._rooms[room.room] = room

    def _check_usable(self) -> None:
        if self._is_closed:
            raise InvalidStateError(f"{self!r}: it was closed")
        if os.getpid() != self._pid:
            raise InvalidStateError(
                f"{self!r}: it was made by the process {self._pid} before a fork; make an endpoint "
                "in the process that uses it"
            )

    def _find(self, message: RoomMessage) -> R | None:
        """The open room that the message belongs to; counts it as late when there is none."""
        room = self._rooms.get(message.room)
        if room is not None and room.nonce == message.nonce and not room.is_over:
            return room
        self._link.counts.late += 1
        return None

    def _abort(self, room: R, reason: str) -> bool:
        """End a room; False when it had ended before."""
        with self._turn:
            was_open = not room.is_over
            room.fail(f"aborted: {reason}")
            self._discard(room)
            self._sweep()
            self._turn.notify_all()
        return was_open

    def _sweep(self) -> None:
        """Forget the rooms that have ended, and count them."""
        over = [room for room in self._rooms.values() if room.is_over]
        for room in over:
            del self._rooms[room.room]
            if room.nonce:
                self._ended.put(room.nonce, True)
            self._count(room)
            self._on_end(room)

    def _count(self, room: R) -> None:
        counts = self._link.counts
        counts.succeeded += room.status is Status.Success
        counts.failed += room.status is Status.Failed
        counts.rounds += room.rounds
        counts.tokens += room.tokens
        self._num_bytes += room.num_bytes

    @abc.abstractmethod
    def _handle(self, message: RoomMessage) -> None:
        """Take a message of a room. Never raises for what is in it."""

    def _on_end(self, room: R) -> None:
        """A room was swept."""

    def _on_loss(self) -> None:
        """The peer is lost; its rooms have failed."""

    def _discard(self, room: R) -> None:
        """Give back what a room that succeeded has for its user, when he has not taken it."""

    def _discard_untaken(self) -> None:
        """The same for all rooms."""

    # ---- pumping (all with the lock held) ----------------------------------------------------

    def _pump(self) -> None:
        self._returns.retry()
        self._link.flush()
        if not self._has_reader:
            self._link.fetch()
        while (message := self._link.take()) is not None:
            if not self._is_from_peer(message.origin.place, message.origin.incarnation, message):
                self._link.counts.foreign += 1
            elif isinstance(message, Hello):
                self._link.on_hello(message)
            elif isinstance(message, Bye):
                self._link.on_bye()
            elif isinstance(message, RoomMessage):
                self._handle(message)
        self._link.look()
        self._fail_if_lost()
        self._advance()
        self._sweep()

    def _advance(self) -> None:
        """Let every room go on, the oldest first.

        When the pool has refused a number of blocks, whoever waits for as many or more need not ask
        in this round: a hundred waiting rooms would be a hundred searches of a full pool.
        """
        refused = 0
        for room in list(self._rooms.values()):
            if not 0 < refused <= room.blocks_wanted:
                room.safely(room.advance)
                refused = min(refused or room.blocks_wanted, room.blocks_wanted or refused)

    def _is_from_peer(self, place: int, incarnation: int, message: object) -> bool:
        sender = ParticipantId(place, incarnation)
        if sender == self._link.peer:
            is_new = isinstance(message, Hello) and self._link.loss is not None
            if is_new and self._pool.is_alive(sender):  # it made another endpoint
                self._fail_if_lost()
                self._link.adopt(sender)
            return True
        if not self._link.may_adopt(sender):
            return False
        self._fail_if_lost()
        self._link.adopt(sender)
        return True

    def _fail_if_lost(self) -> None:
        loss = self._link.loss
        if loss is None:
            return
        is_death = issubclass(loss.error, PeerDiedError) and bool(self._rooms)
        for room in self._rooms.values():
            room.fail_by_loss(loss)
        self._sweep()
        self._on_loss()
        if is_death:
            for pool in self._pools.all:
                pool.reap()

    # ---- waiting -----------------------------------------------------------------------------

    def _wait(self, room: R, timeout: float | None) -> None:
        """Pump until the room has ended; `PoolTimeoutError` says whom it waits for."""
        start = time.monotonic()
        nap = FIRST_NAP
        with self._turn:
            while not self._has_ended(room):
                left = LONGEST_SLICE if timeout is None else start + timeout - time.monotonic()
                if left <= 0:
                    raise PoolTimeoutError(self._overdue(room, time.monotonic() - start))
                hungry = self._is_hungry()
                nap = min(2 * nap, LONGEST_NAP) if hungry else FIRST_NAP
                self._sleep(min(left, nap if hungry else LONGEST_SLICE))
        left = SEND_PATIENCE if timeout is None else start + timeout - time.monotonic()
        self._send_the_rest(min(left, SEND_PATIENCE))

    def _has_ended(self, room: R) -> bool:
        if not room.is_over:
            self._check_usable()
            self._pump()
        return room.is_over

    def _is_hungry(self) -> bool:
        """Whether something may become possible without a message."""
        return self._link.unsent > 0 or any(room.blocks_wanted for room in self._rooms.values())

    def _sleep(self, seconds: float) -> None:
        """Sleep on the queue, or until the thread that does so is back; with the lock let go."""
        if self._has_reader:
            self._turn.wait(seconds)
            return
        self._has_reader = True
        self._turn.release()
        try:
            self._link.wait(seconds)
        finally:
            self._turn.acquire()
            self._has_reader = False
            self._turn.notify_all()

    def _overdue(self, room: R, waited: float) -> str:
        peer = self._link.peer_name or (
            "nobody yet: no message has come; was the other endpoint made, and is its rx this "
            "one's tx?"
        )
        text = (
            f"room {room.room} has not ended after {waited:.2f} s (at {room.status} since it was "
            f"opened {time.monotonic() - room.opened:.2f} s ago): {room.waits_for()}; the other "
            f"side is {peer}; the room stays open"
        )
        if not room.blocks_wanted:
            return text
        return "\n".join([text, *map(who_holds_blocks, self._pools.all)])

    def _send_the_rest(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._link.unsent and time.monotonic() < deadline:
            time.sleep(FIRST_NAP)
            with self._turn:
                if self._is_closed:
                    self._link.flush()
                else:
                    self._pump()  # both sides may be here: each must read, too
