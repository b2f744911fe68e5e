"""The queues that a handle can cross, each as something with `put`, `get` and `close`.

`is_for_threads` says that the other end must be a thread of the same process.
"""

from __future__ import annotations

import multiprocessing
import queue
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch.multiprocessing


class Line(Protocol):
    """Both ends of one queue."""

    def put(self, message: object) -> None: ...

    def get(self) -> object: ...

    def close(self) -> None: ...


class ThreadLine:
    """queue.Queue."""

    def __init__(self) -> None:
        self._queue: queue.Queue[object] = queue.Queue()

    def put(self, message: object) -> None:
        self._queue.put(message)

    def get(self) -> object:
        return self._queue.get(timeout=60)

    def close(self) -> None:
        pass


class SharedQueue(Protocol):
    """What the queues of multiprocessing have."""

    def put(self, message: object) -> None: ...

    def get(self, block: bool = ..., timeout: float | None = ...) -> object: ...

    def close(self) -> None: ...

    def join_thread(self) -> None: ...


class ProcessLine:
    """multiprocessing.Queue, or torch's, which is one with picklers of its own."""

    def __init__(self, shared: SharedQueue) -> None:
        self._queue = shared

    def put(self, message: object) -> None:
        self._queue.put(message)

    def get(self) -> object:
        return self._queue.get(timeout=60)

    def close(self) -> None:
        self._queue.put(None)  # only an end that has put something closes its writer
        self._queue.close()
        self._queue.join_thread()


class SimpleLine:
    """multiprocessing.SimpleQueue."""

    def __init__(self) -> None:
        self._queue = multiprocessing.get_context("fork").SimpleQueue()

    def put(self, message: object) -> None:
        self._queue.put(message)

    def get(self) -> object:
        return self._queue.get()

    def close(self) -> None:
        self._queue.close()


class PipeLine:
    """multiprocessing.Pipe."""

    def __init__(self) -> None:
        self._reader, self._writer = multiprocessing.get_context("fork").Pipe(duplex=False)

    def put(self, message: object) -> None:
        self._writer.send(message)

    def get(self) -> object:
        return self._reader.recv()

    def close(self) -> None:
        self._reader.close()
        self._writer.close()


class QueueKind(NamedTuple):
    """One kind of queue."""

    name: str
    make: Callable[[], Line]
    is_for_threads: bool = False


def _multiprocessing_line() -> Line:
    return ProcessLine(multiprocessing.get_context("fork").Queue())


def _torch_line() -> Line:
    return ProcessLine(torch.multiprocessing.get_context("fork").Queue())


QUEUES: tuple[QueueKind, ...] = (
    QueueKind("queue.Queue", ThreadLine, is_for_threads=True),
    QueueKind("multiprocessing.Queue", _multiprocessing_line),
    QueueKind("multiprocessing.SimpleQueue", SimpleLine),
    QueueKind("multiprocessing.Pipe", PipeLine),
    QueueKind("torch.multiprocessing.Queue", _torch_line),
)
