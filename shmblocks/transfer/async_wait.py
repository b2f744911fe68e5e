"""Coroutines that wait for rooms of one endpoint, served by one thread.

    event loop                                   the thread
    await waits.wait(room, timeout)  --adds-->   pumps the endpoint until all rooms have ended
                                    <--wakes--   call_soon_threadsafe, for each ended room

The thread starts with the first waiter and ends after the last, so an endpoint has at most one,
however many coroutines wait. A cancelled or timed-out wait only removes its waiter: the room stays
open and can be awaited again.

What it does not do: open rooms, or take results. A loop never waits for the endpoint's lock here;
it takes `_lock`, which is only ever held for moments.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import NamedTuple

from shmblocks.transfer.room import Room

# Seconds for which `join` waits for the thread. It ends within one sleep of the endpoint; longer
# only while it copies or waits for the pool's lock.
JOIN_PATIENCE = 1.0


class _Waiter(NamedTuple):
    """`future` gets None when the room has ended, or the error that ended the pumping."""

    room: Room
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[BaseException | None]

    def wake(self, error: BaseException | None) -> None:
        """From the thread."""
        with contextlib.suppress(RuntimeError):  # its loop was closed
            self.loop.call_soon_threadsafe(self._wake, error)

    def _wake(self, error: BaseException | None) -> None:
        if not self.future.done():
            self.future.set_result(error)


# Drives the endpoint until the function that it gets says that nobody waits; may raise.
Pump = Callable[[Callable[[], bool]], None]


class AsyncWaits:
    """The waiters of one endpoint. It keeps no reference to the endpoint."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiters: list[_Waiter] = []
        self._thread: threading.Thread | None = None
        self._is_served = False

    async def wait(self, pump: Pump, room: Room, timeout: float | None) -> bool:
        """Whether the room ended within `timeout` seconds (None: wait for ever).

        Raises what the pumping raised.
        """
        loop = asyncio.get_running_loop()
        waiter = _Waiter(room, loop, loop.create_future())
        self._add(waiter, pump)
        try:
            done, _ = await asyncio.wait([waiter.future], timeout=timeout)
        finally:
            with self._lock, contextlib.suppress(ValueError):  # the thread has removed it
                self._waiters.remove(waiter)
        error = waiter.future.result() if done else None
        if error is not None:
            raise error
        return bool(done)

    def _add(self, waiter: _Waiter, pump: Pump) -> None:
        with self._lock:
            if not self._is_served:
                self._thread = threading.Thread(
                    target=self._serve, args=(pump,), name="shmblocks transfer", daemon=True
                )
                self._thread.start()
                self._is_served = True
            self._waiters.append(waiter)

    def join(self) -> None:
        """Wait for the thread to end: no room is open any more."""
        thread = self._thread
        if thread is not None:
            thread.join(JOIN_PATIENCE)

    # ---- in the thread -----------------------------------------------------------------------

    def _serve(self, pump: Pump) -> None:
        try:
            while not self._may_end():
                pump(self._has_waiters)
        except Exception as error:  # noqa: BLE001 - raised again, in each coroutine that waits
            with self._lock:
                failed, self._waiters = self._waiters, []
                self._is_served = False
            for waiter in failed:
                waiter.wake(error)

    def _may_end(self) -> bool:
        with self._lock:  # one section: a waiter that comes later starts a new thread
            self._is_served = bool(self._waiters)
            return not self._is_served

    def _has_waiters(self) -> bool:
        """Wake the waiters of ended rooms. Whether any are left."""
        with self._lock:
            for waiter in list(self._waiters):
                if waiter.room.is_over or waiter.loop.is_closed():
                    self._waiters.remove(waiter)
                    waiter.wake(None)
            return bool(self._waiters)
