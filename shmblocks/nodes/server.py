"""`NodeServer`: gives the blocks of this node's pools to readers on other nodes.

    one thread accepts; one thread per connection serves it:

     Fetch{handle}                          1  lease = pool.open(handle)   a participant of the pool
     Taken, rows, Sent  ---->               2  send() copies out of the pool under the lease
     <---- Done                             3  lease.release()

Contract
- What is sent was read under an open lease: `Sent` follows the last byte only if the lease was
  still open then. A reader publishes nothing without it.
- A lease is released as read only when the reader has said `Done`. Whatever else ends the fetch
  (the connection is cut, the reader stands still, this server is closed) gives it back as if it had
  never been: the reader is still to come, here or from elsewhere.
- A reader that takes less than a megabyte in `patience` seconds, or says nothing for so long after
  everything was acknowledged, has lost its connection.
- In a forked child the server is closed, and the parent's goes on.

What it does not do: look at the bytes, keep anything after the lease, or serve a pool on a GPU.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import os
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Sequence
from types import TracebackType

from shmblocks._os.wait import deadline_of
from shmblocks.errors import (
    AuthenticationError,
    ForeignHandleError,
    MalformedHandleError,
    ShmBlocksError,
)
from shmblocks.handle import BlockHandle
from shmblocks.lease import Lease
from shmblocks.nodes.address import Address, Endpoint, address_text, checked_address, resolve
from shmblocks.nodes.handshake import checked_key, greet
from shmblocks.nodes.info import NodeServerStats, PeerInfo
from shmblocks.nodes.leaving import close_at_exit
from shmblocks.nodes.messages import (
    BUSY,
    MAX_POOLS,
    Done,
    Fetch,
    Ping,
    Sent,
    Taken,
    refusal,
    refused,
    served,
)
from shmblocks.nodes.rows import AUX, require_host_pool, rows_of
from shmblocks.nodes.stream import (
    ConnectionLostError,
    DeadlinePassedError,
    Stream,
    checked_patience,
    plain_stream,
    secured,
)
from shmblocks.pool import BlockPool

# Connections that wait to be accepted. Smaller: a burst of new readers is made to try again by
# their kernels, which takes a second. Larger: nothing but a few kilobytes of kernel memory.
BACKLOG = 128
# Seconds that the accepting thread rests when this process has no descriptor left.
NO_DESCRIPTOR_PAUSE = 0.1

_log = logging.getLogger("shmblocks")


class NodeServer:
    """Serves one pool, or a few, to other nodes, until it is closed.

    Threads of this process do it. Close it before its pools.
    """

    def __init__(
        self,
        pools: BlockPool | Sequence[BlockPool],
        address: Address,
        *,
        key: bytes | None = None,
        tls: ssl.SSLContext | None = None,
        patience: float = 3.0,
        max_connections: int = 64,
    ) -> None:
        """Listens when this returns.

        pools            one or up to 8, in host memory
        address          (host, port) to listen at; port 0: any (`address` says which)
        key              at least 16 bytes, the same on all nodes; None only on loopback
        tls              a server's context; None: rows cross as they are
        patience         seconds for one megabyte, after which a reader's connection is lost
        max_connections  readers' connections at once; more are told to come back later
        """
        listed = [pools] if isinstance(pools, BlockPool) else list(pools)
        if not 1 <= len(listed) <= MAX_POOLS:
            raise ValueError(f"pools: expected 1 to {MAX_POOLS}, got {len(listed)}")
        patience = checked_patience(patience)
        if operator.index(max_connections) < 1:
            raise ValueError(f"max_connections: expected at least 1, got {max_connections}")
        for pool in listed:
            require_host_pool(pool)
        key = checked_key(key)
        self._service = Service(listed, key, tls, patience, max_connections)
        self._listener = _Listener(_endpoint(checked_address(address), key), self._service)
        self._finalizer = close_at_exit(self, self._listener)

    @property
    def address(self) -> Address:
        """(host, port) that it listens at."""
        return self._listener.address

    @property
    def is_closed(self) -> bool:
        """Whether it was closed in this process, or this is a forked child."""
        return self._service.is_closed

    def stats(self) -> NodeServerStats:
        """Counts since it began, and who is connected."""
        return self._service.stats(address_text(self.address))

    def close(self) -> None:
        """Listen no more, end all connections, give their leases back. Idempotent."""
        self._listener.close()
        self._finalizer.detach()

    def __enter__(self) -> NodeServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else f"{len(self._service.peers())} connections"
        return f"NodeServer({address_text(self.address)}, {state})"


def _endpoint(address: Address, key: bytes | None) -> Endpoint:
    try:
        endpoint = resolve(address, None)[0]
    except ConnectionLostError as error:
        raise OSError(f"address {address_text(address)}: {error}") from error
    if key is None and not endpoint.is_loopback:
        raise ValueError(
            f"address {address_text(address)}: without a key only 127.0.0.1 and ::1 are allowed, "
            "since anyone who reaches the port could read the pool: give `key=`"
        )
    return endpoint


class _Peer:
    """One connection, as its own thread counts and others look at it."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.began = time.monotonic()
        self.is_sending = False
        self.fetched = 0
        self.sent_bytes = 0

    def info(self) -> PeerInfo:
        return PeerInfo(
            address=self.stream.peer,
            age_seconds=time.monotonic() - self.began,
            is_sending=self.is_sending,
            fetched=self.fetched,
            sent_bytes=self.sent_bytes,
        )


