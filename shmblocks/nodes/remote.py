"""`RemotePool`: another node's pool, as a process on this node reads from it.

    local = remote.fetch(handle)

     1  a connection's slot        at most `connections` fetches are under way; the others wait
     2  blocks in the own pool     in its wait queue, so that the other node's lease is short
     3  Fetch  ---->               the server takes one of the readers that `publish` announced
     4  <---- Taken, rows, Sent    recv_into straight into the blocks
     5  publish                    for the readers on this node
     6  Done   ---->               the server releases its lease

Contract
- Only whole data is published: everything came, and the server says behind the last byte that its
  lease was still open.
- A fetch that fails gives everything back: the connection is closed first, then the blocks are
  free; nothing is written into them any more. The other node has its reader still to come, so that
  the handle can be fetched again, or by another node.
- Killed between 5 and 6, the data is on this node and the other node still expects a reader, who
  does not come: it gives the blocks back when its `unclaimed_timeout` is over. (The other way round
  a death would lose the data.)
- `timeout` bounds all of it. What was waited for stands in the error.

What it does not do: try again, look for another node that has the same, or change what it fetched.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import math
import operator
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TypeVar

from shmblocks._os.wait import deadline_of, seconds_left
from shmblocks.errors import (
    ForeignHandleError,
    IncompatibleConfigError,
    InvalidStateError,
    PeerDiedError,
    PoolClosedError,
    PoolTimeoutError,
    ShmBlocksError,
)
from shmblocks.handle import BlockHandle
from shmblocks.lease import Lease, Reservation
from shmblocks.nodes.address import Address, address_text, checked_address
from shmblocks.nodes.connections import Connections
from shmblocks.nodes.dialing import Dialer
from shmblocks.nodes.handshake import BusyError, checked_key
from shmblocks.nodes.info import RemotePoolStats
from shmblocks.nodes.leaving import close_at_exit
from shmblocks.nodes.messages import (
    Done,
    Fetch,
    Ping,
    Refused,
    Sent,
    ServedPool,
    Taken,
    describe_layout,
    error_of,
    layout_of,
)
from shmblocks.nodes.rows import AUX, require_host_pool, rows_of
from shmblocks.nodes.stream import (
    ConnectionLostError,
    DeadlinePassedError,
    Stream,
    checked_patience,
)
from shmblocks.pool import BlockPool

T = TypeVar("T")

# Seconds that one fetch may take, if nothing else is said. Shorter: a long queue for blocks is
# called a failure. Longer: a server that stands still is noticed later.
DEFAULT_TIMEOUT = 30.0


class RemotePool:
    """The pools of one node server, to fetch from into a pool of this node.

    Close it before the pool that it fetches into. After a fork the child may go on using it, over
    connections of its own.
    """

    def __init__(
        self,
        pool: BlockPool,
        address: Address,
        *,
        key: bytes | None = None,
        connections: int = 2,
        tls: ssl.SSLContext | None = None,
        patience: float = 3.0,
    ) -> None:
        """Connects at the first fetch.

        pool         where fetched blocks go; in host memory
        address      (host, port) of the other node's server
        key          the same bytes (at least 16) on both nodes; None only for a server on loopback
        connections  fetches that may be under way at once
        tls          a client's context, for a server that has one
        patience     seconds without any acknowledgement after which the other node is lost
        """
        self._pool = require_host_pool(pool)
        self._address = checked_address(address)
        self._peer = address_text(self._address)
        self._layout = layout_of(pool.config)
        if operator.index(connections) < 1:
            raise ValueError(f"connections: expected at least 1, got {connections}")
        patience = checked_patience(patience)
        self._connections = Connections(connections, f"RemotePool of node {self._peer}")
        self._dialer = Dialer(self._address, checked_key(key), tls, patience, self._connections)
        self._served: dict[int, ServedPool] = {}
        self._rids = itertools.count(1)
        self._fetched = 0
        self._failed = 0
        self._received_bytes = 0
        self._finalizer = close_at_exit(self, self._connections)

    # ---- life --------------------------------------------------------------------------------

    @property
    def address(self) -> Address:
        """(host, port) of the other node's server."""
        return self._address

    @property
    def is_closed(self) -> bool:
        """Whether it was closed in this process."""
        return self._connections.is_closed

    def close(self) -> None:
        """End all connections; fetches of other threads raise. Idempotent."""
        self._connections.close()
        self._finalizer.detach()

    def __enter__(self) -> RemotePool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else f"{self._connections.in_use} fetching"
        return f"RemotePool({self._peer}, into {self._pool.name}, {state})"

    def stats(self) -> RemotePoolStats:
        """Counts of this object since it was made."""
        return RemotePoolStats(
            address=self._peer,
            fetched=self._fetched,
            failed=self._failed,
            in_flight=self._connections.in_use,
            idle=self._connections.idle,
            received_bytes=self._received_bytes,
        )

    # ---- fetching ----------------------------------------------------------------------------

    def fetch(
        self,
        handle: BlockHandle,
        *,
        readers: int = 1,
        timeout: float | None = DEFAULT_TIMEOUT,
        req_id: str | None = None,
    ) -> BlockHandle:
        """Bring what a handle of the other node names into the own pool, and publish it.

        The bytes cross once, for `readers` readers on this node; over there it is one reader. The
        handle that this returns is the own pool's. `timeout` in seconds (None: for ever) covers the
        wait for blocks too; `req_id` is shown by inspectors.

        Raises `StaleHandleError`, `ForeignHandleError` (the node serves no such pool: it was
        created anew), `InvalidStateError` (not published, or all its readers were there),
        `PeerDiedError` (the connection or the node was lost), `PoolTimeoutError`,
        `IncompatibleConfigError` (other fields or block size), `AuthenticationError`.
        """
        attempt = self._attempt(handle, timeout)
        with attempt, self._slot(attempt):
            attempt.waits_for = f"blocks in pool {self._pool.name}"
            left = seconds_left(attempt.deadline)
            seconds = None if left == math.inf else max(left, 0.0)
            with self._pool.reserve(handle.num_tokens, req_id=req_id, timeout=seconds) as landing:
                stream = self._receive(attempt, landing, 0, handle.num_tokens, 0)
                return self._publish(attempt, stream, landing, readers)

    async def fetch_async(
        self,
        handle: BlockHandle,
        *,
        readers: int = 1,
        timeout: float | None = DEFAULT_TIMEOUT,
        req_id: str | None = None,
    ) -> BlockHandle:
        """`fetch` for asyncio: a thread moves the bytes.

        Cancelled, it closes its connection and gives everything back before it ends.
        """
        attempt = self._attempt(handle, timeout)
        with attempt:
            await self._connections.acquire_async(attempt.deadline)
            try:
                attempt.waits_for = f"blocks in pool {self._pool.name}"
                left = seconds_left(attempt.deadline)
                seconds = None if left == math.inf else max(left, 0.0)
                landing = await self._pool.reserve_async(
                    handle.num_tokens, req_id=req_id, timeout=seconds
                )
                with landing:
                    stream = await _in_thread(
                        lambda: self._receive(attempt, landing, 0, handle.num_tokens, 0),
                        attempt.cancel,
                        self._connections.drop,
                    )
                    # Nothing is awaited from here on, so that no cancellation comes in between.
                    return self._publish(attempt, stream, landing, readers)
            finally:
                self._connections.release()

    def fetch_into(
        self,
        handle: BlockHandle,
        landing: BlockHandle,
        *,
        first_token: int = 0,
        num_tokens: int | None = None,
        offset: int = 0,
        keep_claim: bool = False,
        timeout: float | None = DEFAULT_TIMEOUT,
    ) -> None:
        """Bring a part of what a handle of the other node names into a reservation of this process.

        landing      a reservation of the own pool; it is not published here
        first_token  the first token of the part; `num_tokens` None: from there to the end
        offset       the token of `landing` that the part begins at
        keep_claim   another part is to be fetched: the other node's reader is still to come

        `aux` becomes the handle's. When it raises, some of the part may have been written. Errors
        as in `fetch`.
        """
        attempt = self._attempt(handle, timeout)
        count = handle.num_tokens - first_token if num_tokens is None else num_tokens
        _require_part("first_token, num_tokens", first_token, count, handle)
        _require_part("offset, num_tokens", offset, count, landing)
        self._pool.view(landing)
        # A writer's lease: should somebody free the landing, its blocks are not used again while
        # bytes come in.
        with attempt, self._slot(attempt), self._pool.open_for_write(landing) as lease:
            stream = self._receive(attempt, lease, first_token, count, offset)
            self._finish(attempt, stream, count, keep_claim)

    def ping(self, timeout: float | None = 5.0) -> float:
        """Seconds of one round trip to the server, over a connection that is open already or new.

        Raises as `fetch` does.
        """
        attempt = _Attempt(self, "ping", deadline_of(timeout), timeout)
        with attempt, self._slot(attempt):
            stream = self._stream(attempt)
            with self._dropping(attempt, stream):
                attempt.waits_for = "an answer"
                began = time.monotonic()
                question = Ping(next(self._rids))
                stream.send(question, attempt.deadline)
                if stream.receive(attempt.deadline, Ping) != question:
                    raise ConnectionLostError("it answered something that was not asked")
                seconds = time.monotonic() - began
            self._connections.keep(stream)
            return seconds

    def served_pools(self, timeout: float | None = 5.0) -> tuple[ServedPool, ...]:
        """The pools that the server serves now. Raises as `fetch` does."""
        self.ping(timeout)
        return tuple(self._served.values())

    # ---- the parts of a fetch ----------------------------------------------------------------

    def _attempt(self, handle: BlockHandle, timeout: float | None) -> _Attempt:
        if not isinstance(handle, BlockHandle):
            raise TypeError(f"handle: expected BlockHandle, got {type(handle).__name__}")
        if handle.is_fake:
            raise InvalidStateError(f"{handle}: a fake handle names no blocks to fetch")
        if handle.pool_id == self._pool.pool_id:
            raise ForeignHandleError(
                f"{handle}: it is of this node's own pool {self._pool.name}: open it there"
            )
        return _Attempt(self, str(handle), deadline_of(timeout), timeout, handle)

    @contextlib.contextmanager
    def _slot(self, attempt: _Attempt) -> Iterator[None]:
        self._connections.acquire(attempt.deadline)
        try:
            yield
        finally:
            self._connections.release()

    def _stream(self, attempt: _Attempt) -> Stream:
        """A connection that nobody else uses."""
        attempt.waits_for = "a connection"
        stream = self._connections.take_idle()
        if stream is None:

            def use(stream: Stream) -> None:
                attempt.use(stream)
                self._connections.watch(stream)

            stream, pools = self._dialer.dial(attempt.deadline, use)
            self._served = {pool.pool_id: pool for pool in pools}
        return stream

    @contextlib.contextmanager
    def _dropping(self, attempt: _Attempt, stream: Stream) -> Iterator[None]:
        """Close the connection when the block does not come to its end."""
        try:
            attempt.use(stream)
            yield
        except BaseException:
            self._connections.drop(stream)
            raise

    def _receive(
        self,
        attempt: _Attempt,
        landing: Reservation | Lease,
        first_token: int,
        num_tokens: int,
        offset: int,
    ) -> Stream:
        """Ask, and receive into the landing; the connection, which waits for `Done`."""
        stream = self._stream(attempt)
        try:
            attempt.use(stream)
            handle = attempt.handle
            refusal = self._why_not(handle) or self._ask(
                attempt, stream, handle, landing, first_token, num_tokens, offset
            )
        except BaseException:
            self._connections.drop(stream)
            raise
        if refusal is not None:
            self._connections.keep(stream)
            raise refusal
        return stream

    def _why_not(self, handle: BlockHandle) -> ShmBlocksError | None:
        """What the handshake already tells about a handle."""
        pool = self._served.get(handle.pool_id)
        if pool is None:
            names = ", ".join(f"{each.name} ({each.pool_id:#x})" for each in self._served.values())
            return ForeignHandleError(
                f"{handle}: node {self._peer} does not serve the pool {handle.pool_id:#x}, but "
                f"{names or 'none'}: it is another node's, or the pool was created anew since"
            )
        if pool.layout != self._layout:
            return IncompatibleConfigError(
                f"{handle}: pool {pool.name} of node {self._peer} has {pool.description}; pool "
                f"{self._pool.name} of this node has {describe_layout(self._pool.config)}: create "
                "both with the same fields and block size"
            )
        return None

    def _ask(
        self,
        attempt: _Attempt,
        stream: Stream,
        handle: BlockHandle,
        landing: Reservation | Lease,
        first_token: int,
        num_tokens: int,
        offset: int,
    ) -> ShmBlocksError | None:
        """Everything up to `Sent`; the error of a refusal, after which the connection is fine."""
        deadline = attempt.deadline
        rid = attempt.rid = next(self._rids)
        attempt.waits_for = "an answer"
        stream.send(Fetch(rid, handle.encode(), first_token, num_tokens), deadline)
        taken = stream.receive(deadline, Taken, Refused)
        if taken.rid != rid:
            raise ConnectionLostError("it answered something that was not asked")
        if isinstance(taken, Refused):
            return error_of(taken, f"{handle}: node {self._peer}")
        if taken.num_tokens != handle.num_tokens:
            raise ConnectionLostError(
                f"it has {taken.num_tokens} tokens under a handle of {handle.num_tokens}"
            )
        attempt.waits_for = "its rows"
        for rows in rows_of(self._pool.config, landing, offset, num_tokens):
            stream.receive_into(rows, deadline)
        if stream.receive(deadline, Sent).rid != rid:
            raise ConnectionLostError("it answered something that was not asked")
        landing.memory(AUX)[:] = taken.aux
        return None

    def _publish(
        self, attempt: _Attempt, stream: Stream, landing: Reservation, readers: int
    ) -> BlockHandle:
        """Publish what has come, and tell the other node."""
        try:
            local = landing.publish(readers=readers)
        except BaseException:
            self._connections.drop(stream)
            raise
        try:
            self._finish(attempt, stream, local.num_tokens, keep_claim=False)
        except BaseException:
            # Interrupted: nobody learns of this handle.
            self._pool.free(local)
            raise
        return local

    def _finish(self, attempt: _Attempt, stream: Stream, num_tokens: int, keep_claim: bool) -> None:
        """Everything is here: say so, and count. A connection that is lost now is no failure."""
        try:
            stream.send(Done(attempt.rid, keep_claim), attempt.deadline)
        except (ConnectionLostError, DeadlinePassedError):
            self._connections.drop(stream)
        except BaseException:
            self._connections.drop(stream)
            raise
        else:
            self._connections.keep(stream)
        self._fetched += 1
        self._received_bytes += num_tokens * self._pool.config.token_bytes

    def note_failure(self) -> None:
        """For the attempts of this reader."""
        self._failed += 1


