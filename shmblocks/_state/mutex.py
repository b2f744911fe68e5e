"""The pool's lock: one critical section at a time over all processes and threads.

Contract
- `run(body, ...)` calls `body` while no other process and no other thread is in a section.
- The holder's death, at whatever instruction, frees the lock (the kernel drops the file lock), and
  the next to enter first completes what the dead one had committed (`recover`).
- An exception anywhere, asynchronous ones included (KeyboardInterrupt at any line, here too),
  leaves the lock free; the state is whole because every change goes through the journal.
- A stopped holder cannot be passed. Waiting for it ends at the deadline with `PoolTimeoutError`,
  which names it.
- Waiters are not served in order; the sleeps between attempts are short and random enough that the
  shares of eight processes stay close.

Three layers:

    _inside {0: token}   a dict; `setdefault` takes it, in one uninterruptible C call, for one
                         thread of this process (the file lock cannot tell threads apart)
    flock                on the segment's file, for one process of the node
    journal              for what a dead holder left

Why a token and not a `threading.Lock`: between a lock's `acquire` and the note who owns it lies a
line at which a KeyboardInterrupt would lose the lock for ever. `setdefault(0, token)` is taking and
noting in one step, and giving back what is not ours is a comparison away from doing nothing, so
that the code below may run `_leave` as often as it likes.

What Python cannot promise: *two* asynchronous exceptions within the same microsecond, the second
inside the clean-up of the first, leave the token behind. The next call of this process sees that
nobody runs the section that the token belongs to (`_is_abandoned`) and gives it back.
"""

from __future__ import annotations

import fcntl
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeVar

from shmblocks._os.filelock import ENTER, LEAVE, FileLocks
from shmblocks.errors import InvalidStateError, PoolClosedError, PoolTimeoutError

T = TypeVar("T")

# Attempts before the first sleep. A section takes 5 to 10 us, an attempt 1 us. Fewer: more sleeps
# of at least 50 us each under light contention. More: a holder on the same core is kept from
# finishing.
SPIN_ATTEMPTS = 8
# Seconds. Shorter: more wake-ups while the lock is held for long. Longer: it lies idle.
FIRST_SLEEP = 20e-6
LONGEST_SLEEP = 1e-3
# A waiting thread looks for an abandoned token after so many attempts.
ABANDONED_AFTER = 64

_flock = fcntl.flock
_get_ident = threading.get_ident


# Stands for one call of `run`, by its identity; holds the ident of the thread that calls. (A list,
# since the hot path makes one each time: a third of the price of an object with `__init__`.)
_Token = list[int]


