"""One fetch: until when, what it waits for just now, and what its failure is called.

Also `in_thread`: a coroutine's way to let a thread fetch, and to end it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import math
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, TypeVar

from shmblocks._os.wait import deadline_of, seconds_left
from shmblocks.errors import (
    AuthenticationError,
    IncompatibleConfigError,
    IncompatiblePoolError,
    PeerDiedError,
    PoolClosedError,
    PoolTimeoutError,
    ShmBlocksError,
)
from shmblocks.nodes.address import Address, address_text
from shmblocks.nodes.handshake import BusyError
from shmblocks.nodes.stream import ConnectionLostError, DeadlinePassedError, Stream

T = TypeVar("T")

_OF_THE_NODE = (
    AuthenticationError,
    BusyError,
    ConnectionLostError,
    IncompatibleConfigError,
    IncompatiblePoolError,
)


class FetchesFrom(Protocol):
    """The reader that an attempt is of."""

    @property
    def address(self) -> Address: ...

    @property
    def is_closed(self) -> bool: ...

    def note_failure(self, *, is_the_nodes: bool) -> None: ...


class Attempt:
    """One fetch (or another question).

    As a context manager it turns what goes wrong on the wire into the library's errors.
    """

    def __init__(
        self,
        node: FetchesFrom,
        what: str,
        timeout: float | None,
    ) -> None:
        """`what` begins the text of an error."""
        self._node = node
        self._what = what
        self._timeout = timeout
        self.deadline = deadline_of(timeout)
        self.waits_for = "another fetch to end (`connections` are in use)"
        self.rid = 0
        self._stream: Stream | None = None
        self._is_cancelled = False

    @property
    def seconds_left(self) -> float | None:
        """As those take it who wait before the deadline; None: for ever."""
        left = seconds_left(self.deadline)
        return None if left == math.inf else max(left, 0.0)

    def use(self, stream: Stream) -> None:
        """From now on a cancellation aborts this connection."""
        self._stream = stream
        if self._is_cancelled:
            stream.abort()

    def cancel(self) -> None:
        """From another thread: end soon."""
        self._is_cancelled = True
        # Not waited for any longer, wherever it is.
        self.deadline = 0.0
        if self._stream is not None:
            self._stream.abort()

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            return
        self._node.note_failure(is_the_nodes=self._is_the_nodes(error))
        told = self._told(error)
        if told is not None:
            raise told from error

    def _is_the_nodes(self, error: BaseException) -> bool:
        """Whether the next attempt would fail as well: the node is down, stands still, or is not
        one of ours."""
        if self._is_cancelled or self._node.is_closed:
            return False
        if isinstance(error, DeadlinePassedError):
            return self._stream is not None
        return isinstance(error, _OF_THE_NODE)

    def _told(self, error: BaseException) -> ShmBlocksError | None:
        node = f"{self._what}: node {address_text(self._node.address)}"
        if isinstance(error, DeadlinePassedError):
            return PoolTimeoutError(
                f"{node}: not here within {self._timeout:g} s; it waited for {self.waits_for}"
            )
        if isinstance(error, BusyError):
            return PoolTimeoutError(f"{node}: not here within {self._timeout or 0:g} s; {error}")
        if isinstance(error, ConnectionLostError):
            if self._node.is_closed:
                return PoolClosedError(f"{node}: the RemotePool was closed in this process")
            return PeerDiedError(f"{node}: lost while waiting for {self.waits_for}: {error}")
        return None


async def in_thread(
    body: Callable[[], T], cancel: Callable[[], None], undo: Callable[[T], None]
) -> T:
    """`body()` in a thread of its own; cancelled, it is told to end, and waited for.

    `undo` gets the result of a body that had come to its end just before it was cancelled.
    """
    ending: concurrent.futures.Future[T] = concurrent.futures.Future()
    ending.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = body()
        except BaseException as error:  # noqa: BLE001 - raised in the coroutine, whatever it is
            ending.set_exception(error)
        else:
            ending.set_result(result)

    threading.Thread(target=run, name="shmblocks-fetch", daemon=True).start()
    waiting = asyncio.wrap_future(ending)
    try:
        await asyncio.wait({waiting})
    except BaseException:
        while not waiting.done():
            # Again and again: it may just be on its way from one connection to the next. Cancelled
            # once more meanwhile, it still waits: nothing may be received after it has ended.
            cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({waiting}, timeout=0.02)
        if waiting.exception() is None:
            undo(waiting.result())
        raise
    return waiting.result()