class Service:
    """What a server does with a connection. Has no thread and no socket of its own."""

    def __init__(
        self,
        pools: list[BlockPool],
        key: bytes | None,
        tls: ssl.SSLContext | None,
        patience: float,
        max_connections: int,
    ) -> None:
        self._pools = {pool.pool_id: pool for pool in pools}
        self._served = tuple(served(pool.config, pool.pool_id, pool.name) for pool in pools)
        self._key = key
        self._tls = tls
        self.patience = patience
        self._max_connections = max_connections
        self._lock = threading.Lock()
        self._peers: set[_Peer] = set()
        self.is_closed = False
        self._fetched = 0
        self._given_back = 0
        self._refused = 0
        self._strangers = 0
        self._turned_away = 0
        self._sent_bytes = 0

    def peers(self) -> list[PeerInfo]:
        """Who is connected."""
        with self._lock:
            return [peer.info() for peer in self._peers]

    def stats(self, address: str) -> NodeServerStats:
        """Counts, and who is connected."""
        with self._lock:
            return NodeServerStats(
                address=address,
                pools=tuple(pool.name for pool in self._served),
                peers=tuple(peer.info() for peer in self._peers),
                max_connections=self._max_connections,
                fetched=self._fetched,
                given_back=self._given_back,
                refused=self._refused,
                strangers=self._strangers,
                turned_away=self._turned_away,
                sent_bytes=self._sent_bytes,
            )

    # ---- one connection ----------------------------------------------------------------------

    def serve(self, stream: Stream) -> None:
        """Serve a new connection until it ends, and close it."""
        peer = _Peer(stream)
        try:
            if not self._admit(peer):
                self._turn_away(peer)
            elif self._introduced(peer):
                self._answer_all(peer)
        except (ConnectionLostError, DeadlinePassedError):
            return  # between two fetches: the reader has had enough
        finally:
            peer.stream.close()
            with self._lock:
                self._peers.discard(peer)

    def _admit(self, peer: _Peer) -> bool:
        with self._lock:
            if self.is_closed:
                raise ConnectionLostError("the server is closed")
            if len(self._peers) < self._max_connections:
                self._peers.add(peer)
                return True
            self._turned_away += 1
            return False

    def _turn_away(self, peer: _Peer) -> None:
        reason = (
            f"the server has {self._max_connections} connections, as many as it takes "
            "(`max_connections`): use fewer, or let it take more"
        )
        deadline = deadline_of(self.patience)
        with contextlib.suppress(AuthenticationError):
            self._secure(peer, deadline)
            peer.stream.send(refused(0, BUSY, reason), deadline)

    def _secure(self, peer: _Peer, deadline: float | None) -> None:
        """TLS, if there is to be any."""
        if self._tls is not None:
            stream = secured(peer.stream, self._tls, server_side=True)
            peer.stream = stream
            stream.shake_hands(deadline)

    def _introduced(self, peer: _Peer) -> bool:
        """Whether the other end is a reader that knows the key."""
        deadline = deadline_of(self.patience)
        try:
            self._secure(peer, deadline)
            greet(peer.stream, self._key, self._served, deadline)
            return True
        except AuthenticationError as error:
            self._count_stranger(peer, error)
            with contextlib.suppress(ConnectionLostError, DeadlinePassedError):
                peer.stream.send(refusal(0, error), deadline)
        except (ConnectionLostError, DeadlinePassedError) as error:
            self._count_stranger(peer, error)
        return False

    def _count_stranger(self, peer: _Peer, error: Exception) -> None:
        with self._lock:
            self._strangers += 1
        _log.warning("node server: %s was turned away: %s", peer.stream.peer, str(error))

    def _answer_all(self, peer: _Peer) -> None:
        while True:
            question = peer.stream.receive(None, Fetch, Ping)
            if isinstance(question, Ping):
                peer.stream.send(question, deadline_of(self.patience))
            else:
                self._answer(peer, question)

    # ---- one fetch ---------------------------------------------------------------------------

    def _answer(self, peer: _Peer, fetch: Fetch) -> None:
        try:
            lease, pool = self._open(fetch)
        except ShmBlocksError as error:
            with self._lock:
                self._refused += 1
            peer.stream.send(refusal(fetch.rid, error), deadline_of(self.patience))
            return
        try:
            peer.is_sending = True
            self._send(peer, fetch, pool, lease)
            done = self._receive_done(peer.stream)
            if done.rid != fetch.rid:
                raise ConnectionLostError("it has done what it did not ask for")
            if done.keep_claim:
                lease.give_back()
            else:
                lease.release()
        except BaseException as error:
            self._give_back(peer, lease, error)
            raise
        finally:
            peer.is_sending = False
        with self._lock:
            self._fetched += 1
        peer.fetched += 1

    def _open(self, fetch: Fetch) -> tuple[Lease, BlockPool]:
        """A lease for the reader. Everything in `fetch` is somebody else's word."""
        handle = BlockHandle.decode(fetch.handle)
        pool = self._pools.get(handle.pool_id)
        if pool is None:
            raise ForeignHandleError(f"{handle}: this node serves no pool {handle.pool_id:#x}")
        if fetch.first_token + fetch.num_tokens > handle.num_tokens:
            raise MalformedHandleError(
                f"{handle}: expected a part of its tokens, got {fetch.num_tokens} from "
                f"{fetch.first_token} on"
            )
        return pool.open(handle), pool

    def _send(self, peer: _Peer, fetch: Fetch, pool: BlockPool, lease: Lease) -> None:
        stream, patience = peer.stream, self.patience
        taken = Taken(fetch.rid, lease.handle.num_tokens, bytes(lease.memory(AUX)))
        stream.send(taken, deadline_of(patience), more=True)
        for rows in rows_of(pool.config, lease, fetch.first_token, fetch.num_tokens):
            stream.send_bytes(rows, patience)
            peer.sent_bytes += len(rows)
            with self._lock:
                self._sent_bytes += len(rows)
        if lease.is_released:
            # The pool was closed under our hands, by another thread or at the end of the process:
            # some of what was sent may be of others.
            raise ConnectionLostError("the pool was closed on this node")
        stream.send(Sent(fetch.rid), deadline_of(patience))

    def _receive_done(self, stream: Stream) -> Done:
        """`patience` begins anew while the other node's kernel still takes bytes."""
        unacknowledged = stream.unacknowledged_bytes
        while True:
            try:
                return stream.receive(deadline_of(self.patience), Done)
            except DeadlinePassedError:
                left = stream.unacknowledged_bytes
                if not 0 < left < unacknowledged:
                    raise
                unacknowledged = left

    def _give_back(self, peer: _Peer, lease: Lease, error: BaseException) -> None:
        with self._lock:
            self._given_back += 1
        with contextlib.suppress(ShmBlocksError):
            lease.give_back()
        _log.warning(
            "node server: %s did not fetch %s to its end (%s); it can be fetched again",
            peer.stream.peer,
            lease.handle,
            # Its text: a handler that keeps the exception would keep our frames, and the mapping.
            str(error),
        )

    # ---- the end -----------------------------------------------------------------------------

    def close(self) -> None:
        """Take nobody any more, and end all connections."""
        with self._lock:
            self.is_closed = True
            for peer in self._peers:
                peer.stream.abort()

    def forget_parent(self) -> None:
        """In a forked child: the connections are the parent's, and so are the threads."""
        self._lock = threading.Lock()
        self._peers = set()
        self.is_closed = True


