"""Peer: a numpy array pickled through `multiprocessing.Queue`.

numpy knows no bf16, so the same bytes travel as int16, a view on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from multiprocessing.queues import Queue

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.settings import Settings
from benchmarks.transport import Context, Ends, Incoming, Receiver, Sender, copying_sender

Array = npt.NDArray[np.int16]


def sender(queue: Queue[Array], hidden: int) -> Sender:
    def send(payload: Tensor) -> None:
        queue.put(payload.view(torch.int16).numpy())

    return copying_sender(send, queue.close, hidden)


def receiver(queue: Queue[Array]) -> Receiver:
    def receive() -> Incoming:
        return Incoming(torch.from_numpy(queue.get()).view(torch.bfloat16))

    return Receiver(receive, queue.close)


@contextmanager
def connect(context: Context, settings: Settings) -> Iterator[Ends]:
    queue: Queue[Array] = context.Queue()
    with closing(queue):
        yield Ends(partial(sender, queue, settings.hidden), partial(receiver, queue))
