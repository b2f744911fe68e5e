"""Peer: the tensor put into `torch.multiprocessing.Queue`, as it is.

`put` moves the tensor's storage into shared memory (that is the copy) and sends a descriptor of
it. A tensor that was sent once lies in shared memory already and would go for free the next time;
an encoder's output is a new tensor each time, so each message is one. Making it is not timed
here more than for any other link: `begin` makes an empty tensor, `fill` faults it in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from multiprocessing.queues import Queue

import torch
import torch.multiprocessing
from torch import Tensor

from benchmarks.link import Context, Ends
from benchmarks.links.buffers import Held
from benchmarks.settings import Settings


def set_strategy(strategy: str) -> None:
    """For this process; which is why each strategy has processes of its own."""
    torch.multiprocessing.set_sharing_strategy(strategy)  # type: ignore[no-untyped-call,unused-ignore]


class TensorOut:
    def __init__(self, queue: Queue[Tensor], payload: Tensor) -> None:
        self._queue = queue
        self.payload = payload

    def send(self) -> None:
        self._queue.put(self.payload)


class TorchSender:
    def __init__(self, queue: Queue[Tensor], strategy: str, hidden: int) -> None:
        set_strategy(strategy)
        self._queue = queue
        self._hidden = hidden

    def begin(self, tokens: int) -> TensorOut:
        return TensorOut(self._queue, torch.empty(tokens, self._hidden, dtype=torch.bfloat16))

    def close(self) -> None:
        self._queue.close()


class TorchReceiver:
    def __init__(self, queue: Queue[Tensor], strategy: str) -> None:
        set_strategy(strategy)
        self._queue = queue

    def receive(self) -> Held:
        return Held(self._queue.get())

    def close(self) -> None:
        self._queue.close()


@contextmanager
def connect(strategy: str, context: Context, settings: Settings) -> Iterator[Ends]:
    queue: Queue[Tensor] = torch.multiprocessing.get_context("forkserver").Queue()
    with closing(queue):
        yield Ends(
            partial(TorchSender, queue, strategy, settings.hidden),
            partial(TorchReceiver, queue, strategy),
        )
