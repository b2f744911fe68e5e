"""One TCP connection between two nodes: messages and raw bytes, with a deadline on each wait.

Contract
- One thread at a time uses a stream. `abort` may come from any thread; what waits then ends.
- Every wait ends: by its deadline (`DeadlinePassedError`), or because the connection does
  (`ConnectionLostError`). Whoever gets one of the two closes the stream; it has no next message.
- `receive_into` is the only writer into the memory that it is given. After it has returned or
  raised, nothing is written there any more.
- A closed stream sends a FIN whoever else (a forked child) holds the descriptor. A forked child
  closes its copy and says nothing.

How a lost connection is told:

    the other process died            its kernel closes the connection: end of file, or a reset
    the other node died, or the       the kernel gives up `patience` seconds after the first byte or
      network between the two         probe that nobody acknowledged: ETIMEDOUT
    the other process stands still    only a deadline tells

The plain stream waits in the kernel (SO_RCVTIMEO, SO_SNDTIMEO, MSG_WAITALL): one system call for
many megabytes, however small the pieces are in which they come. TLS has to look at every record, so
that its stream waits in poll(2).
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import select
import socket
import ssl
import struct
import termios
import time
import weakref
from collections.abc import Callable
from typing import TypeVar, overload

from shmblocks._os.wait import seconds_left
from shmblocks.errors import AuthenticationError, MalformedMessageError
from shmblocks.nodes.messages import LENGTH_BYTES, Message, decode, encode, frame_length

# Bytes per system call at most. Smaller: more calls, and more CPU per byte (measured over loopback:
# at 1 MiB the sender takes half as much again as at 8 MiB). Larger: nothing is gained.
SLICE = 8 << 20
# Bytes that must have gone out before `patience` begins anew.
PROGRESS = 1 << 20
# A socket's timeout of 0 is "for ever" to the kernel.
_SHORTEST_TIMEOUT = 1e-4
_ABORTED = "ended by this process"


M = TypeVar("M", bound=Message)
N = TypeVar("N", bound=Message)
K = TypeVar("K", bound=Message)
L = TypeVar("L", bound=Message)
T = TypeVar("T")


class ConnectionLostError(Exception):
    """The connection is over; the text says how that showed. Nodes turn it into their own error."""


class DeadlinePassedError(Exception):
    """A deadline came first."""

    def __str__(self) -> str:
        return "nothing moved in time"


class Stream:
    """Owns a connected socket (or one that is just connecting)."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        """`peer` names the other end in messages."""
        self._socket = sock
        self.peer = peer
        self._pid = os.getpid()
        self._is_aborted = False
        _living.add(self)

    def connect(self, address: tuple[object, ...], deadline: float | None) -> None:
        """Connect a socket that is not connected yet."""
        left = _left(deadline)
        try:
            self._require_not_aborted()
            self._socket.settimeout(None if left == math.inf else left)
            self._socket.connect(address)
            self._socket.settimeout(None)
        except OSError as error:
            if isinstance(error, TimeoutError) and error.errno is None:
                raise DeadlinePassedError from None
            raise self._lost(error) from error
        self._require_not_aborted()

    def _require_not_aborted(self) -> None:
        if self._is_aborted:
            raise ConnectionLostError(_ABORTED)

    # ---- messages ----------------------------------------------------------------------------

    def send(self, message: Message, deadline: float | None, more: bool = False) -> None:
        """Send a message; `more`: bytes follow at once, so that it need not travel alone."""
        self._send_all(memoryview(encode(message)), deadline, more)

    @overload
    def receive(self, deadline: float | None, expected: type[M], /) -> M: ...

    @overload
    def receive(self, deadline: float | None, expected: type[M], other: type[N], /) -> M | N: ...

    @overload
    def receive(
        self, deadline: float | None, expected: type[M], other: type[N], third: type[K], /
    ) -> M | N | K: ...

    @overload
    def receive(
        self,
        deadline: float | None,
        expected: type[M],
        other: type[N],
        third: type[K],
        fourth: type[L],
        /,
    ) -> M | N | K | L: ...

    def receive(self, deadline: float | None, *expected: type[Message]) -> Message:
        """The next message, which must be one of the expected."""
        header = bytearray(LENGTH_BYTES)
        self._receive_all(memoryview(header), deadline)
        try:
            data = bytearray(frame_length(header))
            self._receive_all(memoryview(data), deadline)
            return decode(data, expected)
        except MalformedMessageError as error:
            raise ConnectionLostError(str(error)) from error

    # ---- raw bytes ---------------------------------------------------------------------------

    def send_bytes(self, memory: memoryview, patience: float) -> None:
        """Send all of it, each megabyte within `patience` seconds; more is to follow."""
        sent, noted, size = 0, 0, len(memory)
        deadline = time.monotonic() + patience
        while sent < size:
            try:
                sent += self._send_some(memory[sent : sent + SLICE], deadline, more=True)
            except OSError as error:
                raise self._lost(error) from error
            if sent - noted >= PROGRESS:
                noted, deadline = sent, time.monotonic() + patience

    def receive_into(self, memory: memoryview, deadline: float | None) -> None:
        """Fill all of `memory`."""
        self._receive_all(memory, deadline)

    def _send_all(self, memory: memoryview, deadline: float | None, more: bool) -> None:
        sent, size = 0, len(memory)
        while sent < size:
            try:
                sent += self._send_some(memory[sent:], deadline, more)
            except OSError as error:
                raise self._lost(error) from error

    def _receive_all(self, memory: memoryview, deadline: float | None) -> None:
        got, size = 0, len(memory)
        while got < size:
            try:
                count = self._receive_some(memory[got : got + SLICE], deadline)
            except OSError as error:
                raise self._lost(error) from error
            if not count:
                self._require_not_aborted()
                raise ConnectionLostError("closed by the other end")
            got += count

    def _send_some(self, memory: memoryview, deadline: float | None, more: bool) -> int:
        """Send at least one byte, or nothing if the kernel's timer came first."""
        self._set_timeout(socket.SO_SNDTIMEO, deadline)
        flags = socket.MSG_NOSIGNAL | (socket.MSG_MORE if more else 0)
        try:
            return self._socket.send(memory, flags)
        except BlockingIOError:
            return 0

    def _receive_some(self, memory: memoryview, deadline: float | None) -> int:
        """Receive at least one byte, or 0 at the end of the stream."""
        while True:
            self._set_timeout(socket.SO_RCVTIMEO, deadline)
            try:
                return self._socket.recv_into(memory, len(memory), socket.MSG_WAITALL)
            except BlockingIOError:
                continue  # the kernel's timer is rounded: the deadline itself decides

    def _set_timeout(self, option: int, deadline: float | None) -> None:
        left = _left(deadline)
        seconds = 0.0 if left == math.inf else max(left, _SHORTEST_TIMEOUT)
        fraction, whole = math.modf(seconds)
        self._socket.setsockopt(
            socket.SOL_SOCKET, option, struct.pack("@ll", int(whole), int(fraction * 1e6))
        )

    def _lost(self, error: OSError) -> ConnectionLostError:
        if self._is_aborted or error.errno == errno.EBADF:
            return ConnectionLostError(_ABORTED)
        if error.errno == errno.ETIMEDOUT:
            # Python makes a TimeoutError of it, which it is not: no deadline of ours has passed.
            return ConnectionLostError(
                "the other node acknowledges nothing any more (ETIMEDOUT): it, or the network to "
                "it, is down"
            )
        return ConnectionLostError(f"{type(error).__name__}: {error}")

    # ---- looking at it -----------------------------------------------------------------------

    @property
    def is_quiet(self) -> bool:
        """Whether it is open and nothing has come: what an idle connection must be."""
        return self._socket.fileno() >= 0 and not _poll(self._socket, select.POLLIN, 0.0)

    @property
    def local_host(self) -> str:
        """The address of this end, of the node's interface that leads to the other one."""
        host: str = self._socket.getsockname()[0]
        return host

    @property
    def unacknowledged_bytes(self) -> int:
        """Bytes that were sent and that the other node's kernel has not got yet."""
        answer = fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, bytes(4))
        return int.from_bytes(answer, "little")

    # ---- the end -----------------------------------------------------------------------------

    def abort(self) -> None:
        """From any thread: whoever waits on it gets `ConnectionLostError`."""
        self._is_aborted = True
        self._shut_down()

    def close(self) -> None:
        """End the connection. Idempotent."""
        if self._pid == os.getpid():
            self._shut_down()
        self._socket.close()

    def forget_parent(self) -> None:
        """In a forked child: the connection is the parent's."""
        self._socket.close()

    def _shut_down(self) -> None:
        # The C method: SSLSocket's own forgets its keys, and a thread that still reads would take
        # encrypted bytes for rows.
        try:
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
        except OSError:
            return  # closed, or never connected: there is nothing to end


