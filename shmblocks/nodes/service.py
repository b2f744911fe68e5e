"""What a server does with one connection: the handshake, and one question after the other.

     Find{key}  ---->                       0  the handle of the key's entry; nothing is held
     Fetch{handle}  ---->                   1  lease = pool.open(handle)   a participant of the pool
     Taken, rows, Sent  ---->               2  send() copies out of the pool under the lease
     <---- Done                             3  lease.release()

     Read{handle}  ---->                    1  as above; the reader's NIXL agent reads by itself
     Granted
     <---- StillReading ...
     <---- Commit
     Sent                                   2  only if the lease is still open
     <---- Done                             3

Contract
- What is sent was read under an open lease: `Sent` follows the last byte only if the lease was
  still open then. A reader publishes nothing without it.
- A lease is released as read only when the reader has said `Done`. Whatever else ends the fetch
  (the connection is cut, the reader stands still, this server is closed) gives it back as if it had
  never been: the reader is still to come, here or from elsewhere.
- A reader that takes less than a megabyte in `patience` seconds, or says nothing for so long after
  everything was acknowledged, or while its agent reads, has lost its connection. Its agent may read
  on then, of blocks that are others': nothing of it is published, since nobody says `Sent`.

What it does not do: look at the bytes, keep anything after the lease, or have a thread or a socket
of its own.
"""

from __future__ import annotations

import contextlib
import logging
import ssl
import threading
import time
from collections.abc import Iterable

from shmblocks._os.wait import deadline_of
from shmblocks._state.counters import Counter
from shmblocks._state.peers import NO_ROW
from shmblocks.errors import (
    AuthenticationError,
    ForeignHandleError,
    IncompatibleConfigError,
    MalformedHandleError,
    ShmBlocksError,
)
from shmblocks.handle import BlockHandle
from shmblocks.lease import Lease
from shmblocks.nodes.handshake import greet
from shmblocks.nodes.info import NodeServerStats, PeerInfo
from shmblocks.nodes.messages import (
    BUSY,
    Absent,
    Commit,
    Done,
    Fetch,
    Find,
    Found,
    Ping,
    Read,
    Refused,
    Sent,
    StillReading,
    Taken,
    refusal,
    refused,
    served,
)
from shmblocks.nodes.nixl_offer import NixlOffer
from shmblocks.nodes.rows import AUX, Checksum, rows_of, sliced
from shmblocks.nodes.stream import ConnectionLostError, DeadlinePassedError, Stream, secured
from shmblocks.pool import BlockPool

_log = logging.getLogger("shmblocks")