class _Listener:
    """Owns the listening socket and the threads."""

    def __init__(self, endpoint: Endpoint, service: Service) -> None:
        self._service = service
        self._socket = socket.socket(endpoint.family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(endpoint.address)
            self._socket.listen(BACKLOG)
        except BaseException:
            self._socket.close()
            raise
        bound: tuple[str, int] = self._socket.getsockname()[:2]
        self.address = bound
        self._threads: set[threading.Thread] = set()
        _living.add(self)
        acceptor = threading.Thread(
            target=self._accept_all, name="shmblocks-node-server", daemon=True
        )
        self._acceptor: threading.Thread | None = acceptor
        acceptor.start()

    def _accept_all(self) -> None:
        while True:
            try:
                accepted, address = self._socket.accept()
            except OSError as error:
                if self._service.is_closed:
                    return
                _log.warning("node server: cannot accept a connection: %s", error)
                time.sleep(NO_DESCRIPTOR_PAUSE)
                continue
            try:
                self._start(accepted, address_text(address[:2]))
            except (OSError, RuntimeError) as error:
                accepted.close()  # gone already, or no thread is to be had
                _log.warning("node server: cannot serve a connection: %s", error)

    def _start(self, accepted: socket.socket, peer: str) -> None:
        stream = plain_stream(accepted, peer, self._service.patience)
        thread = threading.Thread(
            target=self._serve, args=(stream,), name="shmblocks-node-peer", daemon=True
        )
        self._threads.add(thread)
        try:
            thread.start()
        except BaseException:
            self._threads.discard(thread)
            stream.close()
            raise

    def _serve(self, stream: Stream) -> None:
        try:
            self._service.serve(stream)
        except ShmBlocksError as error:
            _log.warning("node server: the connection of %s ended: %s", stream.peer, str(error))
        finally:
            self._threads.discard(threading.current_thread())

    def close(self) -> None:
        """Close the server and wait for its threads. Idempotent."""
        self._service.close()
        # Wakes the thread that accepts.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._acceptor is not None:
            self._acceptor.join()
        for thread in list(self._threads):
            # A thread that waits for a pool's lock comes back when that gives up.
            thread.join()
        self._socket.close()

    def forget_parent(self) -> None:
        """In a forked child: no thread came along, and the port is the parent's."""
        self._service.forget_parent()
        self._socket.close()
        self._threads = set()
        self._acceptor = None


# Of this process, for the fork handler.
_living: weakref.WeakSet[_Listener] = weakref.WeakSet()


def _forget_all() -> None:
    for listener in list(_living):
        listener.forget_parent()


os.register_at_fork(after_in_child=_forget_all)
