"""What both endpoints have in common: a connection, open rooms, and one lock around them.

    poll()    do everything that can be done now: send what is unsent, take what has arrived, check
              that the peer lives, let every room go on. Never sleeps
    wait      poll until one room has ended, asleep on the queue in between

Any thread may call anything. `_changed`, a condition, is the lock around all state. Of the threads
that wait, one at a time reads the queue, without the lock:

  1. under the lock, if there is no reader, it becomes the reader;
  2. it releases the lock and sleeps in the queue's own get, for a bounded time;
  3. it puts what it got into the inbox *before* it takes the lock again. Until it has the lock,
     nobody else reads the queue (poll sees that there is a reader). So messages are handled in the
     order in which they came.

The other threads sleep on `_changed`; the reader wakes them when it has the lock again.

With asyncio, a room is opened in the event loop's default executor, as `asyncio.to_thread` does,
because that may copy; and one thread of the endpoint waits for all awaited rooms (`async_wait.py`).

What it does not do: know the messages of rooms (the two endpoints do), own the pool or the queues,
or work in another process than the one that made it.
"""

from __future__ import annotations

import abc
import asyncio
import math
import os
import threading
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

from shmblocks.errors import InvalidStateError, PeerDiedError, PoolTimeoutError
from shmblocks.transfer.async_wait import AsyncWaits
from shmblocks.transfer.connection import Connection, EndpointStats, ExpiringDict
from shmblocks.transfer.messages import AnyMessage, Bye, Hello, RoomMessage
from shmblocks.transfer.pools import Pools
from shmblocks.transfer.queues import QueueLike
from shmblocks.transfer.room import Room, Status

if TYPE_CHECKING:
    from typing_extensions import Self

    from shmblocks.pool import BlockPool

R = TypeVar("R", bound=Room)
T = TypeVar("T")

# Seconds of one sleep while only a message can help. Smaller: more wake-ups for nothing. Larger: a
# dead peer is noticed later, and a room of another thread waits longer.
LONGEST_SLICE = 0.05
# The same while free blocks, or a full queue that is read, can help too: nothing wakes us for
# these. It grows from the first to the second. Smaller: less latency, more polls of the pool (a few
# us each).
FIRST_NAP = 0.0002
LONGEST_NAP = 0.01
# Seconds for which close(), and a wait that has ended, try to send what a full queue has not taken.
# Longer: they take longer when the other side does not read. Shorter: the other side may not be
# told the end of a room when this side's user does not poll any more.
SEND_PATIENCE = 0.2

# Ended attempts that are remembered, to recognise their late messages. Fewer: a very late message
# of a busy endpoint is taken for an early one, and kept for a while. More: memory (some 200 bytes
# each).
REMEMBERED = 4096
REMEMBERED_SECONDS = 600.0


