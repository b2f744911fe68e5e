"""A pyzmq socket as a queue for an endpoint.

    embedding:  socket = context.socket(zmq.PAIR); socket.bind("ipc:///run/embeddings")
                queue = ZmqQueue(socket); EmbeddingEndpoint(pool, queue, queue)

A PAIR socket serves as `tx` and `rx` at once; a PUSH and a PULL socket as one each. The socket
stays the user's: nothing here closes it. zmq is imported when the first adapter is made, not
before.

A zmq socket may not be used by two threads at once, but a thread that waits in an endpoint must not
keep others from sending. So one lock is held around each use, and `get` gives it up every `SLICE`
seconds. Python's locks are not fair: the thread that gives one up mostly takes it again at once. So
a putter holds the door while it waits for the lock, and `get` goes through the door each time.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import zmq

# Seconds. Smaller: a waiting thread wakes more often for nothing. Larger: with one socket for both
# directions, a message sent by another thread meanwhile leaves up to so much later.
SLICE = 0.001


class ZmqQueue:
    """`put` and `get` of bytes over a pyzmq socket that it borrows."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        import zmq

        self._socket = socket
        self._again = zmq.Again
        self._error = zmq.ZMQError
        self._nowait = zmq.NOBLOCK
        self._readable = zmq.POLLIN
        self._lock = threading.Lock()
        self._door = threading.Lock()

    def put(self, data: bytes) -> None:
        """Send, waiting while the socket's own queue is full."""
        while True:
            try:
                return self.put_nowait(data)
            except queue.Full:
                time.sleep(SLICE)

    def put_nowait(self, data: bytes) -> None:
        """Send, or raise `queue.Full`."""
        try:
            with self._door, self._lock:
                self._socket.send(data, self._nowait)
        except self._again:
            raise queue.Full from None
        except self._error as error:
            raise OSError(error.errno, f"zmq: {error}") from error

    def get_nowait(self) -> bytes:
        """The next message, or `queue.Empty`."""
        return self._receive(0.0)

    def get(self, *, timeout: float | None = None) -> bytes:
        """The next message, waiting at most `timeout` seconds (None: for ever)."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = SLICE if deadline is None else min(SLICE, deadline - time.monotonic())
            try:
                return self._receive(max(left, 0.0))
            except queue.Empty:
                if left <= 0:
                    raise

    def _receive(self, seconds: float) -> bytes:
        with self._door:
            pass
        # poll takes whole milliseconds; rounding down would make the end of a wait a busy loop.
        milliseconds = math.ceil(1000 * seconds)
        try:
            with self._lock:
                if not self._socket.poll(milliseconds, self._readable):
                    raise queue.Empty
                return self._socket.recv(self._nowait)
        except self._again:
            raise queue.Empty from None
        except self._error as error:
            raise OSError(error.errno, f"zmq: {error}") from error
