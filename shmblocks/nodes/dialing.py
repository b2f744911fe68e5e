"""A reader's way to a server: name, connection, TLS, handshake, all before one deadline."""

from __future__ import annotations

import random
import ssl
import time
from collections.abc import Callable
from typing import NamedTuple

from shmblocks._os.wait import seconds_left
from shmblocks.nodes.address import Address, address_text, resolve
from shmblocks.nodes.connections import Connections
from shmblocks.nodes.handshake import BusyError, introduce
from shmblocks.nodes.messages import ServedPool
from shmblocks.nodes.stream import (
    ConnectionLostError,
    Stream,
    secured,
    unconnected_stream,
)

# Seconds between two attempts at a server that has all the connections it takes. Shorter: it is
# asked more often. Longer: a slot that came free is found later.
FIRST_PAUSE = 0.01
LONGEST_PAUSE = 0.25


Use = Callable[[Stream], None]


class Dialled(NamedTuple):
    """A connection after its handshake, and what the server serves."""

    stream: Stream
    pools: tuple[ServedPool, ...]


class Dialer:
    """Knows how to reach one server."""

    def __init__(
        self,
        address: Address,
        key: bytes | None,
        tls: ssl.SSLContext | None,
        patience: float,
        connections: Connections,
    ) -> None:
        """What becomes of no use is dropped from `connections`."""
        self._address = address
        self._key = key
        self._tls = tls
        self._patience = patience
        self._connections = connections

    def dial(self, deadline: float | None, use: Use) -> Dialled:
        """Connect. A server that is full is asked again until the deadline.

        `use` gets each connection before anything is waited for on it, so that it can be aborted.
        """
        pause = FIRST_PAUSE
        while True:
            try:
                return self._dial_once(deadline, use)
            except BusyError:
                if seconds_left(deadline) <= pause:
                    raise
                # Not all at once: others were refused at the same moment.
                time.sleep(random.uniform(pause / 2, pause))
                pause = min(2 * pause, LONGEST_PAUSE)

    def _dial_once(self, deadline: float | None, use: Use) -> Dialled:
        stream = self._connected(deadline, use)
        try:
            if self._tls is not None:
                stream = self._secured(stream, self._tls, deadline, use)
            return Dialled(stream, introduce(stream, self._key, deadline))
        except BaseException:
            self._connections.drop(stream)
            raise

    def _secured(
        self, below: Stream, context: ssl.SSLContext, deadline: float | None, use: Use
    ) -> Stream:
        stream = secured(below, context, server_side=False, host=self._address[0])
        try:
            use(stream)
            self._connections.drop(below)
            stream.shake_hands(deadline)
        except BaseException:
            self._connections.drop(stream)
            raise
        return stream

    def _connected(self, deadline: float | None, use: Use) -> Stream:
        problem = ConnectionLostError("no address")
        for endpoint in resolve(self._address, deadline):
            if self._key is None and not endpoint.is_loopback:
                raise ValueError(
                    f"node {address_text(self._address)}: without a key only this machine's own "
                    "addresses (127.0.0.1, ::1) are allowed: give `key=`, the same on both nodes"
                )
            stream = unconnected_stream(
                endpoint.family, address_text(self._address), self._patience
            )
            try:
                use(stream)
                stream.connect(endpoint.address, deadline)
                return stream
            except ConnectionLostError as error:
                self._connections.drop(stream)
                problem = error
            except BaseException:
                self._connections.drop(stream)
                raise
        raise problem
