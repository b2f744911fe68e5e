"""Peers that come with Python and torch.

- *SharedMemory*: one `multiprocessing.shared_memory.SharedMemory` object per message. The producer
  creates it, copies in, sends name and size, closes; the consumer attaches, reads, closes and
  unlinks (as clean-up). The name goes through the same carrier as a handle of shmblocks does.
- *torch Queue*: the tensor put into `torch.multiprocessing.Queue`, as it is. `put` moves the
  tensor's storage into shared memory (that is the copy) and sends a descriptor of it. A tensor that
  was sent once lies in shared memory already and would go for free the next time; an encoder's
  output is a new tensor each time, so each message is one. Making it is not timed here more than
  for any other transport: `begin` makes an empty tensor, the untimed fill faults it in.
- *numpy*: an array pickled through `multiprocessing.Queue`. numpy knows no bf16, so the same bytes
  travel as int16, a view at both ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from multiprocessing.queues import Queue
from multiprocessing.shared_memory import SharedMemory

import torch
import torch.multiprocessing
from torch import Tensor

from benchmarks.settings import Settings
from benchmarks.transport import Context, Ends, Incoming, Outgoing, Receiver, Sender, copying_sender
from benchmarks.transports.shmblocks_pool import QUEUE_LENGTH, BytesIn, BytesOut, Carrier

# --- a SharedMemory object per message --------------------------------------------------------


def segment_sender(carrier: BytesOut, hidden: int) -> Sender:
    def send(payload: Tensor) -> None:
        segment = SharedMemory(create=True, size=payload.nbytes)
        as_tensor(segment, hidden, len(payload)).copy_(payload)
        carrier.send_bytes(f"{segment.name} {len(payload)}".encode())
        segment.close()

    return copying_sender(send, carrier.close, hidden)


def segment_receiver(carrier: BytesIn, hidden: int) -> Receiver:
    def receive() -> Incoming:
        name, tokens = carrier.recv_bytes().decode().split()
        segment = SharedMemory(name)
        return Incoming(as_tensor(segment, hidden, int(tokens)), partial(_end, segment))

    return Receiver(receive, carrier.close)


def _end(segment: SharedMemory) -> None:
    segment.close()
    segment.unlink()


def as_tensor(segment: SharedMemory, hidden: int, tokens: int) -> Tensor:
    """A view of the payload. The segment may be larger: its size is whole pages."""
    values = torch.frombuffer(segment.buf, dtype=torch.bfloat16, count=tokens * hidden)
    return values.view(tokens, hidden)


@contextmanager
def connect_shared_memory(carrier: Carrier, context: Context, settings: Settings) -> Iterator[Ends]:
    receive, send = carrier(context)
    with closing(receive), closing(send):
        yield Ends(
            partial(segment_sender, send, settings.hidden),
            partial(segment_receiver, receive, settings.hidden),
        )


# --- torch.multiprocessing.Queue --------------------------------------------------------------


def set_strategy(strategy: str) -> None:
    """It holds for a process; so each strategy has processes of its own."""
    torch.multiprocessing.set_sharing_strategy(strategy)  # type: ignore[no-untyped-call,unused-ignore]


def tensor_sender(queue: Queue[Tensor], strategy: str, hidden: int) -> Sender:
    set_strategy(strategy)

    def begin(tokens: int) -> Outgoing:
        payload = torch.empty(tokens, hidden, dtype=torch.bfloat16)
        return Outgoing(payload, partial(queue.put, payload))

    return Sender(begin, queue.close)


def tensor_receiver(queue: Queue[Tensor], strategy: str) -> Receiver:
    set_strategy(strategy)
    return Receiver(lambda: Incoming(queue.get()), queue.close)


@contextmanager
def connect_torch_queue(strategy: str, context: Context, settings: Settings) -> Iterator[Ends]:
    queues = torch.multiprocessing.get_context("forkserver")
    queue: Queue[Tensor] = queues.Queue(QUEUE_LENGTH)
    with closing(queue):
        yield Ends(
            partial(tensor_sender, queue, strategy, settings.hidden),
            partial(tensor_receiver, queue, strategy),
        )


# --- a numpy array through multiprocessing.Queue ----------------------------------------------


def array_sender(queue: Queue[object], hidden: int) -> Sender:
    return copying_sender(
        lambda payload: queue.put(payload.view(torch.int16).numpy()), queue.close, hidden
    )


def array_receiver(queue: Queue[object]) -> Receiver:
    def receive() -> Incoming:
        return Incoming(torch.from_numpy(queue.get()).view(torch.bfloat16))

    return Receiver(receive, queue.close)


@contextmanager
def connect_numpy_queue(context: Context, settings: Settings) -> Iterator[Ends]:
    queue: Queue[object] = context.Queue()
    with closing(queue):
        yield Ends(partial(array_sender, queue, settings.hidden), partial(array_receiver, queue))