class _Peer:
    """One connection, as its own thread counts and others look at it."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.began = time.monotonic()
        self.is_sending = False
        self.fetched = 0
        self.sent_bytes = 0
        # Its row in each served pool, for those who look at the pool.
        self.rows: dict[int, int] = {}

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
        nixl: NixlOffer | None = None,
    ) -> None:
        """`nixl`: what agents of readers read from; borrowed."""
        self._pools = {pool.pool_id: pool for pool in pools}
        self._served = tuple(served(pool.config, pool.pool_id, pool.name) for pool in pools)
        self._by_layout: dict[bytes, list[BlockPool]] = {}
        for pool, told in zip(pools, self._served, strict=True):
            self._by_layout.setdefault(told.layout, []).append(pool)
        self._key = key
        self._tls = tls
        self.patience = patience
        self._max_connections = max_connections
        self._nixl = nixl
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
            self._hide(peer)

    def _show(self, peer: _Peer) -> None:
        """Let it be seen in every served pool, by the address of its node's socket."""
        for pool_id, pool in self._pools.items():
            with contextlib.suppress(ShmBlocksError):
                peer.rows[pool_id] = pool.peer_state.connect(peer.stream.peer)

    def _hide(self, peer: _Peer) -> None:
        for pool_id, row in peer.rows.items():
            with contextlib.suppress(ShmBlocksError):
                self._pools[pool_id].peer_state.disconnect(row)

    def _count(self, counter: int, pools: Iterable[BlockPool] | None = None) -> None:
        """Count in these pools (None: in all), for those who look at them."""
        for pool in self._pools.values() if pools is None else pools:
            with contextlib.suppress(ShmBlocksError):
                pool.peer_state.count(counter)

    def _admit(self, peer: _Peer) -> bool:
        with self._lock:
            if self.is_closed:
                raise ConnectionLostError("the server is closed")
            if len(self._peers) < self._max_connections:
                self._peers.add(peer)
                return True
            self._turned_away += 1
        self._count(Counter.NODE_TURNED_AWAY)
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
            self._show(peer)
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
        self._count(Counter.NODE_TURNED_AWAY)
        _log.warning("node server: %s was turned away: %s", peer.stream.peer, str(error))

    def _answer_all(self, peer: _Peer) -> None:
        while True:
            question = peer.stream.receive(None, Fetch, Read, Find, Ping)
            if isinstance(question, Fetch | Read):
                self._answer(peer, question)
            elif isinstance(question, Find):
                peer.stream.send(self._find(question), deadline_of(self.patience))
            else:
                peer.stream.send(question, deadline_of(self.patience))

    def _find(self, find: Find) -> Found | Absent | Refused:
        """What is published under a key. Used now, it is not among the next that are evicted."""
        epoch = find.epoch
        try:
            for pool in self._by_layout.get(find.layout, ()):
                if pool.epoch != find.epoch:
                    epoch = pool.epoch
                    continue
                found = pool.find(find.key)
                if found is not None and found.is_ready and pool.touch(find.key):
                    return Found(find.rid, found.handle.encode())
        except ShmBlocksError as error:
            return refusal(find.rid, error)
        return Absent(find.rid, epoch)

    # ---- one fetch ---------------------------------------------------------------------------

    def _answer(self, peer: _Peer, fetch: Fetch | Read) -> None:
        try:
            if isinstance(fetch, Read):
                self._require_nixl()
            lease, pool = self._open(fetch)
        except ShmBlocksError as error:
            with self._lock:
                self._refused += 1
            self._count(Counter.NODE_REFUSALS)
            peer.stream.send(refusal(fetch.rid, error), deadline_of(self.patience))
            return
        try:
            peer.is_sending = True
            if isinstance(fetch, Read):
                self._let_read(peer, fetch, pool, lease)
            else:
                self._send(peer, fetch, pool, lease)
            done = self._receive_done(peer.stream)
            if done.rid != fetch.rid:
                raise ConnectionLostError("it has done what it did not ask for")
            if done.keep_claim:
                lease.give_back()
            else:
                lease.release()
        except BaseException as error:
            self._give_back(peer, pool, lease, error)
            raise
        finally:
            peer.is_sending = False
        with self._lock:
            self._fetched += 1
        peer.fetched += 1
        with contextlib.suppress(ShmBlocksError):
            row = peer.rows.get(pool.pool_id, NO_ROW)
            pool.peer_state.served(row, fetch.num_tokens * pool.config.token_bytes)

    def _open(self, fetch: Fetch | Read) -> tuple[Lease, BlockPool]:
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
        checksum = Checksum(fetch.handle, fetch.first_token, fetch.num_tokens, taken.aux)
        for rows in rows_of(pool.config, lease, fetch.first_token, fetch.num_tokens):
            for part in sliced(rows) if fetch.checked else (rows,):
                if fetch.checked:
                    checksum.add(part)
                stream.send_bytes(part, patience)
            self._count_sent(peer, len(rows))
        _require_open(lease)
        sent = Sent(fetch.rid, checksum.value if fetch.checked else 0)
        stream.send(sent, deadline_of(patience))

    def _count_sent(self, peer: _Peer, size: int) -> None:
        peer.sent_bytes += size
        with self._lock:
            self._sent_bytes += size

    # ---- one fetch with NIXL -----------------------------------------------------------------

    def _require_nixl(self) -> NixlOffer:
        if self._nixl is None:
            raise IncompatibleConfigError(
                "this server does not offer NIXL: make it NodeServer(..., nixl=True) (`shmblocks "
                "serve --nixl`), or fetch without engine='nixl'"
            )
        return self._nixl

    def _let_read(self, peer: _Peer, read: Read, pool: BlockPool, lease: Lease) -> None:
        """Everything up to `Sent`. Where the lease goes meanwhile, what was read does not count."""
        stream = peer.stream
        try:
            granted = self._require_nixl().grant(read, pool, lease)
        except ShmBlocksError as error:
            # Seen from there, the death of a peer; and this connection has no next message.
            stream.send(refusal(read.rid, error), deadline_of(self.patience))
            raise ConnectionLostError(str(error)) from error
        stream.send(granted, deadline_of(self.patience))
        commit = self._receive_commit(stream, read.rid)
        value = 0
        if commit.checked:
            encoded = lease.handle.encode()
            checksum = Checksum(encoded, read.first_token, read.num_tokens, granted.aux)
            for rows in rows_of(pool.config, lease, read.first_token, read.num_tokens):
                checksum.add(rows)
            value = checksum.value
        self._count_sent(peer, read.num_tokens * pool.config.token_bytes)
        _require_open(lease)
        stream.send(Sent(read.rid, value), deadline_of(self.patience))

    def _receive_commit(self, stream: Stream, rid: int) -> Commit:
        """What ends a read; its reader says that it goes on, more often than `patience` seconds."""
        while True:
            said = stream.receive(deadline_of(self.patience), Commit, StillReading)
            if said.rid != rid:
                raise ConnectionLostError("it speaks of what it did not ask for")
            if isinstance(said, Commit):
                return said

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

    def _give_back(self, peer: _Peer, pool: BlockPool, lease: Lease, error: BaseException) -> None:
        with self._lock:
            self._given_back += 1
        with contextlib.suppress(ShmBlocksError):
            lease.give_back()
        self._count(Counter.NODE_GIVEN_BACK, [pool])
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


def _require_open(lease: Lease) -> None:
    if lease.is_released:
        # The pool was closed under our hands, by another thread or at the end of the process: some
        # of what went away may be of others.
        raise ConnectionLostError("the pool was closed on this node")
