"""The lock of a segment: one transaction at a time over all processes and threads.

    class PoolState(PoolParts):
        @transaction
        def publish(self, ...): ...      # runs while no other process and no other thread is inside

Contract
- A method that `transaction` decorates runs with the lock held. Nothing else does.
- The holder's death, at whatever instruction, frees the lock (the kernel drops the file lock). The
  next to enter first completes what the dead one had committed (`entered`).
- An exception anywhere, asynchronous ones included (KeyboardInterrupt at any line, here too),
  leaves the lock free; the state is whole because every change goes through the journal.
- A stopped holder cannot be passed. Waiting for it ends at the deadline with `PoolTimeoutError`,
  which names it.
- Waiters are not served in order; the sleeps between attempts are short and random enough that the
  shares of eight processes stay close.

Three layers:

    inside {0: token}   a dict; `setdefault` takes it, in one uninterruptible C call, for one
                        thread of this process (the file lock cannot tell threads apart)
    flock               on the segment's file, for one process of the node
    journal             for what a dead holder left

Why a token and not a `threading.Lock`: with a Lock, a KeyboardInterrupt between `acquire()` and the
note who owns it would leave the lock taken for ever. `setdefault(0, token)` does both in one C
call, and releasing compares identities, so that it is safe to repeat.

Why a decorator and not a `with` block: an exception can arrive between the end of a `with` body and
its `__exit__` (at the line of the `with` statement itself). Two nested `finally` have no such gap.

What Python cannot promise: *two* asynchronous exceptions within the same microsecond, the second
inside the clean-up of the first, leave the token behind. The next call of this process sees that
no frame runs the transaction that the token belongs to (`_is_abandoned`) and gives it back.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import random
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from shmblocks._os.filelock import ENTER, LEAVE, FileLocks
from shmblocks.errors import (
    DamagedPoolError,
    InvalidStateError,
    PoolClosedError,
    PoolTimeoutError,
)

T = TypeVar("T")
P = ParamSpec("P")

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


# Stands for one transaction, by its identity; holds the ident of the thread that runs it. (A list,
# since each transaction makes one: a third of the price of an object with `__init__`.)
_Token = list[int]


class Lockable(Protocol):
    """What `transaction` needs of the object whose methods it decorates."""

    mutex: Mutex

    def entered(self) -> None:
        """Runs first in every transaction: completes what a dead holder left."""
        ...

    def describe_holder(self) -> str:
        """The last that entered, for messages; runs without the lock."""
        ...


L = TypeVar("L", bound=Lockable)


def transaction(method: Callable[Concatenate[L, P], T]) -> Callable[Concatenate[L, P], T]:
    """The method runs under the segment's lock.

    Raises `PoolTimeoutError` when the lock could not be had in time, `PoolClosedError` when the
    segment was closed in this process, `DamagedPoolError` when a number in it fits no word.
    """

    @functools.wraps(method)
    def locked(self: L, *args: P.args, **kwargs: P.kwargs) -> T:
        token = [_get_ident()]
        mutex = self.mutex
        inside = mutex.inside
        # Two nested `finally`: if an exception interrupts the inner one, the outer one finishes.
        try:
            try:
                if inside.setdefault(0, token) is not token or not mutex.try_file():
                    mutex.wait(token, self.describe_holder)
                self.entered()
                return method(self, *args, **kwargs)
            except struct.error as error:
                raise mutex.damaged(error) from error
            finally:
                mutex.leave(token)
        finally:
            if inside:
                mutex.leave(token)

    return locked  # type: ignore[return-value]


class Mutex:
    """The lock over one segment, for this process; borrows `locks`."""

    def __init__(self, locks: FileLocks, what: str, timeout: float) -> None:
        """`what` names the segment in messages; `timeout` in seconds."""
        self._locks = locks
        self._what = what
        self.timeout = timeout
        # Seconds that single threads wait instead, by their idents.
        self._timeouts: dict[int, float] = {}
        self.inside: dict[int, _Token] = {}
        # When the section began that is being timed, monotonic ns; 0: the one inside is not timed.
        self.timed_since_ns = 0
        self.note_held: Callable[[int], None] = _note_nothing
        # Why this process cannot use the segment any more, when it did not close it itself.
        self.why_closed = "closed in this process; attach it again"

    def try_file(self) -> bool:
        """One attempt at the file lock; `PoolClosedError` when the file was closed."""
        try:
            _flock(self._locks.file, ENTER)
        except BlockingIOError:
            return False  # another process holds it
        except ValueError:
            raise self.closed() from None
        return True

    def leave(self, token: _Token) -> None:
        """Give back what `token` holds, the file lock first; nothing when it holds nothing."""
        inside = self.inside
        if inside.get(0) is token:
            if self.timed_since_ns:
                self._note_held()
            try:
                _flock(self._locks.file, LEAVE)
            except ValueError:
                pass  # closed by what ran inside: the lock went with it
            inside.pop(0, None)

    def _note_held(self) -> None:
        """Before the lock is given back: say for how many ns it was held."""
        since, self.timed_since_ns = self.timed_since_ns, 0
        try:
            self.note_held(time.monotonic_ns() - since)
        except ValueError:
            pass  # the segment was closed by what ran inside

    def wait(self, token: _Token, describe_holder: Callable[[], str]) -> None:
        """Take the lock that another thread or process holds."""
        self._refuse_nesting(token)
        timeout = self._timeouts.get(token[0], self.timeout)
        deadline = time.monotonic() + timeout
        sleep = FIRST_SLEEP
        attempt = 0
        while not (self.inside.setdefault(0, token) is token and self.try_file()):
            attempt += 1
            if attempt % ABANDONED_AFTER == 0:
                self._give_back_abandoned()
            if attempt < SPIN_ATTEMPTS:
                continue
            if attempt == SPIN_ATTEMPTS:
                self._refuse_waiting_for_oneself(token)
            if time.monotonic() >= deadline:
                raise self._timed_out(timeout, describe_holder())
            # Without the random part two waiters that started together would meet at each attempt.
            time.sleep(sleep * (0.5 + random.random()))
            sleep = min(sleep * 2, LONGEST_SLEEP)

    @contextlib.contextmanager
    def with_timeout(self, seconds: float) -> Iterator[None]:
        """In this context this thread waits for the lock so many seconds at most."""
        ident = _get_ident()
        before = self._timeouts.get(ident)
        try:
            self._timeouts[ident] = seconds
            yield
        finally:
            if before is None:
                self._timeouts.pop(ident, None)
            else:
                self._timeouts[ident] = before

    def damaged(self, error: struct.error) -> DamagedPoolError:
        """A number read from the segment led to one that fits no word."""
        return DamagedPoolError(
            f"{self._what}: a counter in the segment exceeds 64 bits ({error}): something else "
            "wrote into it; remove it (`shmblocks rm --force`) and create it anew"
        )

    def closed(self) -> PoolClosedError:
        """The error of a call after the segment was closed in this process."""
        return PoolClosedError(f"{self._what}: {self.why_closed}")

    def _timed_out(self, timeout: float, holder: str) -> PoolTimeoutError:
        return PoolTimeoutError(
            f"{self._what}: could not acquire the lock within {timeout:g} s. Last holder: "
            f"{holder}, alive but not progressing (stopped?). Send it SIGCONT, or kill it"
        )

    def _refuse_nesting(self, token: _Token) -> None:
        """Raise instead of deadlocking when a signal handler re-enters the segment in the thread
        that holds its lock."""
        held = self.inside.get(0)
        if held is None or held is token or held[0] != token[0]:
            return
        if _runs(sys._getframe(), held):
            raise self._nested()
        self.leave(held)

    def _refuse_waiting_for_oneself(self, token: _Token) -> None:
        """Same deadlock through a second object on this segment: it has its own file description,
        so our flock blocks on a lock that our own call stack holds."""
        for mutex, its_token in _sections(sys._getframe()):
            if its_token is not token and mutex._locks.inode == self._locks.inode:
                raise self._nested()

    def _nested(self) -> InvalidStateError:
        return InvalidStateError(
            f"{self._what}: called from a signal handler or finalizer that interrupted an "
            "operation of the same thread on it; set a flag there and act on it later"
        )

    def _give_back_abandoned(self) -> None:
        held = self.inside.get(0)
        if held is not None and _is_abandoned(held):
            self.leave(held)

    def reset_after_fork(self) -> bool:
        """After a fork: True if the forking thread held the lock.

        The child would return into the transaction that the parent is still in, so the caller must
        drop the segment.
        """
        held = self.inside.get(0)
        self.inside.clear()
        self.timed_since_ns = 0
        return held is not None and held[0] == _get_ident()


def _note_nothing(_: int) -> None:
    """Nobody counts."""


# Every transaction of every class runs this one piece of code.
_SECTION = transaction(Mutex.try_file).__code__  # type: ignore[type-var]


def is_inside() -> bool:
    """Whether this thread holds any segment's lock; if so it must not block."""
    return next(_sections(sys._getframe()), None) is not None


def _is_abandoned(token: _Token) -> bool:
    frame = sys._current_frames().get(token[0])
    return frame is None or not _runs(frame, token)


def _sections(frame: FrameType | None) -> Iterator[tuple[Mutex, _Token]]:
    """The mutexes that callers of `frame` hold, and by which token."""
    while frame is not None:
        if frame.f_code is _SECTION:
            mutex, token = frame.f_locals.get("mutex"), frame.f_locals.get("token")
            if mutex is not None and mutex.inside.get(0) is token:
                yield mutex, token
        frame = frame.f_back


def _runs(frame: FrameType | None, token: _Token) -> bool:
    """Whether the transaction of `token` is among the callers of `frame`."""
    while frame is not None:
        if frame.f_code is _SECTION and frame.f_locals.get("token") is token:
            return True
        frame = frame.f_back
    return False
