"""A segment in use: mapping, file locks and mutex together, right after a fork.

What pools and queues have in common, as one process sees it. Owns the mapping and the locks.

Contract
- `run(body, ...)` is the only way to change the segment: `body` runs under its lock.
- `drop` lets go of everything, as death does, and says nothing to anybody else.
- After a fork the child has locks of its own and holds none of its parent's; what the subclass does
  then about taking part is its own affair (`forget_parent`).
"""

from __future__ import annotations

import os
import struct
import weakref
from collections.abc import Callable
from typing import TypeVar

from shmblocks._os.filelock import FileLocks
from shmblocks._os.segment import Segment
from shmblocks._state.mutex import Mutex
from shmblocks.errors import IncompatiblePoolError, PoolTimeoutError

T = TypeVar("T")


class SharedSegment:
    """Base of `Ledger` and of the queue's state."""

    def __init__(self, fd: int, size: int, name: str, lock_timeout: float) -> None:
        """Map `size` bytes of the segment behind `fd` (which stays the caller's)."""
        self.name = name
        self.segment = Segment(fd, size, name)
        self.locks = FileLocks(fd)
        self.mutex = Mutex(
            self.locks,
            name=name,
            timeout=lock_timeout,
            entered=self.entered,
            describe_holder=self.describe_holder,
        )
        _living.add(self)

    @property
    def is_closed(self) -> bool:
        """Whether it was dropped."""
        return self.locks.file.closed

    def run(self, body: Callable[..., T], *args: object) -> T:
        """`body(*args)` under the lock; see `mutex.Mutex.run`."""
        try:
            return self.mutex.run(body, *args)
        except struct.error as error:
            raise self.too_large(error) from error

    def too_large(self, error: struct.error) -> IncompatiblePoolError:
        """A word read from the segment led to one that fits no word."""
        return IncompatiblePoolError(
            f"pool {self.name}: a number in the segment fits no word any more ({error}): "
            "something else wrote into it; remove the pool (`shmblocks rm --force`) and "
            "create it anew"
        )

    def entered(self) -> None:
        """Runs first in every section: says who is inside, completes what a dead one left."""
        raise NotImplementedError

    def describe_holder(self) -> str:
        """The one that `entered` last, for messages; runs without the lock."""
        raise NotImplementedError

    def forget_parent(self) -> None:
        """In a forked child: the process that takes part is the parent, not this one."""
        raise NotImplementedError

    def _leave(self) -> None:
        """Under the lock: give back what this process holds, and `drop`. May run again after it was
        interrupted anywhere."""
        raise NotImplementedError

    def leave(self) -> None:
        """Leave in an orderly way, as the last one remove the segment. Idempotent.

        The mapping goes at once, or with its last view.
        """
        self.segment.stop_prefault()
        try:
            self._leave_once()
        except PoolTimeoutError:
            raise
        except IncompatiblePoolError:
            self.close()  # what is damaged cannot be given back; leave as the dead do
            raise
        except BaseException:
            self._leave_once()  # interrupted: to the end
            raise

    def _leave_once(self) -> None:
        if not self.is_closed:
            self.run(self._leave)

    def close(self) -> None:
        """Drop the locks and the mapping and nothing else, as death does. Idempotent."""
        self.segment.stop_prefault()
        if not self.is_closed:
            self.drop()

    def drop(self) -> None:
        """Let go; the mapping goes at once, or with its last view."""
        self.locks.close()
        self.segment.drop()

    def reset_after_fork(self) -> None:
        """In a forked child, before anything else there uses the segment."""
        self.segment.forget_parent()
        if self.mutex.reset_after_fork():
            self.drop()
        else:
            self.locks.reopen_after_fork()
        self.forget_parent()


# Every segment of this process, for the fork handler.
_living: weakref.WeakSet[SharedSegment] = weakref.WeakSet()


def _reset_all() -> None:
    for shared in list(_living):
        shared.reset_after_fork()


os.register_at_fork(after_in_child=_reset_all)
