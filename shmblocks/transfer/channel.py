"""Bytes out and in, over whatever queue the user has.

    endpoint --send()--> [outbox] --put--> the queue ~~~> the other side's queue --get--> endpoint

What is asked of a queue is `put(bytes)` and `get()`; how to put without blocking and how to wait is
found out once, when the channel is made:

    queue                                 put without blocking        receive
    queue.Queue, queue.SimpleQueue,       put_nowait, queue.Full      get(timeout=), queue.Empty
      multiprocessing.Queue, torch's,
      HandleQueue, ZmqQueue, and
      whatever is shaped so
    multiprocessing.SimpleQueue, torch's  put, when its pipe has      get, when its pipe has
                                          room (see `_PipePut`)       something; poll(timeout)
    put, get and empty only               put (may block: its own     get, after short sleeps
                                          affair)                     while it is empty

- `send` never blocks (but for the last row): what a full queue does not take stays in the outbox,
  in order, until `flush`. Two endpoints that both find their queues full so still read each
  other's.
- One thread at a time may be in `receive`; the endpoint sees to that.
- A queue that is closed or broken raises `ChannelBrokenError`, whatever its own error is.

What it does not do: close queues (they are the user's), or look into the bytes. A
`multiprocessing.Queue` pickles what it carries by itself; it only ever gets `bytes` from here.
"""

from __future__ import annotations

import queue
import select
import time
from collections import deque
from typing import Protocol, runtime_checkable

from shmblocks.errors import PoolTimeoutError, ShmBlocksError

# Seconds between two looks at a queue that cannot be waited for. Smaller: less latency, more time
# burnt. It grows from the first to the second, so a short wait is short and a long one cheap.
FIRST_NAP = 0.0001
LONGEST_NAP = 0.005

# What a closed or broken queue raises: pipes OSError and EOFError, `multiprocessing.Queue`
# ValueError when it was closed in this process, `HandleQueue` an error of this library.
_BROKEN = (OSError, EOFError, ValueError, ShmBlocksError)
# What says "not now": full, empty, or a HandleQueue whose lock is held by a stopped process.
_NOT_NOW = (queue.Full, queue.Empty, PoolTimeoutError)


class ChannelBrokenError(Exception):
    """The queue cannot be used any more. Endpoints turn it into the failure of their rooms."""


class QueueLike(Protocol):
    """What an endpoint is given as `tx` and `rx`."""

    def put(self, item: bytes, /) -> object: ...

    def get(self) -> object: ...


@runtime_checkable
class _PutsNowait(Protocol):
    def put_nowait(self, item: bytes, /) -> object: ...


@runtime_checkable
class _GetsNowait(Protocol):
    def get_nowait(self) -> object: ...

    def get(self, *, timeout: float) -> object: ...


@runtime_checkable
class _TellsEmpty(Protocol):
    def empty(self) -> bool: ...

    def get(self) -> object: ...


@runtime_checkable
class _Polls(Protocol):
    def poll(self, timeout: float, /) -> bool: ...


@runtime_checkable
class _HasFileno(Protocol):
    def fileno(self) -> int: ...


class _Put(Protocol):
    """Puts, or returns False when the queue has no room now."""

    def __call__(self, data: bytes) -> bool: ...


class _NowaitPut:
    def __init__(self, tx: _PutsNowait) -> None:
        self._tx = tx

    def __call__(self, data: bytes) -> bool:
        try:
            self._tx.put_nowait(data)
        except _NOT_NOW:
            return False
        return True


class _PipePut:
    """For `multiprocessing.SimpleQueue`, whose put blocks while its pipe is full.

    The kernel calls a pipe writable when a whole page is free in it, and a message with its few
    bytes of framing is smaller than that. So with this process as the only writer, which an
    endpoint's `tx` has, the put after the look cannot block.
    """

    def __init__(self, tx: QueueLike, writer: _HasFileno) -> None:
        self._tx = tx
        self._poll = select.poll()
        self._poll.register(writer.fileno(), select.POLLOUT)

    def __call__(self, data: bytes) -> bool:
        if not self._poll.poll(0):
            return False
        self._tx.put(data)
        return True


