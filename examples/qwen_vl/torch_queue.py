"""The ends of handoff.py over `torch.multiprocessing.Queue`, to compare with: no pool.

It is what a launcher would do without one: the tensors are put on the queue, torch moves them to
shared memory of their own (on a GPU: opens them over CUDA IPC), and pickles where they are.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.multiprocessing

from qwen_vl.halves import Embedded
from qwen_vl.handoff import Received
from qwen_vl.messages import Way

if TYPE_CHECKING:
    from qwen_vl.handoff import Asked, EmbeddingEnd, LanguageEnd, Sending


@dataclass(frozen=True)
class TorchQueueTransport:
    """A queue for each language process."""

    queues: tuple[Any, ...]

    @classmethod
    def create(cls, readers: int) -> TorchQueueTransport:
        """In the launcher."""
        context = torch.multiprocessing.get_context("spawn")
        return cls(tuple(context.Queue() for _ in range(readers)))

    @contextmanager
    def embedding_end(self) -> Iterator[EmbeddingEnd]:
        """In the embedding process."""
        yield TorchEmbeddingEnd(self.queues)

    @contextmanager
    def language_end(self, index: int) -> Iterator[LanguageEnd]:
        """In language process number `index`."""
        yield TorchLanguageEnd(self.queues[index])


class TorchEmbeddingEnd:
    """Puts the tensors themselves."""

    def __init__(self, queues: Sequence[Any]) -> None:
        self._queues = queues

    def send(self, room: int, embedded: Embedded, way: Way, readers: Sequence[int]) -> Sending:
        """The same to each reader, whatever `way` says; there is no acknowledgement."""
        for reader in readers:
            self._queues[reader].put((room, dict(embedded.fields), embedded.delta))
        return TorchSending()


class TorchSending:
    """Put is put."""

    def wait(self, seconds: float) -> bool:
        """There is nothing to wait for."""
        return True

    def give_up(self, reason: str) -> None:
        """Nothing can be taken back."""


class TorchLanguageEnd:
    """Takes the tensors themselves."""

    def __init__(self, tensors: Any) -> None:  # noqa: ANN401
        self._queue = tensors

    def ask(self, room: int, way: Way) -> Asked:
        """Nothing is asked: what was put arrives."""
        return TorchAsked(self._queue, room)


class TorchAsked:
    """Tensors that are to come."""

    def __init__(self, tensors: Any, room: int) -> None:  # noqa: ANN401
        self._queue, self._room = tensors, room

    def wait(self, seconds: float) -> AbstractContextManager[Received] | None:
        """What came for this room; what came for others, given up before, is dropped."""
        try:
            room, fields, delta = self._queue.get(timeout=seconds)
        except queue.Empty:
            return None
        if room != self._room:
            return None
        count = sum(tensor.numel() * tensor.element_size() for tensor in fields.values())
        return nullcontext(
            Received(Embedded(fields, delta), 0, rounds=1, num_bytes=count, is_zero_copy=False)
        )

    def give_up(self, reason: str) -> None:
        """There is nothing to give back."""
