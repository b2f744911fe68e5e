"""The connections of one reader to one node: how many are in use, and those that are idle.

    slot        the permission to have one connection in use; there are `most`, first come, first
                served over threads and coroutines
    idle        open connections of nobody; the last one used is used first

After a fork the child has all slots and no connection, and threads of the parent hold no lock of
it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import os
import threading
import weakref
from collections import deque

from shmblocks._os.wait import seconds_left
from shmblocks.errors import PoolClosedError
from shmblocks.nodes.stream import DeadlinePassedError, Stream

# Seconds that closing waits for fetches of other threads to notice. It is only reached when one of
# them waits for something else than its connection.
CLOSING_PATIENCE = 5.0

Turn = concurrent.futures.Future[None]


class Connections:
    """Owns the idle connections, and may abort those in use."""

    def __init__(self, most: int, what: str) -> None:
        """`what` names the reader in messages."""
        self._most = most
        self._what = what
        self._is_closed = False
        self._start()
        _living.add(self)

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._none_used = threading.Condition(self._lock)
        self._free = self._most
        self._waiting: deque[Turn] = deque()
        self._idle: list[Stream] = []
        self._used: set[Stream] = set()

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    @property
    def in_use(self) -> int:
        """Slots that are taken."""
        return self._most - self._free

    @property
    def idle(self) -> int:
        """Connections that wait for a fetch."""
        return len(self._idle)

    # ---- slots -------------------------------------------------------------------------------

    def acquire(self, deadline: float | None) -> None:
        """Take a slot; `DeadlinePassedError` when none comes free in time."""
        turn = self._ask()
        try:
            left = seconds_left(deadline)
            turn.result(None if left == math.inf else max(left, 0.0))
        except concurrent.futures.TimeoutError:
            self._withdraw(turn)
            raise DeadlinePassedError from None
        except BaseException:
            self._withdraw(turn)
            raise

    async def acquire_async(self, deadline: float | None) -> None:
        """The same from asyncio."""
        turn = self._ask()
        try:
            left = seconds_left(deadline)
            waiting = asyncio.wrap_future(turn)
            # Not `wait_for`: before Python 3.12 it swallows a cancellation that comes together with
            # the result.
            await asyncio.wait({waiting}, timeout=None if left == math.inf else max(left, 0.0))
            if not waiting.done():
                raise DeadlinePassedError
            waiting.result()
        except BaseException:
            self._withdraw(turn)
            raise

    def release(self) -> None:
        """Give a slot back; it goes to the one that waits longest."""
        with self._lock:
            self._pass_on()

    def _ask(self) -> Turn:
        turn: Turn = concurrent.futures.Future()
        with self._lock:
            self._require_open()
            if self._free:
                self._free -= 1
                turn.set_result(None)
            else:
                self._waiting.append(turn)
        return turn

    def _withdraw(self, turn: Turn) -> None:
        with self._lock:
            if turn in self._waiting:
                self._waiting.remove(turn)
            elif turn.done() and not turn.cancelled() and turn.exception() is None:
                self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if turn.set_running_or_notify_cancel():
                turn.set_result(None)
                return
        self._free += 1

    def _require_open(self) -> None:
        if self._is_closed:
            raise PoolClosedError(f"{self._what}: closed in this process; make another one")

    # ---- connections -------------------------------------------------------------------------

    def take_idle(self) -> Stream | None:
        """An open connection, if one is idle; for the holder of a slot."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                stream = self._idle.pop()
                self._used.add(stream)
            # Something to read, with nothing asked: it has ended, or is not a node's.
            if stream.is_quiet:
                return stream
            self.drop(stream)

    def watch(self, stream: Stream) -> None:
        """From now on `close` aborts this connection."""
        with self._lock:
            self._require_open()
            self._used.add(stream)

    def keep(self, stream: Stream) -> None:
        """The fetch is over and its connection is fine."""
        with self._lock:
            self._forget(stream)
            if not self._is_closed:
                self._idle.append(stream)
                return
        stream.close()

    def drop(self, stream: Stream) -> None:
        """The fetch is over, and its connection too."""
        stream.close()
        with self._lock:
            self._forget(stream)

    def _forget(self, stream: Stream) -> None:
        self._used.discard(stream)
        if not self._used:
            self._none_used.notify_all()

    def close(self) -> None:
        """End all of them, and wait until nobody receives any more. Idempotent."""
        with self._lock:
            self._is_closed = True
            for stream in self._used:
                stream.abort()
            idle, self._idle = self._idle, []
            while self._waiting:
                turn = self._waiting.popleft()
                if turn.set_running_or_notify_cancel():
                    turn.set_exception(PoolClosedError(f"{self._what}: closed in this process"))
        for stream in idle:
            stream.close()
        with self._lock:
            self._none_used.wait_for(lambda: not self._used, CLOSING_PATIENCE)

    def forget_parent(self) -> None:
        """In a forked child: the connections are the parent's, and so are its threads."""
        self._start()


# Of this process, for the fork handler.
_living: weakref.WeakSet[Connections] = weakref.WeakSet()


def _forget_all() -> None:
    for connections in list(_living):
        connections.forget_parent()


os.register_at_fork(after_in_child=_forget_all)
