"""What the tests of queues and of waiting share: small queues, and waiters that can be seen asleep.

- `Waiting` is a thread that waits for something; it says when it is really asleep *in the kernel*,
  so that tests are ordered by what happened and not by sleeping a while.
- `give_up_the_net(monkeypatch)` takes away the bound on sleeps. What is left is the wake-ups
  themselves: one that is lost then costs a minute, and not a quarter of a second that no test sees.
- `abandon(queue)` is what death is to everyone else: the locks fall and nothing is given back.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec

from shmblocks import HandleQueue
from shmblocks._os import futex as futex_module
from shmblocks._os import futex_asyncio as loops_module
from shmblocks._state import pool_state as pool_state_module
from shmblocks._state.layout import Q_GETTERS_ASLEEP, Q_HEAD, Q_PUTTERS_ASLEEP, Q_TAIL
from tests.support.children import wait_until

if TYPE_CHECKING:
    import pytest

T = TypeVar("T")

CAPACITY = 4
MESSAGE_BYTES = 64
# Seconds until a wait of a test counts as a hang. Smaller: a loaded machine is called a hang.
PATIENCE = 20.0
# Seconds. What comes within this was woken, where nothing else would wake it before NO_NET.
SOON = 10.0
NO_NET = 60.0
WAITER_THREAD = "shmblocks-waiter"
_FUTEX_WAIT = "0x0"


class Numbered(msgspec.Struct, frozen=True, array_like=True):
    """A message that says whose and which it is."""

    producer: int
    number: int


def is_asleep(thread_id: int, process_id: int | None = None) -> bool:
    """Whether a thread is in the futex system call of this library (Python's own are private)."""
    path = Path(f"/proc/{process_id or os.getpid()}/task/{thread_id}/syscall")
    try:
        fields = path.read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return len(fields) > 2 and fields[0] == str(futex_module._number) and fields[2] == _FUTEX_WAIT


def wait_until_asleep(thread_id: int, process_id: int | None = None) -> None:
    wait_until(lambda: is_asleep(thread_id, process_id), "it sleeps in the kernel", PATIENCE)


def give_up_the_net(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sleep ends by itself; in children that are forked from here too."""
    for module in (futex_module, loops_module, pool_state_module):
        monkeypatch.setattr(module, "LONGEST_SLEEP", NO_NET)


class Waiting(Generic[T]):
    """Owns a thread that runs `function()`; leaving the block waits for its end."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._results: list[T] = []
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, name="a waiting test", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._results.append(self._function())
        except BaseException as error:  # noqa: BLE001 - told by `result` and `error`
            self._errors.append(error)

    @property
    def thread_id(self) -> int:
        assert self._thread.native_id is not None
        return self._thread.native_id

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def until_asleep(self) -> Waiting[T]:
        def sleeps_or_failed() -> bool:
            assert not self.is_over, f"it did not wait: {self._results} {self._errors}"
            return is_asleep(self.thread_id)

        wait_until(sleeps_or_failed, "the thread sleeps in the kernel", PATIENCE)
        return self

    def end(self, timeout: float = PATIENCE) -> None:
        self._thread.join(timeout)
        assert self.is_over, f"still waits after {timeout} s"

    def result(self, timeout: float = PATIENCE) -> T:
        self.end(timeout)
        if self._errors:
            raise self._errors[0]
        return self._results[0]

    def error(self, timeout: float = PATIENCE) -> BaseException:
        self.end(timeout)
        assert self._errors, f"no error, but {self._results}"
        return self._errors[0]

    def __enter__(self) -> Waiting[T]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.end()


def asleep(queue: HandleQueue[T]) -> tuple[int, int]:
    """How many getters and putters are counted as asleep."""
    words = queue.state.segment.words
    return words[Q_GETTERS_ASLEEP], words[Q_PUTTERS_ASLEEP]


def positions(queue: HandleQueue[T]) -> tuple[int, int]:
    """(messages taken, messages put) so far."""
    words = queue.state.segment.words
    return words[Q_HEAD], words[Q_TAIL]


def start_counting_at(queue: HandleQueue[T], number: int) -> None:
    """Make an empty queue count its messages from `number` on."""
    assert queue.empty()
    words = queue.state.segment.words
    words[Q_HEAD] = words[Q_TAIL] = number


def require_right(queue: HandleQueue[T]) -> None:
    """The counts are such as operations leave behind."""
    taken, put = positions(queue)
    assert 0 <= put - taken <= queue.capacity, (taken, put)


def waiter_threads() -> list[threading.Thread]:
    """The library's threads that sleep for event loops."""
    return [thread for thread in threading.enumerate() if thread.name == WAITER_THREAD]


def abandon(queue: HandleQueue[T]) -> None:
    """Die, as everyone else sees it."""
    queue._finalizer.detach()
    queue.state.close()


def fill(queue: HandleQueue[bytes]) -> list[bytes]:
    """Put until there is no room; what is in the queue then."""
    messages = [b"%d" % number for number in range(queue.capacity - queue.qsize())]
    for message in messages:
        queue.put_nowait(message)
    return messages


def drain(queue: HandleQueue[T]) -> list[T]:
    """Everything that is in the queue."""
    messages: list[T] = []
    while not queue.empty():
        messages += queue.get_many(queue.capacity, block=False)
    return messages