class _PlainPut:
    def __init__(self, tx: QueueLike) -> None:
        self._tx = tx

    def __call__(self, data: bytes) -> bool:
        self._tx.put(data)
        return True


def _choose_put(tx: QueueLike) -> _Put:
    if isinstance(tx, _PutsNowait):
        return _NowaitPut(tx)
    writer: object = getattr(tx, "_writer", None)
    if isinstance(writer, _HasFileno):
        return _PipePut(tx, writer)
    if not callable(getattr(tx, "put", None)):
        raise TypeError(f"tx: expected a queue with put(bytes), got {type(tx).__name__}")
    return _PlainPut(tx)


class Outgoing:
    """The sending half: a queue and the outbox in front of it."""

    def __init__(self, tx: QueueLike) -> None:
        # Bytes of the longest message that the queue takes; of most queues there is none.
        limit: object = getattr(tx, "message_bytes", None)
        self.longest = limit if isinstance(limit, int) else None
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
                if not self._put(self._outbox[0]):
                    return
            except _BROKEN as error:
                self._outbox.clear()
                raise ChannelBrokenError(f"putting into the queue failed: {error!r}") from error
            self._outbox.popleft()

    def drop(self) -> None:
        """Forget what was not sent: nobody is there to read it."""
        self._outbox.clear()


class _Get(Protocol):
    """The next item, waiting at most `timeout` seconds; `queue.Empty` when there is none."""

    def __call__(self, timeout: float) -> object: ...


class _NowaitGet:
    def __init__(self, rx: _GetsNowait) -> None:
        self._rx = rx

    def __call__(self, timeout: float) -> object:
        return self._rx.get(timeout=timeout) if timeout > 0 else self._rx.get_nowait()


class _PipeGet:
    """For `multiprocessing.SimpleQueue`: waits on the pipe that it reads from."""

    def __init__(self, rx: _TellsEmpty, reader: _Polls) -> None:
        self._rx = rx
        self._reader = reader

    def __call__(self, timeout: float) -> object:
        if not self._reader.poll(max(timeout, 0.0)):
            raise queue.Empty
        return self._rx.get()


class _NapGet:
    def __init__(self, rx: _TellsEmpty) -> None:
        self._rx = rx

    def __call__(self, timeout: float) -> object:
        deadline = time.monotonic() + timeout
        nap = FIRST_NAP
        while self._rx.empty():
            left = deadline - time.monotonic()
            if left <= 0:
                raise queue.Empty
            time.sleep(min(nap, left))
            nap = min(nap * 2, LONGEST_NAP)
        return self._rx.get()


def _choose_get(rx: object) -> _Get:
    if isinstance(rx, _GetsNowait):
        return _NowaitGet(rx)
    if isinstance(rx, _TellsEmpty):
        reader: object = getattr(rx, "_reader", None)
        return _PipeGet(rx, reader) if isinstance(reader, _Polls) else _NapGet(rx)
    raise TypeError(
        f"rx: expected a queue with get_nowait(), or with get() and empty(), "
        f"got {type(rx).__name__}"
    )


class Incoming:
    """The receiving half."""

    def __init__(self, rx: QueueLike) -> None:
        self._get = _choose_get(rx)

    def try_receive(self) -> object | None:
        """The next item, or None when none is there."""
        return self.receive(0.0)

    def receive(self, timeout: float) -> object | None:
        """The next item, waiting at most `timeout` seconds for it, or None.

        It is what the queue gave, unseen: whether it is bytes at all is for the reader to check.
        """
        try:
            return self._get(timeout)
        except _NOT_NOW:
            return None
        except _BROKEN as error:
            raise ChannelBrokenError(f"reading from the queue failed: {error!r}") from error
