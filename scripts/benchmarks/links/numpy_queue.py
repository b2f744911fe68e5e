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

from benchmarks.link import Context, Ends
from benchmarks.links.buffers import Held, OwnBuffers
from benchmarks.settings import Settings

Array = npt.NDArray[np.int16]


class ArrayOut:
    def __init__(self, queue: Queue[Array], payload: Tensor) -> None:
        self._queue = queue
        self.payload = payload

    def send(self) -> None:
        self._queue.put(self.payload.view(torch.int16).numpy())


class NumpySender:
    def __init__(self, queue: Queue[Array], hidden: int) -> None:
        self._queue = queue
        self._own = OwnBuffers(hidden)

    def begin(self, tokens: int) -> ArrayOut:
        return ArrayOut(self._queue, self._own.get(tokens))

    def close(self) -> None:
        self._queue.close()


class NumpyReceiver:
    def __init__(self, queue: Queue[Array]) -> None:
        self._queue = queue

    def receive(self) -> Held:
        return Held(torch.from_numpy(self._queue.get()).view(torch.bfloat16))

    def close(self) -> None:
        self._queue.close()


@contextmanager
def connect(context: Context, settings: Settings) -> Iterator[Ends]:
    queue: Queue[Array] = context.Queue()
    with closing(queue):
        yield Ends(partial(NumpySender, queue, settings.hidden), partial(NumpyReceiver, queue))
