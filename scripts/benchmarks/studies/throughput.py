"""One producer, one to eight consumers that share a queue: messages a second, and memory.

The producer hands over tensors as fast as they are taken; each consumer takes one, reads a value
of it, and gives it back. Comparing every byte would measure the comparing; so each way first has a
run that is not timed, in which every message is filled anew and every byte of it compared by
whoever got it.

Memory: the peak of the sum of PSS (proportional set size, /proc/PID/smaps_rollup) of the producer
and one consumer, above what both had before the first message.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue as ProcessQueue
from multiprocessing.shared_memory import SharedMemory
from multiprocessing.synchronize import Barrier
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.link import Ends, Receiver, Sender, SoloPlan
from benchmarks.links.buffers import unique_name
from benchmarks.links.pool import FIELD
from benchmarks.links.registry import (
    ZMQ_COPY,
    ZMQ_NO_COPY,
    is_installed,
)
from benchmarks.links.shared_memory import as_tensor
from benchmarks.links.torch_queue import set_strategy
from benchmarks.memory import pss
from benchmarks.payload import Pattern
from benchmarks.results import Study
from benchmarks.settings import Settings
from shmblocks import BlockHandle, BlockPool, Field, HandleQueue, PoolConfig

PATIENCE = 120.0
BLOCK_SIZE = 128
# Messages that lie in the pool at once: the queue's length, as for the others.
DEPTH = 8

Put = Callable[[], None]
# Takes one message and gives its tensor, and what gives it back.
Take = Callable[[], "tuple[Tensor, Callable[[], None]]"]
# Messages for each consumer in the run that is compared.
CHECKED = 3
# Seconds. A run that is over sooner is made again, with so many times more messages.
SHORTEST = 0.3
MORE = 20
# Measured as they are, with one consumer.
LINKS = (ZMQ_COPY, ZMQ_NO_COPY)


class Way(Protocol):
    """One way to hand over; the object crosses a spawn, each side makes its end of it."""

    def producer(self, payload: Tensor, fills: bool) -> Put:
        """Hands over `payload`; not `fills`: without what the encoder would do in every case."""
        ...

    def consumer(self) -> Take: ...

    def close(self) -> None: ...


class Plain:
    def close(self) -> None:
        """Its ends go with their process."""


@dataclass
class PoolWay(Plain):
    """shmblocks: in place, or with a copy from the producer's tensor."""

    pool: str
    queue: str
    in_place: bool

    def producer(self, payload: Tensor, fills: bool) -> Put:
        pool = BlockPool.attach(self.pool, prefault="now")
        queue = HandleQueue.attach(self.queue, message_type=BlockHandle)
        copies = fills or not self.in_place

        def put() -> None:
            handle = pool.alloc(len(payload), timeout=PATIENCE)
            if handle is None:
                raise TimeoutError
            # In place, the encoder writes its result into the pool, which no handoff pays for.
            destination = pool.view(handle)[FIELD]
            if copies:
                destination.copy_(payload)
            queue.put(pool.publish(handle))

        return put

    def consumer(self) -> Take:
        pool = BlockPool.attach(self.pool, prefault="now")
        queue = HandleQueue.attach(self.queue, message_type=BlockHandle)

        def take() -> tuple[Tensor, Callable[[], None]]:
            lease = pool.open(queue.get())
            return lease[FIELD], lease.release

        return take


@dataclass
class TorchWay(Plain):
    queue: ProcessQueue[Tensor]
    strategy: str

    def producer(self, payload: Tensor, fills: bool) -> Put:
        set_strategy(self.strategy)
        # A tensor that was sent once lies in shared memory already: an encoder's result is a new
        # one each time. Filling it is the encoder's affair.
        make = torch.clone if fills else torch.empty_like
        return lambda: self.queue.put(make(payload))

    def consumer(self) -> Take:
        set_strategy(self.strategy)
        return lambda: (self.queue.get(), _nothing)


@dataclass
class NumpyWay(Plain):
    queue: ProcessQueue[object]

    def producer(self, payload: Tensor, fills: bool) -> Put:
        array = payload.view(torch.int16).numpy()
        return lambda: self.queue.put(array)

    def consumer(self) -> Take:
        return lambda: (torch.from_numpy(self.queue.get()).view(torch.bfloat16), _nothing)