class Endpoint(abc.ABC, Generic[R]):
    """One side of a pair: `EmbeddingEndpoint` or `LanguageEndpoint`. Borrows pools and queues."""

    def __init__(
        self, pool: BlockPool, tx: QueueLike, rx: QueueLike, *, spill: BlockPool | None = None
    ) -> None:
        """`tx` of one side is `rx` of the other.

        `spill`: a pool in host memory with the same fields and block size, used whenever `pool`
        (mostly one on a GPU) is full. Both sides give the same, or neither does.
        """
        if not pool.config.fields:
            raise ValueError(f"pool {pool.name}: expected at least one field to transfer, got none")
        self._pools = Pools(pool, spill)
        self._connection = Connection(self._pools, tx, rx)
        self._rooms: dict[int, R] = {}
        self._ended: ExpiringDict[int, bool] = ExpiringDict(REMEMBERED, REMEMBERED_SECONDS)
        self._changed = threading.Condition(threading.Lock())
        self._has_reader = False
        self._is_closed = False
        self._async_waits = AsyncWaits()
        self._pid = os.getpid()
        self._connection.say_hello()

    # ---- for users ---------------------------------------------------------------------------

    @property
    def pool(self) -> BlockPool:
        """The pool that both sides are attached to."""
        return self._pools.own

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._is_closed

    def stats(self) -> EndpointStats:
        """What was counted up to now."""
        with self._changed:
            return msgspec.structs.replace(
                self._connection.counts,
                peer=self._connection.peer_name,
                rooms_open=sum(not room.is_over for room in self._rooms.values()),
                unsent=self._connection.unsent,
            )

    def poll(self) -> None:
        """Do everything that can be done now, for every room. Never sleeps.

        No message can make it raise. It raises `InvalidStateError` on a closed endpoint, and the
        errors of the pool itself (`PoolClosedError`).
        """
        with self._changed:
            self._check_usable()
            self._pump()

    def close(self) -> None:
        """Fail every open room, tell the other side, give everything back; idempotent.

        Results that were taken stay valid until they are released. The pool and the queues stay
        open: they are the caller's. It may take SEND_PATIENCE seconds; in a coroutine:
        `await asyncio.to_thread(endpoint.close)`.
        """
        if os.getpid() != self._pid:
            return  # a forked child: rooms and blocks are the parent's
        with self._changed:
            if self._is_closed:
                return
            for room in self._rooms.values():
                room.fail("the endpoint was closed")
            self._sweep()
            self._discard_untaken()
            self._connection.say_bye()
            self._is_closed = True
            self._changed.notify_all()
        self._send_rest(SEND_PATIENCE)
        self._async_waits.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else f"{len(self._rooms)} rooms"
        peer = self._connection.peer_name or "no peer yet"
        return f"{type(self).__name__}({self.pool.name!r}, {state}, {peer})"

    # ---- rooms -------------------------------------------------------------------------------

    def _start(self, room: R) -> None:
        """Open a room and let it go as far as it can; if that raises, it holds nothing.

        Take what has arrived first: the other side may have withdrawn its request since.
        """
        with self._changed:
            try:
                self._check_usable()
                self._pump()
                self._open(room)
                self._begin(room)
                self._pump()
            except BaseException:
                if self._rooms.get(room.number) is room:
                    room.fail("it could not be started")
                    self._sweep()
                room.give_back()
                raise

    def _begin(self, room: R) -> None:
        """Give a new room what came for it before it was opened."""

    def _open(self, room: R) -> None:
        self._check_usable()
        self._sweep()
        if not 0 <= room.number < 1 << 64:
            raise ValueError(f"room: expected 0 to 2**64 - 1, got {room.number}")
        if room.number in self._rooms:
            raise ValueError(
                f"room {room.number}: is open already ({self._rooms[room.number].status}); end it "
                "first, or take another number"
            )
        self._rooms[room.number] = room

    def _check_usable(self) -> None:
        if self._is_closed:
            raise InvalidStateError(f"{self!r}: it was closed")
        if os.getpid() != self._pid:
            raise InvalidStateError(
                f"{self!r}: the process {self._pid} made it before a fork; make an endpoint in the "
                "process that uses it"
            )

    def _find(self, message: RoomMessage) -> R | None:
        """The open room that the message belongs to; counts it as late when there is none."""
        room = self._rooms.get(message.room)
        if room is not None and room.nonce == message.nonce and not room.is_over:
            return room
        self._connection.counts.late += 1
        return None

    def _abort(self, room: R, reason: str) -> bool:
        """End a room; False when it had ended before."""
        with self._changed:
            was_open = not room.is_over
            room.fail(f"aborted: {reason}")
            self._discard(room)
            self._sweep()
            self._changed.notify_all()
        return was_open

    def _sweep(self) -> None:
        """Forget the rooms that have ended, and count them."""
        counts = self._connection.counts
        for room in [room for room in self._rooms.values() if room.is_over]:
            del self._rooms[room.number]
            if room.nonce:
                self._ended.put(room.nonce, True)
            counts.rooms_succeeded += room.status is Status.Success
            counts.rooms_failed += room.status is Status.Failed
            counts.rounds += room.rounds
            counts.num_tokens += room.num_tokens
            counts.num_bytes += room.num_bytes
            self._on_end(room)

    @abc.abstractmethod
    def _handle(self, message: RoomMessage) -> None:
        """Take a message of a room. Never raises for what is in it."""

    def _on_end(self, room: R) -> None:
        """A room was swept."""

    def _on_loss(self) -> None:
        """The peer is lost; its rooms have failed."""

    def _discard(self, room: R) -> None:
        """Give back the result of a room that succeeded, if its user has not taken it."""

    def _discard_untaken(self) -> None:
        """The same for all rooms."""

    # ---- pumping (all with the lock held) ----------------------------------------------------

    def _pump(self) -> None:
        self._pools.retry_free()
        self._connection.flush()
        if not self._has_reader:
            self._connection.fetch()
        while (message := self._connection.take()) is not None:
            self._dispatch(message)
        self._connection.check_peer()
        self._fail_if_lost()
        self._advance()
        self._sweep()

    def _dispatch(self, message: AnyMessage) -> None:
        connection = self._connection
        whose = connection.identify(message)
        if whose == "foreign":
            connection.counts.foreign += 1
            return
        if whose == "newcomer":
            self._fail_if_lost()
            connection.adopt(message.sender.participant)
        if isinstance(message, Hello):
            connection.on_hello(message)
        elif isinstance(message, Bye):
            connection.on_bye()
        else:
            self._handle(message)

    def _fail_if_lost(self) -> None:
        loss = self._connection.loss
        if loss is None:
            return
        must_reap = issubclass(loss.error, PeerDiedError) and bool(self._rooms)
        for room in self._rooms.values():
            room.fail(f"{loss.reason}; {room.waits_for()}", loss.error, tell_peer=False)
        self._sweep()
        self._on_loss()
        if must_reap:
            for pool in self._pools.all:
                pool.reap()

    def _advance(self) -> None:
        """Let every room go on, the oldest first.

        Once the pool has refused a number of blocks, rooms that wait for as many or more are not
        asked in this poll: a hundred waiting rooms would be a hundred searches of a full pool.
        """
        refused = math.inf
        for room in list(self._rooms.values()):
            if room.blocks_wanted < refused:
                room.attempt(room.advance)
                refused = min(refused, room.blocks_wanted or math.inf)

    # ---- waiting -----------------------------------------------------------------------------

    def _wait(self, room: R, timeout: float | None, start: float | None = None) -> None:
        """Pump until the room has ended; `PoolTimeoutError` says whom it waits for."""
        start = time.monotonic() if start is None else start
        deadline = math.inf if timeout is None else start + timeout
        with self._changed:
            if not self._pump_until(lambda: room.is_over, deadline):
                raise PoolTimeoutError(self._overdue(room, time.monotonic() - start))
        self._send_rest(min(deadline - time.monotonic(), SEND_PATIENCE))

    async def _wait_async(self, room: R, timeout: float | None) -> None:
        """`_wait` without blocking the event loop. When cancelled, the room stays open."""
        if room.is_over:
            return
        start = time.monotonic()
        if not await self._async_waits.wait(self._serve, room, timeout):
            # One last poll, and the text of the error: both may wait for a lock.
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(None, self._wait, room, timeout, start)

    def _serve(self, has_waiters: Callable[[], bool]) -> None:
        """Pump for coroutines, in a thread, until none waits and what they said is sent."""
        give_up = 0.0

        def is_done() -> bool:
            nonlocal give_up
            now = time.monotonic()
            if has_waiters():
                give_up = now + SEND_PATIENCE
                return False
            return not self._connection.unsent or now > give_up

        with self._changed:
            self._pump_until(is_done, math.inf)

    def _pump_until(self, is_done: Callable[[], bool], deadline: float) -> bool:
        """Pump, with sleeps, until it is done; False when the deadline has passed. Lock held."""
        nap = FIRST_NAP
        while not is_done():
            self._check_usable()
            self._pump()
            if is_done():
                break
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            is_hungry = self._is_hungry()
            nap = min(2 * nap, LONGEST_NAP) if is_hungry else FIRST_NAP
            self._sleep(min(left, nap if is_hungry else LONGEST_SLICE))
        return True

    def _is_hungry(self) -> bool:
        """Whether a room may go on without a message."""
        return self._connection.unsent > 0 or any(
            room.blocks_wanted for room in self._rooms.values()
        )

    def _sleep(self, seconds: float) -> None:
        """Sleep without the lock: on the queue, or until the reader is back."""
        if self._has_reader:
            self._changed.wait(seconds)
            return
        self._has_reader = True
        self._changed.release()
        try:
            self._connection.wait(seconds)
        finally:
            self._changed.acquire()
            self._has_reader = False
            self._changed.notify_all()

    def _overdue(self, room: R, waited: float) -> str:
        peer = self._connection.peer_name or (
            "nobody yet: no message has come; was the other endpoint made, and is its rx this "
            "one's tx?"
        )
        text = (
            f"room {room.number} has not ended after {waited:.2f} s (opened "
            f"{time.monotonic() - room.opened_at:.2f} s ago, now {room.status}): "
            f"{room.waits_for()}; the other side is {peer}; the room stays open"
        )
        return f"{text}\n{self._pools.who_holds()}" if room.blocks_wanted else text

    def _send_rest(self, seconds: float) -> None:
        """Try to send what a full queue has not taken."""
        deadline = time.monotonic() + seconds
        while self._connection.unsent and time.monotonic() < deadline:
            time.sleep(FIRST_NAP)
            with self._changed:
                if self._is_closed:
                    self._connection.flush()
                else:
                    self._pump()  # the other side may be doing the same, so both must read