class Mutex:
    """The lock over one segment, for this process; borrows `locks`."""

    def __init__(
        self,
        locks: FileLocks,
        *,
        name: str,
        timeout: float,
        entered: Callable[[], None],
        describe_holder: Callable[[], str],
    ) -> None:
        """`entered` runs first in every section (it recovers); `describe_holder` names the last
        one that entered."""
        self._locks = locks
        self._name = name
        self._timeout = timeout
        self._entered = entered
        self._describe_holder = describe_holder
        self._inside: dict[int, _Token] = {}

    def run(self, body: Callable[..., T], *args: object) -> T:
        """`body(*args)` inside the critical section.

        Raises `PoolTimeoutError` when the lock could not be had within the config's `lock_timeout`,
        `PoolClosedError` when the pool was closed.
        """
        token = [_get_ident()]
        inside = self._inside
        # Two nested clean-ups: an interrupt inside the first is mended by the second. No statement
        # stands between them that is not covered by one of the two.
        try:
            try:
                if inside.setdefault(0, token) is not token or not self._try_file():
                    self._wait(token)
                self._entered()
                return body(*args)
            finally:
                self._leave(token)
        finally:
            if inside:
                self._leave(token)

    def _try_file(self) -> bool:
        try:
            _flock(self._locks.file, ENTER)
        except BlockingIOError:
            return False  # another process holds it
        except ValueError:
            raise PoolClosedError(
                f"pool {self._name}: closed in this process; attach it again"
            ) from None
        return True

    def _leave(self, token: _Token) -> None:
        """Give back what `token` holds, the file lock first; nothing when it holds nothing."""
        inside = self._inside
        if inside.get(0) is token:
            try:
                _flock(self._locks.file, LEAVE)
            except ValueError:
                pass  # closed by what ran inside: the lock went with it
            inside.pop(0, None)

    def _wait(self, token: _Token) -> None:
        self._refuse_nesting(token)
        deadline = time.monotonic() + self._timeout
        sleep = FIRST_SLEEP
        attempt = 0
        while not (self._inside.setdefault(0, token) is token and self._try_file()):
            attempt += 1
            if attempt % ABANDONED_AFTER == 0:
                self._give_back_abandoned()
            if attempt < SPIN_ATTEMPTS:
                continue
            if attempt == SPIN_ATTEMPTS:
                self._refuse_waiting_for_oneself(token)
            if time.monotonic() >= deadline:
                raise self._timed_out()
            # Without the random part two waiters that started together would meet at each attempt.
            time.sleep(sleep * (0.5 + random.random()))
            sleep = min(sleep * 2, LONGEST_SLEEP)

    def _timed_out(self) -> PoolTimeoutError:
        return PoolTimeoutError(
            f"pool {self._name}: the lock was not to be had within {self._timeout:g} s; the last "
            f"to take it was {self._describe_holder()}, which lives but does not go on "
            "(stopped?): continue or kill it"
        )

    def _refuse_nesting(self, token: _Token) -> None:
        """A signal handler that calls the pool while its thread is inside would wait for ever."""
        held = self._inside.get(0)
        if held is None or held is token or held[0] != token[0]:
            return
        if _runs(sys._getframe(), held):
            raise self._nested()
        self._leave(held)

    def _refuse_waiting_for_oneself(self, token: _Token) -> None:
        """The same, through another object that this process has attached to the segment: its lock
        is on a description of its own, and kept from us by a caller of ours."""
        for mutex, its_token in _sections(sys._getframe()):
            if its_token is not token and mutex._locks.inode == self._locks.inode:
                raise self._nested()

    def _nested(self) -> InvalidStateError:
        return InvalidStateError(
            f"pool {self._name}: called from a signal handler or finalizer that interrupted an "
            "operation of the same thread on this pool; set a flag there and act on it later"
        )

    def _give_back_abandoned(self) -> None:
        held = self._inside.get(0)
        if held is not None and _is_abandoned(held):
            self._leave(held)

    def reset_after_fork(self) -> bool:
        """In a forked child: whoever was inside was a thread of the parent.

        True when it is the one that forked, in a signal handler: returning from that, the child
        would go on inside, beside its parent. It must not get at the segment any more.
        """
        held = self._inside.get(0)
        self._inside.clear()
        return held is not None and held[0] == _get_ident()


def is_inside() -> bool:
    """Whether the calling thread is in a section, of whatever segment; it must wait for nothing."""
    return next(_sections(sys._getframe()), None) is not None


def _is_abandoned(token: _Token) -> bool:
    frame = sys._current_frames().get(token[0])
    return frame is None or not _runs(frame, token)


def _sections(frame: FrameType | None) -> Iterator[tuple[Mutex, _Token]]:
    """Whose sections, by which token, the callers of `frame` are in."""
    while frame is not None:
        if frame.f_code is Mutex.run.__code__:
            mutex, token = frame.f_locals["self"], frame.f_locals.get("token")
            if token is not None and mutex._inside.get(0) is token:
                yield mutex, token
        frame = frame.f_back


def _runs(frame: FrameType | None, token: _Token) -> bool:
    """Whether `Mutex.run` of `token` is among the callers of `frame`."""
    while frame is not None:
        if frame.f_code is Mutex.run.__code__ and frame.f_locals.get("token") is token:
            return True
        frame = frame.f_back
    return False