@dataclass
class SegmentWay(Plain):
    """A `SharedMemory` object per message, its name through a queue."""

    queue: ProcessQueue[str]
    hidden: int
    tokens: int

    def producer(self, payload: Tensor, fills: bool) -> Put:
        def put() -> None:
            segment = SharedMemory(create=True, size=payload.nbytes)
            as_tensor(segment, self.hidden, self.tokens).copy_(payload)
            self.queue.put(segment.name)
            segment.close()

        return put

    def consumer(self) -> Take:
        def take() -> tuple[Tensor, Callable[[], None]]:
            segment = SharedMemory(self.queue.get())
            return as_tensor(segment, self.hidden, self.tokens), partial(_end, segment)

        return take


@dataclass
class LinkWay:
    """A link of the handoffs, as it is."""

    ends: Ends
    opened: list[Sender | Receiver] = field(default_factory=list)

    def close(self) -> None:
        """Both ends are made anew for the next run: the address must be free."""
        for end in self.opened:
            end.close()

    def producer(self, payload: Tensor, fills: bool) -> Put:
        sender: Sender = self.ends.sender()
        self.opened.append(sender)

        def put() -> None:
            outgoing = sender.begin(len(payload))
            if fills and outgoing.payload is not None:
                outgoing.payload.copy_(payload)
            outgoing.send()

        return put

    def consumer(self) -> Take:
        receiver: Receiver = self.ends.receiver()
        self.opened.append(receiver)

        def take() -> tuple[Tensor, Callable[[], None]]:
            incoming = receiver.receive()
            tensor = incoming.tensor
            if tensor is None:
                raise TypeError("a link without data")
            return tensor, incoming.release

        return take


def _end(segment: SharedMemory) -> None:
    segment.close()
    segment.unlink()


def _nothing() -> None:
    """Dropping the tensor is all."""