class TlsStream(Stream):
    """The same under TLS."""

    _socket: ssl.SSLSocket

    def shake_hands(self, deadline: float | None) -> None:
        """Do TLS's own handshake. Raises `AuthenticationError` when it fails."""
        try:
            self._when_ready(self._socket.do_handshake, deadline)
        except ssl.SSLError as error:
            raise AuthenticationError(
                f"node {self.peer}: the TLS handshake failed: {error}: compare the certificates "
                "and contexts (`tls=`) of both nodes; one may have none"
            ) from error
        except OSError as error:
            raise self._lost(error) from error

    def _send_some(self, memory: memoryview, deadline: float | None, more: bool) -> int:
        return self._when_ready(lambda: self._socket.send(memory), deadline)

    def _receive_some(self, memory: memoryview, deadline: float | None) -> int:
        try:
            return self._when_ready(lambda: self._socket.recv_into(memory), deadline)
        except ssl.SSLZeroReturnError:
            return 0

    def _when_ready(self, call: Callable[[], T], deadline: float | None) -> T:
        """The result of a call, as soon as the socket can do what TLS needs for it."""
        while True:
            try:
                return call()
            except ssl.SSLWantReadError:
                _poll(self._socket, select.POLLIN, _left(deadline))
            except ssl.SSLWantWriteError:
                _poll(self._socket, select.POLLOUT, _left(deadline))


