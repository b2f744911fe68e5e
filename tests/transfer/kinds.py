"""Every kind of queue that a transfer can use, as a pair of queues with two ends.

An `End` can be sent to a process that is being spawned, and is opened there. The two ends of a
pair are crossed: what one puts, the other gets.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from shmblocks.queue import HandleQueue
from shmblocks.transfer import QueueLike, ZmqQueue
from tests.support import naming

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext


class End(NamedTuple):
    """Two queues that exist already."""

    tx: QueueLike
    rx: QueueLike

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[QueueLike, QueueLike]]:
        yield self.tx, self.rx


class ZmqEnd(NamedTuple):
    """One PAIR socket for both directions; sockets are made where they are used."""

    address: str
    binds: bool

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[QueueLike, QueueLike]]:
        import zmq

        with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
            socket.linger = 100  # milliseconds for what was sent last to leave
            if self.binds:
                socket.bind(self.address)
            else:
                socket.connect(self.address)
            both = ZmqQueue(socket)
            yield both, both


class PushPullEnd(NamedTuple):
    """A PUSH and a PULL socket."""

    push: str
    pull: str

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[QueueLike, QueueLike]]:
        import zmq

        with (
            zmq.Context() as context,
            context.socket(zmq.PUSH) as push,
            context.socket(zmq.PULL) as pull,
        ):
            push.linger = 100  # milliseconds for what was sent last to leave
            push.connect(self.push)
            pull.bind(self.pull)
            yield ZmqQueue(push), ZmqQueue(pull)


AnyEnd = End | ZmqEnd | PushPullEnd


class QueuePair(NamedTuple):
    """Both ends, and what closes the queues when both are done."""

    embedding: AnyEnd
    language: AnyEnd
    close: Callable[[], None]


class PlainQueue:
    """The least that is asked of a queue: put, get and empty, with nothing behind it."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[object] = queue.SimpleQueue()

    def put(self, item: bytes) -> None:
        self._items.put(item)

    def get(self) -> object:
        return self._items.get()

    def empty(self) -> bool:
        return self._items.empty()


def _nothing() -> None:
    """Nothing to close."""


def crossed(one: QueueLike, two: QueueLike, close: Callable[[], None] = _nothing) -> QueuePair:
    return QueuePair(End(one, two), End(two, one), close)


def _spawn_context() -> BaseContext:
    return multiprocessing.get_context("spawn")


def _torch_context() -> BaseContext:
    import torch.multiprocessing

    context: BaseContext = torch.multiprocessing.get_context("spawn")
    return context


def _multiprocessing_queues(context: BaseContext, size: int = 0) -> QueuePair:
    one, two = context.Queue(size), context.Queue(size)

    def close() -> None:
        for each in (one, two):
            each.close()
            each.join_thread()

    return crossed(one, two, close)


def _simple_queues(context: BaseContext) -> QueuePair:
    one, two = context.SimpleQueue(), context.SimpleQueue()

    def close() -> None:
        for each in (one, two):
            each.close()

    return crossed(one, two, close)


def _handle_queues(capacity: int) -> QueuePair:
    one = HandleQueue.create(naming.new_pool_name(), capacity)
    two = HandleQueue.create(naming.new_pool_name(), capacity)

    def close() -> None:
        for each in (one, two):
            each.close()

    return crossed(one, two, close)


def _zmq_pair(folder: str) -> QueuePair:
    address = f"ipc://{folder}/pair"
    return QueuePair(ZmqEnd(address, binds=True), ZmqEnd(address, binds=False), _nothing)


def _zmq_push_pull(folder: str) -> QueuePair:
    one, two = f"ipc://{folder}/one", f"ipc://{folder}/two"
    return QueuePair(PushPullEnd(one, two), PushPullEnd(two, one), _nothing)


# Kinds that connect threads of one process, and kinds that (also) connect processes. Each is made
# by a function of a folder that is empty.
THREAD_KINDS: dict[str, Callable[[str], QueuePair]] = {
    "queue.Queue": lambda _: crossed(queue.Queue(), queue.Queue()),
    "queue.Queue of one": lambda _: crossed(queue.Queue(1), queue.Queue(1)),
    "queue.SimpleQueue": lambda _: crossed(queue.SimpleQueue(), queue.SimpleQueue()),
    "put, get and empty": lambda _: crossed(PlainQueue(), PlainQueue()),
}
PROCESS_KINDS: dict[str, Callable[[str], QueuePair]] = {
    "multiprocessing.Queue": lambda _: _multiprocessing_queues(_spawn_context()),
    "multiprocessing.Queue of one": lambda _: _multiprocessing_queues(_spawn_context(), 1),
    "multiprocessing.SimpleQueue": lambda _: _simple_queues(_spawn_context()),
    "torch.multiprocessing.Queue": lambda _: _multiprocessing_queues(_torch_context()),
    "torch.multiprocessing.SimpleQueue": lambda _: _simple_queues(_torch_context()),
    "HandleQueue": lambda _: _handle_queues(64),
    "HandleQueue of one": lambda _: _handle_queues(1),
    "zmq PAIR": _zmq_pair,
    "zmq PUSH and PULL": _zmq_push_pull,
}
ALL_KINDS = {**THREAD_KINDS, **PROCESS_KINDS}
