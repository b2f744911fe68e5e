"""Bytes out and in, over whatever queue the user has.

    endpoint --send()--> [outbox] --put--> the queue ~~~> the other side's queue --get--> endpoint

A queue needs `put(bytes)` and `get()`. How to put without blocking, and how to wait for a message,
is found out once, when the endpoint is made:

    queue                                 put without blocking        receive
    queue.Queue, queue.SimpleQueue,       put_nowait, queue.Full      get(timeout=), queue.Empty
      multiprocessing.Queue, torch's,
      HandleQueue, ZmqQueue, and
      others with these methods
    multiprocessing.SimpleQueue, torch's  put, when its pipe is       get, when its pipe is
                                          writable (see `_pipe_put`)  readable; poll(timeout)
    put, get and empty only               put (it may block)          get, after short sleeps
                                                                      while it is empty

- `send` never blocks (except with the last kind): what a full queue does not take stays in the
  outbox, in order, until `flush`. So two endpoints whose queues are both full still read.
- Only one thread at a time may be in `receive`; the endpoint sees to that.
- A closed or broken queue raises `QueueBrokenError`, whatever its own error is.

What it does not do: close queues (they are the user's), or read the bytes. A
`multiprocessing.Queue` pickles what it carries; it only ever gets `bytes` from here.
"""

from __future__ import annotations

import math
import queue
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from shmblocks.errors import PoolTimeoutError, ShmBlocksError

if TYPE_CHECKING:
    import zmq

# Seconds between two checks of a queue that offers no way to wait. It grows from the first to the
# second, so that short waits are short and long ones cheap. Smaller: less latency, more CPU time.
FIRST_NAP = 0.0001
LONGEST_NAP = 0.005
# Seconds for which a thread that waits keeps a zmq socket. Smaller: it wakes more often for
# nothing. Larger: with one socket for both directions, another thread's message leaves later.
ZMQ_SLICE = 0.001

# What a closed or broken queue raises: pipes OSError and EOFError, `multiprocessing.Queue`
# ValueError when it was closed in this process, `HandleQueue` an error of this library.
_BROKEN = (OSError, EOFError, ValueError, ShmBlocksError)
# What says "not now": full, empty, or a HandleQueue whose lock is held by a stopped process.
_NOT_NOW = (queue.Full, queue.Empty, PoolTimeoutError)

_Put = Callable[[bytes], object]  # queue.Full when the queue is full
_Get = Callable[[float], object]  # waits so many seconds; queue.Empty when nothing came


class QueueBrokenError(Exception):
    """The queue cannot be used any more. Endpoints turn it into the failure of their rooms."""


class QueueLike(Protocol):
    """What an endpoint takes as `tx` and `rx`."""

    def put(self, item: bytes, /) -> object: ...

    def get(self) -> object: ...


class Outgoing:
    """The sending half: a queue and the outbox in front of it."""

    def __init__(self, tx: QueueLike) -> None:
        # Bytes of the longest message that the queue takes; None: most queues have no limit.
        limit: object = getattr(tx, "message_bytes", None)
        self.limit = limit if isinstance(limit, int) else None
        self._put = _choose_put(tx)
        self._outbox: deque[bytes] = deque()

    def __len__(self) -> int:
        return len(self._outbox)

    def send(self, data: bytes) -> None:
        """Send, or keep for the next `flush`. Never blocks."""
        self._outbox.append(data)
        self.flush()

    def flush(self) -> None:
        """Put what the queue takes now."""
        while self._outbox:
            try:
                self._put(self._outbox[0])
            except _NOT_NOW:
                return
            except _BROKEN as error:
                self._outbox.clear()
                raise QueueBrokenError(f"putting into the queue failed: {error!r}") from error
            self._outbox.popleft()

    def drop(self) -> None:
        """Forget what was not sent: nobody will read it."""
        self._outbox.clear()


class Incoming:
    """The receiving half."""

    def __init__(self, rx: QueueLike) -> None:
        self._get = _choose_get(rx)

    def receive(self, timeout: float) -> object | None:
        """The next item, or None if none comes within `timeout` seconds.

        The caller has to check that it is bytes.
        """
        try:
            return self._get(timeout)
        except _NOT_NOW:
            return None
        except _BROKEN as error:
            raise QueueBrokenError(f"reading from the queue failed: {error!r}") from error