def ways(context: ForkServerContext, undo: ExitStack, tokens: int, hidden: int) -> dict[str, Way]:
    pool, queue = unique_name("throughput"), unique_name("throughput-queue")
    blocks = (DEPTH + 8) * -(-tokens // BLOCK_SIZE)
    config = PoolConfig(
        total_tokens=blocks * BLOCK_SIZE,
        fields=(Field(FIELD, (hidden,), "bf16"),),
        block_size=BLOCK_SIZE,
    )
    undo.enter_context(BlockPool.create(pool, config, prefault="now"))
    undo.enter_context(closing(HandleQueue.create(queue, DEPTH, message_type=BlockHandle)))

    def process_queue() -> ProcessQueue[object]:
        made: ProcessQueue[object] = context.Queue(DEPTH)
        undo.callback(made.close)
        return made

    def tensor_queue() -> ProcessQueue[Tensor]:
        made: ProcessQueue[Tensor] = torch.multiprocessing.get_context("forkserver").Queue(DEPTH)
        undo.callback(made.close)
        return made

    links: dict[str, Way] = {}
    for candidate in LINKS:
        if is_installed(candidate) and not isinstance(candidate.how, SoloPlan):
            settings = Settings(tokens=(tokens,), hidden=hidden)
            ends = undo.enter_context(candidate.how(context, settings))
            links[candidate.label] = LinkWay(ends)
    return {
        "shmblocks, in place": PoolWay(pool, queue, in_place=True),
        "shmblocks, with copy": PoolWay(pool, queue, in_place=False),
        "torch Queue, file_descriptor": TorchWay(tensor_queue(), "file_descriptor"),
        "torch Queue, file_system": TorchWay(tensor_queue(), "file_system"),
        "SharedMemory per message": SegmentWay(process_queue(), hidden, tokens),  # type: ignore[arg-type]
        "numpy pickled, mp.Queue": NumpyWay(process_queue()),
        **links,
    }


def throughput(
    context: ForkServerContext,
    consumers: tuple[int, ...],
    tokens: int,
    hidden: int,
    messages: int,
) -> Study:
    """`messages` of [tokens, hidden] bf16 through each way, shared by so many consumers."""
    rows, numbers = [], {}
    with ExitStack() as undo:
        for name, way in ways(context, undo, tokens, hidden).items():
            cells = []
            memory = 0
            for count in consumers:
                if isinstance(way, LinkWay) and count > 1:
                    cells.append("")
                    continue
                _run(context, way, count, tokens, hidden, CHECKED * count, checked=True)
                rate, peak = _run(context, way, count, tokens, hidden, messages)
                if messages / rate < SHORTEST:
                    many = MORE * messages
                    rate, peak = _run(context, way, count, tokens, hidden, many)
                memory = memory or peak
                cells.append(f"{rate:,.0f}")
                numbers[f"{name}, {count} consumers, messages a second"] = rate
            numbers[f"{name}, peak PSS in bytes"] = memory
            rows.append([name, *cells, f"{memory / 1e6:.0f} MB"])
    return Study(
        name="throughput",
        title=f"Messages a second, {tokens:,} x {hidden} x bf16, by consumers of one queue",
        note="One producer; every message goes to one of the consumers. pyzmq has one consumer "
        "only: PUSH deals messages out in turn, whoever is free. iceoryx2 is left out: its "
        "streams stalled in some runs, for a reason that is not understood. "
        "Peak PSS: producer and one consumer together, above what both had "
        "before; shmblocks' pool is mapped and prefaulted before, and counts as its size.",
        header=["", *(str(count) for count in consumers), "peak PSS"],
        rows=rows,
        numbers=numbers,
    )


def _run(
    context: ForkServerContext,
    way: Way,
    count: int,
    tokens: int,
    hidden: int,
    messages: int,
    *,
    checked: bool = False,
) -> tuple[float, int]:
    """Messages a second, and (with one consumer) the peak of memory in bytes."""
    shares = [messages // count + (place < messages % count) for place in range(count)]
    barrier = context.Barrier(count + 2)
    processes = [
        context.Process(target=consume, args=(way, barrier, hidden, share, checked), daemon=True)
        for share in shares
    ]
    sends = (way, barrier, tokens, hidden, messages, checked)
    processes.append(context.Process(target=produce, args=sends, daemon=True))
    try:
        for process in processes:
            process.start()
        barrier.wait(PATIENCE)  # everyone is ready
        watched: list[BaseProcess] = [*processes] if count == 1 and not checked else []
        with Watch(watched) as watch:
            start = time.perf_counter()
            barrier.wait(PATIENCE)
            barrier.wait(PATIENCE)  # everything was read
            took = time.perf_counter() - start
        for process in processes:
            process.join(PATIENCE)
            if process.exitcode != 0:
                raise RuntimeError(f"{process.name} ended with {process.exitcode}")
        return messages / took, watch.peak
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def produce(
    way: Way, barrier: Barrier, tokens: int, hidden: int, messages: int, checked: bool
) -> None:
    with _together(barrier):
        payload = torch.empty(tokens, hidden, dtype=torch.bfloat16)
        Pattern(hidden, 0).fill(payload, 1)
        put = way.producer(payload, checked)
        barrier.wait(PATIENCE)
        barrier.wait(PATIENCE)
        for _ in range(messages):
            put()
        barrier.wait(PATIENCE)
        way.close()


def consume(way: Way, barrier: Barrier, hidden: int, messages: int, checked: bool) -> None:
    with _together(barrier):
        take = way.consumer()
        pattern = Pattern(hidden, 0)
        barrier.wait(PATIENCE)
        barrier.wait(PATIENCE)
        for _ in range(messages):
            tensor, give_back = take()
            if checked:
                pattern.check(tensor, 1, len(tensor))
            tensor[-1, -1].item()
            del tensor  # or what it lies in could not be given back
            give_back()
        barrier.wait(PATIENCE)
        way.close()


@contextmanager
def _together(barrier: Barrier) -> Iterator[None]:
    """Who fails ends it for all: nobody waits for a process that is gone."""
    torch.set_num_threads(1)
    try:
        yield
    except BaseException:
        barrier.abort()
        raise


class Watch:
    """Looks at the memory of processes until it is over."""

    def __init__(self, processes: list[BaseProcess]) -> None:
        self._pids = [process.pid for process in processes]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._before = self._now()
        self._most = self._before

    @property
    def peak(self) -> int:
        """Bytes above the beginning."""
        return self._most - self._before

    def __enter__(self) -> Watch:
        if self._pids:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._pids:
            self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.01):
            self._most = max(self._most, self._now())

    def _now(self) -> int:
        return sum(pss(pid) for pid in self._pids if pid is not None)