def plain_stream(sock: socket.socket, peer: str, patience: float) -> Stream:
    """A stream over a socket (which it takes), tuned to notice a lost node within `patience`."""
    stream = Stream(sock, peer)
    try:
        tune(sock, patience)
        # Its waits are the kernel's, not Python's.
        sock.settimeout(None)
    except BaseException:
        stream.close()
        raise
    return stream


def unconnected_stream(family: int, peer: str, patience: float) -> Stream:
    """A stream that is to be connected."""
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    return plain_stream(sock, peer, patience)


def secured(
    stream: Stream, context: ssl.SSLContext, *, server_side: bool, host: str | None = None
) -> TlsStream:
    """A stream's connection under TLS; takes it over. `shake_hands` comes next.

    `host` is the name that the server's certificate must have (None on the server's side).
    """
    sock = stream._socket
    sock.setblocking(False)
    wrapped = context.wrap_socket(
        sock,
        server_side=server_side,
        do_handshake_on_connect=False,
        # A cut connection is an error, not an end.
        suppress_ragged_eofs=False,
        server_hostname=host,
    )
    return TlsStream(wrapped, stream.peer)


def tune(sock: socket.socket, patience: float) -> None:
    """Small messages at once; a node that acknowledges nothing for `patience` seconds is lost."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    probe = max(1, int(patience / 3))
    for option, value in (
        (socket.TCP_NODELAY, 1),
        (socket.TCP_KEEPIDLE, probe),
        (socket.TCP_KEEPINTVL, probe),
        (socket.TCP_KEEPCNT, 3),
        (socket.TCP_USER_TIMEOUT, max(1, int(patience * 1000))),
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def checked_patience(patience: float) -> float:
    """Seconds after which a node is lost that acknowledges nothing."""
    if not 0 < patience < math.inf:
        raise ValueError(f"patience: expected seconds > 0, got {patience}")
    return patience


def _left(deadline: float | None) -> float:
    left = seconds_left(deadline)
    if left <= 0:
        raise DeadlinePassedError
    return left


def _poll(sock: socket.socket, events: int, seconds: float) -> bool:
    """Whether one of the events, or the connection's end, is there within so many seconds."""
    poll = select.poll()
    poll.register(sock, events)
    return bool(poll.poll(None if seconds == math.inf else math.ceil(seconds * 1000)))


# Every stream of this process, for the fork handler.
_living: weakref.WeakSet[Stream] = weakref.WeakSet()


def _forget_all() -> None:
    for stream in list(_living):
        stream.forget_parent()
    _living.clear()


os.register_at_fork(after_in_child=_forget_all)