class Transfer(abc.ABC, Generic[R, T]):
    """What a user holds of a room: `Sender` or `Receiver`. Any thread may use it."""

    def __init__(self, endpoint: Endpoint[R], room: R) -> None:
        self._endpoint = endpoint
        self._room = room

    @property
    def room(self) -> int:
        """The room's number."""
        return self._room.number

    @property
    def status(self) -> Status:
        """The room's status; `poll` and `wait` bring it up to date."""
        return self._room.status

    @property
    def failure(self) -> str | None:
        """Why it failed; None when it has not."""
        return self._room.failure

    @property
    def rounds(self) -> int:
        """Chunks that went over."""
        return self._room.rounds

    @property
    def num_tokens(self) -> int:
        """Tokens that went over."""
        return self._room.num_tokens

    @property
    def num_bytes(self) -> int:
        """Bytes that went over."""
        return self._room.num_bytes

    def poll(self) -> Status:
        """Do what can be done now, for every room of the endpoint; gives this room's status."""
        if not self._room.is_over:
            self._endpoint.poll()
        return self._room.status

    def abort(self, reason: str = "by its user") -> bool:
        """End the room as Failed, give everything back, tell the other side why.

        False when it had ended before; a result that nobody has taken is given back even then.
        """
        return self._endpoint._abort(self._room, reason)

    def wait(self, timeout: float | None = None) -> T:
        """Wait for Success; a Receiver gives the result, which holds blocks until it is released.

        Raises `TransferError` with the reason when the room failed, `PeerDiedError` when the other
        side died, and `PoolTimeoutError` after `timeout` seconds: the room stays open, wait again
        or abort it.
        """
        self._endpoint._wait(self._room, timeout)
        return self._outcome()

    async def wait_async(self, timeout: float | None = None) -> T:
        """`wait`, without blocking the event loop. `await transfer` does the same.

        When cancelled, the room stays open, and a result stays untaken.
        """
        await self._endpoint._wait_async(self._room, timeout)
        return self._outcome()

    def __await__(self) -> Generator[Any, None, T]:
        return self.wait_async().__await__()

    def _outcome(self) -> T:
        if self._room.status is Status.Failed:
            raise self._room.error(self._room.failure)
        return self._result()

    @abc.abstractmethod
    def _result(self) -> T:
        """What `wait` gives, after Success."""

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(room={self.room}, {self.status}, {self.num_tokens} tokens in "
            f"{self.rounds} round(s))"
        )


X = TypeVar("X", bound=Transfer[Any, Any])


async def open_async(open_room: Callable[[], X]) -> X:
    """`open_room()` in the loop's default executor. When cancelled, the room is aborted."""
    loop = asyncio.get_running_loop()
    opened: list[X] = []
    # The end of `work` and the cancellation both try to take it; the second one aborts the room.
    first = threading.Lock()

    def work() -> X | None:
        try:
            opened.append(open_room())
        except Exception:
            if first.acquire(blocking=False):
                raise
            return None
        if not first.acquire(blocking=False):
            opened[0].abort("cancelled while it was being opened")
        return opened[0]

    try:
        await asyncio.shield(loop.run_in_executor(None, work))
    except asyncio.CancelledError:
        if not first.acquire(blocking=False) and opened:
            loop.run_in_executor(None, opened[0].abort, "cancelled while it was being opened")
        raise
    return opened[0]
