"""`NodeServer`: gives the blocks of this node's pools to readers on other nodes.

One thread accepts; one thread for each connection runs `Service.serve`, which says what happens
there. In a forked child the server is closed, and the parent's goes on.

What it does not do: serve a pool on a GPU.
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

from shmblocks.errors import (
    ShmBlocksError,
)
from shmblocks.nodes.address import Address, Endpoint, address_text, checked_address, resolve
from shmblocks.nodes.devices import device_of
from shmblocks.nodes.handshake import checked_key
from shmblocks.nodes.info import NodeServerStats
from shmblocks.nodes.leaving import close_at_exit
from shmblocks.nodes.messages import (
    MAX_POOLS,
)
from shmblocks.nodes.nixl_offer import NixlOffer
from shmblocks.nodes.rows import require_host_pool
from shmblocks.nodes.service import Service
from shmblocks.nodes.stream import (
    ConnectionLostError,
    Stream,
    checked_patience,
    plain_stream,
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
        nixl: bool = False,
    ) -> None:
        """Listens when this returns.

        pools            one or up to 8, in host memory
        address          (host, port) to listen at; port 0: any (`address` says which)
        key              at least 16 bytes, the same on all nodes; None only on loopback
        tls              a server's context; None: rows cross as they are
        patience         seconds for one megabyte, after which a reader's connection is lost
        max_connections  readers' connections at once; more are told to come back later
        nixl             also let readers with `engine="nixl"` read (experimental; `docs/nodes.md`).
                         It opens a second port, of a process that has the pools' fields mapped: who
                         reaches that port reads all of them, with no key

        Raises OSError (the address), ValueError, `ImportError` (no NIXL here), `PeerDiedError` (its
        agent does not start).
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
        if nixl and tls is not None:
            raise ValueError("nixl: rows would cross as they are; leave out `tls`, or NIXL")
        endpoint = _endpoint(checked_address(address), key)
        device = device_of(str(endpoint.address[0]))
        self._nixl = NixlOffer(listed, device, patience) if nixl else None
        self._service = Service(listed, key, tls, patience, max_connections, self._nixl)
        try:
            self._listener = _Listener(endpoint, self._service, self._nixl)
        except BaseException:
            if self._nixl is not None:
                self._nixl.close()
            raise
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

    def __exit__(self, *_: object) -> None:
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


class _Listener:
    """Owns the listening socket and the threads, and the agent process of NIXL."""

    def __init__(self, endpoint: Endpoint, service: Service, nixl: NixlOffer | None) -> None:
        """Closes `nixl` at its end."""
        self._service = service
        self._nixl = nixl
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
        if self._nixl is not None:
            self._nixl.close()
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