def _choose_put(tx: QueueLike) -> _Put:
    put_nowait: _Put | None = getattr(tx, "put_nowait", None)
    if put_nowait is not None:
        return put_nowait
    if not callable(getattr(tx, "put", None)):
        raise TypeError(f"tx: expected a queue with put(bytes), got {type(tx).__name__}")
    fileno: Callable[[], int] | None = getattr(getattr(tx, "_writer", None), "fileno", None)
    return tx.put if fileno is None else _pipe_put(tx, fileno())


def _pipe_put(tx: QueueLike, fileno: int) -> _Put:
    """For `multiprocessing.SimpleQueue`, whose put blocks while its pipe is full.

    The kernel calls a pipe writable when a whole page of it is free, and a message with its
    framing is smaller than a page. An endpoint is the only writer of its `tx`, so the put after
    the poll cannot block.
    """
    poll = select.poll()
    poll.register(fileno, select.POLLOUT)

    def put(data: bytes) -> None:
        if not poll.poll(0):
            raise queue.Full
        tx.put(data)

    return put


def _choose_get(rx: QueueLike) -> _Get:
    get: Callable[..., object] | None = getattr(rx, "get", None)
    get_nowait: Callable[[], object] | None = getattr(rx, "get_nowait", None)
    empty: Callable[[], bool] | None = getattr(rx, "empty", None)
    poll: Callable[[float], bool] | None = getattr(getattr(rx, "_reader", None), "poll", None)
    if get is None or (get_nowait is None and empty is None):
        raise TypeError(
            "rx: expected a queue with get_nowait(), or with get() and empty(), "
            f"got {type(rx).__name__}"
        )
    if get_nowait is not None:
        nowait, wait = get_nowait, get
        return lambda timeout: wait(timeout=timeout) if timeout > 0 else nowait()

    def napping_poll(timeout: float) -> bool:
        deadline, nap = time.monotonic() + timeout, FIRST_NAP
        while empty is not None and empty():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(nap, left))
            nap = min(nap * 2, LONGEST_NAP)
        return True

    is_there = poll or napping_poll

    def polled_get(timeout: float) -> object:
        if not is_there(max(timeout, 0.0)):
            raise queue.Empty
        return rx.get()

    return polled_get


class ZmqQueue:
    """`put` and `get` of bytes over a pyzmq socket, which it borrows and never closes.

        socket = context.socket(zmq.PAIR); socket.bind("ipc:///run/embeddings")
        queue = ZmqQueue(socket); EmbeddingEndpoint(pool, queue, queue)

    A PAIR socket serves as `tx` and `rx` at once; a PUSH and a PULL socket as one each. zmq is
    imported when the first ZmqQueue is made.

    Only one thread at a time may use a zmq socket, but a thread that waits must not keep others
    from sending. So a lock is held around each use, and a waiting `get` releases it every
    ZMQ_SLICE seconds. Python's locks are not fair: that thread would mostly take the lock again at
    once. So a putter holds `_putters` while it waits for the lock, and `get` passes through
    `_putters` first.
    """

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        import zmq

        self._socket = socket
        self._again = zmq.Again
        self._error = zmq.ZMQError
        self._nowait = zmq.NOBLOCK
        self._readable = zmq.POLLIN
        self._lock = threading.Lock()
        self._putters = threading.Lock()

    def put(self, data: bytes, *, timeout: float | None = None) -> None:
        """Send, waiting at most `timeout` seconds (None: for ever) while the socket is full.

        Raises `queue.Full`.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            try:
                return self.put_nowait(data)
            except queue.Full:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(ZMQ_SLICE)

    def put_nowait(self, data: bytes) -> None:
        """Send, or raise `queue.Full`."""
        try:
            with self._putters, self._lock:
                self._socket.send(data, self._nowait)
        except self._again:
            raise queue.Full from None
        except self._error as error:
            raise OSError(error.errno, f"zmq: {error}") from error

    def get(self, *, timeout: float | None = None) -> bytes:
        """The next message, waiting at most `timeout` seconds (None: for ever); `queue.Empty`."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            left = min(ZMQ_SLICE, deadline - time.monotonic())
            try:
                return self._receive(max(left, 0.0))
            except queue.Empty:
                if left <= 0:
                    raise

    def get_nowait(self) -> bytes:
        """The next message, or `queue.Empty`."""
        return self._receive(0.0)

    def _receive(self, seconds: float) -> bytes:
        with self._putters:
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