class _Attempt:
    """One fetch: until when, what it waits for just now, and what its failure is called.

    As a context manager it turns what goes wrong on the wire into the library's errors.
    """

    def __init__(
        self,
        remote: RemotePool,
        what: str,
        deadline: float | None,
        timeout: float | None,
        handle: BlockHandle | None = None,
    ) -> None:
        self._remote = remote
        self._what = what
        self._handle = handle
        self._timeout = timeout
        self.deadline = deadline
        self.waits_for = "another fetch to end (`connections` are in use)"
        self.rid = 0
        self._stream: Stream | None = None
        self._is_cancelled = False

    @property
    def handle(self) -> BlockHandle:
        """What is fetched."""
        if self._handle is None:
            raise InvalidStateError(f"{self._what}: fetches nothing")
        return self._handle

    def use(self, stream: Stream) -> None:
        """From now on a cancellation aborts this connection."""
        self._stream = stream
        if self._is_cancelled:
            stream.abort()

    def cancel(self) -> None:
        """From another thread: end soon."""
        self._is_cancelled = True
        # Not waited for any longer, wherever it is.
        self.deadline = 0.0
        if self._stream is not None:
            self._stream.abort()

    def __enter__(self) -> _Attempt:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            return
        self._remote.note_failure()
        told = self._told(error)
        if told is not None:
            raise told from error

    def _told(self, error: BaseException) -> ShmBlocksError | None:
        node = f"{self._what}: node {address_text(self._remote.address)}"
        if isinstance(error, DeadlinePassedError):
            return PoolTimeoutError(
                f"{node}: not here within {self._timeout:g} s; it waited for {self.waits_for}"
            )
        if isinstance(error, BusyError):
            return PoolTimeoutError(f"{node}: not here within {self._timeout or 0:g} s; {error}")
        if isinstance(error, ConnectionLostError):
            if self._remote.is_closed:
                return PoolClosedError(f"{node}: the RemotePool was closed in this process")
            return PeerDiedError(f"{node}: lost while waiting for {self.waits_for}: {error}")
        return None


