"""A queue between processes whose users may die at any instruction.

    ours, theirs = Wire.pair()          # each end puts to the other and gets from it
    child = fork(...)                   # both ends may be inherited by any number of processes

A message is one datagram of a Unix socket: the kernel takes it whole or not at all, and keeps it
for the other end whoever dies. There is no lock, no thread and no buffer in any process, which is
why tests of deaths use this and no `multiprocessing.Queue`, whose lock a dead process can hold.

It has the methods that a transfer's endpoint looks for. What it does not do: carry more than some
100 KiB per message, or tell that nobody is at the other end any more.
"""

from __future__ import annotations

import queue
import select
import socket

# Messages larger than this are a mistake of the test.
LONGEST = 1 << 16


class Wire:
    """One end. Close it, or let it be closed with its process."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    @classmethod
    def pair(cls) -> tuple[Wire, Wire]:
        """Two ends of one wire."""
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        return cls(left), cls(right)

    def put_nowait(self, data: bytes) -> None:
        """Send, or raise `queue.Full`."""
        try:
            self._socket.send(data, socket.MSG_DONTWAIT)
        except (BlockingIOError, ConnectionRefusedError):
            raise queue.Full from None

    def put(self, data: bytes) -> None:
        """Send, waiting while the other end's buffer is full."""
        self._socket.send(data)

    def get_nowait(self) -> bytes:
        """The next message, or `queue.Empty`."""
        try:
            return self._socket.recv(LONGEST, socket.MSG_DONTWAIT)
        except BlockingIOError:
            raise queue.Empty from None

    def get(self, *, timeout: float | None = None) -> bytes:
        """The next message, waiting at most `timeout` seconds (None: for ever)."""
        if not self.has_message(timeout):
            raise queue.Empty
        return self.get_nowait()

    def has_message(self, timeout: float | None = 0.0) -> bool:
        """Whether one is there, or comes within so many seconds (None: wait for ever)."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(None if timeout is None else 1000 * max(timeout, 0.0)))

    def close(self) -> None:
        """Close this end in this process. Idempotent."""
        self._socket.close()
