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

import contextlib
import math
import operator
import ssl
import time
from collections.abc import Iterator

from shmblocks._state.counters import Counter
from shmblocks._state.key_index import stored_key
from shmblocks._state.layout import UNBOUNDED
from shmblocks.errors import InvalidStateError, KeyExistsError, ShmBlocksError, StaleHandleError
from shmblocks.handle import BlockHandle
from shmblocks.lease import Lease
from shmblocks.nodes.address import Address, address_text, checked_address
from shmblocks.nodes.attempt import Attempt, in_thread
from shmblocks.nodes.connections import Connections
from shmblocks.nodes.conversation import Conversation, Lands, Part, require_foreign, require_part
from shmblocks.nodes.dialing import Dialer
from shmblocks.nodes.handshake import checked_key
from shmblocks.nodes.info import RemotePoolStats
from shmblocks.nodes.landings import Landing, Landings, landed
from shmblocks.nodes.leaving import AllOf, close_at_exit
from shmblocks.nodes.messages import ServedPool
from shmblocks.nodes.nixl_reads import NixlReads, is_nixl
from shmblocks.nodes.stream import (
    ConnectionLostError,
    DeadlinePassedError,
    Stream,
    checked_patience,
)
from shmblocks.pool import BlockPool

# Seconds that one fetch may take, if nothing else is said. Shorter: a long queue for blocks is
# called a failure. Longer: a server that stands still is noticed later.
DEFAULT_TIMEOUT = 30.0
# Seconds that an entry that was just fetched is not evicted: until it is leased, which takes some
# microseconds. Shorter: a process that is stopped between the two fetched for nothing. Longer: room
# that others need.
HOLD = 1.0


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
        checksum: bool = False,
        host: BlockPool | None = None,
        engine: str = "tcp",
    ) -> None:
        """Connects at the first fetch.

        pool         where fetched blocks go
        address      (host, port) of the other node's server
        key          the same bytes (at least 16) on both nodes; None only for a server on loopback
        connections  fetches that may be under way at once
        tls          a client's context, for a server that has one
        patience     seconds without any acknowledgement after which the other node is lost
        checksum     compare a CRC-32 of all rows: for networks whose own checks are not enough. It
                     costs both nodes more than the transfer does
        host         for a pool on a GPU: a pool in host memory with the same fields (a spill pool).
                     Rows land there, and go on to the GPU on torch's current stream; this pins it
        engine       how rows come: "tcp", over the connection; or "nixl", read by an agent of NIXL
                     in a process of its own (experimental; `shmblocks[nixl]`, and a server with
                     `nixl=True`)

        Raises ValueError, `ImportError` (NIXL is not installed).
        """
        self._pool = pool
        self._landings = Landings(pool, host)
        self._address = checked_address(address)
        self._peer = address_text(self._address)
        if operator.index(connections) < 1:
            raise ValueError(f"connections: expected at least 1, got {connections}")
        patience = checked_patience(patience)
        self._connections = Connections(connections, f"RemotePool of node {self._peer}")
        self._dialer = Dialer(self._address, checked_key(key), tls, patience, self._connections)
        self._nixl = None
        if is_nixl(engine, tls):
            self._nixl = NixlReads(self._landings.host_pool, self._peer, patience)
        self._conversation = Conversation(pool, self._peer, checksum, self._nixl)
        self._fetched = 0
        self._failed = 0
        self._received_bytes = 0
        self._failed_at = -math.inf
        self._ends = AllOf(self._connections, self._nixl)
        self._finalizer = close_at_exit(self, self._ends)

    # ---- life --------------------------------------------------------------------------------

    @property
    def address(self) -> Address:
        """(host, port) of the other node's server."""
        return self._address

    @property
    def is_closed(self) -> bool:
        """Whether it was closed in this process."""
        return self._connections.is_closed

    @property
    def is_own(self) -> bool:
        """Whether the node turned out to be this one: it serves the pool that is fetched into."""
        return self._pool.pool_id in self._conversation.served

    def close(self) -> None:
        """End all connections; fetches of other threads raise. Idempotent."""
        self._ends.close()
        self._finalizer.detach()

    def __enter__(self) -> RemotePool:
        return self

    def __exit__(self, *_: object) -> None:
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
            quarantined=0 if self._nixl is None else self._nixl.quarantined_blocks,
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
            whole = Part(handle, 0, handle.num_tokens, 0)
            with self._landings.reserve(handle.num_tokens, req_id, attempt.seconds_left) as landing:
                stream = self._receive(attempt, landed(landing), whole)
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
                whole = Part(handle, 0, handle.num_tokens, 0)
                landing = await self._landings.reserve_async(
                    handle.num_tokens, req_id, attempt.seconds_left
                )
                with landing:
                    stream = await in_thread(
                        lambda: self._receive(attempt, landed(landing), whole),
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
        require_part("first_token, num_tokens", first_token, count, handle)
        require_part("offset, num_tokens", offset, count, landing)
        if self._landings.is_on_gpu:
            raise ValueError(
                f"landing: expected a reservation in host memory, {self._pool.name} lies on "
                f"{self._pool.config.device}: fetch into the host pool, and copy"
            )
        self._pool.view(landing)
        # A writer's lease: should somebody free the landing, its blocks are not used again while
        # bytes come in.
        with attempt, self._slot(attempt), self._pool.open_for_write(landing) as lease:
            part = Part(handle, first_token, count, offset)
            stream = self._receive(attempt, lease, part)
            self._finish(attempt, stream, count, keep_claim)

    def fetch_key(
        self,
        key: bytes,
        *,
        num_tokens: int | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        req_id: str | None = None,
    ) -> Lease | None:
        """Bring the entry that a cache of the other node has under a key into the own pool's cache.

        A lease on the own, new entry. None: that node has none, one of another length than
        `num_tokens` (None: any), or its pool is at another epoch; or there is no room here that may
        be evicted, since a cache never waits for room. A claim of this process on the key ends when
        it is published; without success it stays.

        Raises `KeyExistsError` when the own cache has got an entry meanwhile, and as `fetch` does.
        """
        attempt = self._attempt_key(key, timeout)
        with attempt, self._slot(attempt):
            return self._fetch_key(attempt, key, num_tokens, req_id)

    async def fetch_key_async(
        self,
        key: bytes,
        *,
        num_tokens: int | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        req_id: str | None = None,
    ) -> Lease | None:
        """`fetch_key` for asyncio: a thread does it. Cancelled, it closes its connection first."""
        attempt = self._attempt_key(key, timeout)
        with attempt:
            await self._connections.acquire_async(attempt.deadline)
            try:
                return await in_thread(
                    lambda: self._fetch_key(attempt, key, num_tokens, req_id),
                    attempt.cancel,
                    _release,
                )
            finally:
                self._connections.release()

    def ping(self, timeout: float | None = 5.0) -> float:
        """Seconds of one round trip to the server, over a connection that is open already or new.

        Raises as `fetch` does.
        """
        attempt = Attempt(self, "ping", timeout)
        with attempt, self._slot(attempt):
            stream = self._stream(attempt)
            with self._dropping(attempt, stream):
                began = time.monotonic()
                self._conversation.ping(attempt, stream)
                seconds = time.monotonic() - began
            self._connections.keep(stream)
            return seconds

    def served_pools(self, timeout: float | None = 5.0) -> tuple[ServedPool, ...]:
        """The pools that the server serves now. Raises as `fetch` does."""
        self.ping(timeout)
        return tuple(self._conversation.served.values())

    # ---- the parts of a fetch by key ---------------------------------------------------------

    def _attempt_key(self, key: bytes, timeout: float | None) -> Attempt:
        stored_key(key)  # TypeError, ValueError: not a key
        return Attempt(self, f"key {key.hex()}", timeout)

    def _fetch_key(
        self, attempt: Attempt, key: bytes, num_tokens: int | None, req_id: str | None
    ) -> Lease | None:
        handle = self._find(attempt, key)
        if handle is None or num_tokens not in (None, handle.num_tokens):
            return None
        landing = self._reserve_entry(handle, req_id)
        if landing is None:
            return None
        with landing:
            try:
                stream = self._receive(
                    attempt, landed(landing), Part(handle, 0, handle.num_tokens, 0)
                )
            except (StaleHandleError, InvalidStateError):
                return None  # evicted, or dropped, since it was found
            return self._enter(attempt, stream, landing, key)

    def _find(self, attempt: Attempt, key: bytes) -> BlockHandle | None:
        """The handle of the key's entry over there."""
        stream = self._stream(attempt)
        with self._dropping(attempt, stream):
            found = self._conversation.why_no_entry() or self._conversation.find(
                attempt, stream, key
            )
        self._connections.keep(stream)
        if isinstance(found, ShmBlocksError):
            raise found
        return found

    def _reserve_entry(self, handle: BlockHandle, req_id: str | None) -> Landing | None:
        """Blocks for an entry, evicting others; the length is the other node's word."""
        config = self._pool.config
        if config.blocks_for(handle.num_tokens) > config.total_blocks:
            return None
        return self._landings.reserve_now(handle.num_tokens, req_id)

    def _enter(
        self, attempt: Attempt, stream: Stream, landing: Landing, key: bytes
    ) -> Lease | None:
        """Publish what has come under its key, and tell the other node."""
        try:
            local = landing.publish(readers=UNBOUNDED, key=key, hold=HOLD)
        except KeyExistsError:
            # It came whole, so that the connection is fine.
            self._finish(attempt, stream, landing.handle.num_tokens, keep_claim=False)
            raise
        except BaseException:
            self._connections.drop(stream)
            raise
        self._finish(attempt, stream, local.num_tokens, keep_claim=False)
        try:
            return self._pool.open(local)
        except StaleHandleError:
            return None  # dropped, by somebody who drops entries

    # ---- the parts of a fetch ----------------------------------------------------------------

    def _attempt(self, handle: BlockHandle, timeout: float | None) -> Attempt:
        require_foreign(handle, self._pool)
        return Attempt(self, str(handle), timeout)

    @contextlib.contextmanager
    def _slot(self, attempt: Attempt) -> Iterator[None]:
        self._connections.acquire(attempt.deadline)
        try:
            yield
        finally:
            self._connections.release()

    def _stream(self, attempt: Attempt) -> Stream:
        """A connection that nobody else uses."""
        attempt.waits_for = "a connection"
        stream = self._connections.take_idle()
        if stream is None:

            def use(stream: Stream) -> None:
                attempt.use(stream)
                self._connections.watch(stream)

            stream, pools = self._dialer.dial(attempt.deadline, use)
            self._conversation.served = {pool.pool_id: pool for pool in pools}
        return stream

    @contextlib.contextmanager
    def _dropping(self, attempt: Attempt, stream: Stream) -> Iterator[None]:
        """Close the connection when the block does not come to its end."""
        try:
            attempt.use(stream)
            yield
        except BaseException:
            self._connections.drop(stream)
            raise

    def _receive(self, attempt: Attempt, landing: Lands, part: Part) -> Stream:
        """Ask, and receive into the landing; the connection, which waits for `Done`."""
        stream = self._stream(attempt)
        try:
            attempt.use(stream)
            refusal = self._conversation.why_not(part.handle) or self._conversation.fetch(
                attempt, stream, landing, part
            )
        except BaseException:
            self._connections.drop(stream)
            raise
        if refusal is not None:
            self._connections.keep(stream)
            raise refusal
        return stream

    def _publish(
        self, attempt: Attempt, stream: Stream, landing: Landing, readers: int
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

    def _finish(self, attempt: Attempt, stream: Stream, num_tokens: int, keep_claim: bool) -> None:
        """Everything is here: say so, and count. A connection that is lost now is no failure."""
        try:
            self._conversation.done(attempt, stream, keep_claim)
        except (ConnectionLostError, DeadlinePassedError):
            self._connections.drop(stream)
        except BaseException:
            self._connections.drop(stream)
            raise
        else:
            self._connections.keep(stream)
        num_bytes = num_tokens * self._pool.config.token_bytes
        self._fetched += 1
        self._received_bytes += num_bytes
        with contextlib.suppress(ShmBlocksError):
            self._pool.peer_state.fetched(num_bytes)

    def note_failure(self, *, is_the_nodes: bool) -> None:
        """For the attempts of this reader."""
        self._failed += 1
        with contextlib.suppress(ShmBlocksError):
            self._pool.peer_state.count(Counter.NODE_FAILURES)
        if is_the_nodes:
            self._failed_at = time.monotonic()

    @property
    def seconds_since_failure(self) -> float:
        """Since the node last failed, as opposed to what it was asked for; infinite: it has not."""
        return time.monotonic() - self._failed_at


def _release(lease: Lease | None) -> None:
    if lease is not None:
        lease.release()