def _require_part(what: str, first: int, count: int, handle: BlockHandle) -> None:
    first, count = operator.index(first), operator.index(count)
    if first < 0 or count < 1 or first + count > handle.num_tokens:
        raise ValueError(
            f"{what}: expected a part of the {handle.num_tokens} tokens of {handle}, got {count} "
            f"tokens from token {first} on"
        )


async def _in_thread(
    body: Callable[[], T], cancel: Callable[[], None], undo: Callable[[T], None]
) -> T:
    """`body()` in a thread of its own; cancelled, it is told to end, and waited for.

    `undo` gets the result of a body that had come to its end just before it was cancelled.
    """
    ending: concurrent.futures.Future[T] = concurrent.futures.Future()
    ending.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = body()
        except BaseException as error:  # noqa: BLE001 - raised in the coroutine, whatever it is
            ending.set_exception(error)
        else:
            ending.set_result(result)

    threading.Thread(target=run, name="shmblocks-fetch", daemon=True).start()
    waiting = asyncio.wrap_future(ending)
    try:
        await asyncio.wait({waiting})
    except BaseException:
        while not waiting.done():
            # Again and again: it may just be on its way from one connection to the next. Cancelled
            # once more meanwhile, it still waits: nothing may be received after it has ended.
            cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({waiting}, timeout=0.02)
        if waiting.exception() is None:
            undo(waiting.result())
        raise
    return waiting.result()
