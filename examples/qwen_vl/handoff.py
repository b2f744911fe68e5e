"""Handing embeddings over through a pool, in three ways.

    embedding process            queues with handles              language process i
    end.send(room, ...)  ------  <name>.to-i, <name>.from-i  ---  end.ask(room, way) -> Asked
           |                                                          | wait()
           +--> pool: input_embeddings, fill_ids, mrope_positions  ---+--> Received, read in place
                      deepstack_embeddings, aux

- The queues are `HandleQueue`s: a process may be killed in the middle of a put or get, and the one
  that takes its place attaches to the same queues by name.
- `Received` holds blocks until it is left; the last reader's leaving frees them.

What is not here: the models, or the launcher. torch_queue.py has the same ends without a pool.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

from qwen_vl.halves import Embedded
from qwen_vl.messages import Way
from qwen_vl.models import ModelSettings
from shmblocks import (
    BlockHandle,
    BlockPool,
    HandleQueue,
    PoolConfig,
    PoolTimeoutError,
    multimodal_fields,
)
from shmblocks.transfer import (
    EmbeddingEndpoint,
    LanguageEndpoint,
    Receiver,
    Sender,
    TransferResult,
)


@dataclass(frozen=True)
class Received:
    """The embeddings as a language process holds them, and how they came."""

    embedded: Embedded
    num_blocks: int
    rounds: int
    num_bytes: int
    is_zero_copy: bool


class Asked(Protocol):
    """Embeddings that are to come."""

    def wait(self, seconds: float) -> AbstractContextManager[Received] | None:
        """What came, or None when it is not there yet. An error when it never will be."""

    def give_up(self, reason: str) -> None:
        """Nothing comes any more."""


class LanguageEnd(Protocol):
    """Where a language process asks."""

    def ask(self, room: int, way: Way) -> Asked:
        """Ask for the embeddings of a room."""


class EmbeddingEnd(Protocol):
    """Where the embedding process sends."""

    def send(self, room: int, embedded: Embedded, way: Way, readers: Sequence[int]) -> None:
        """Hand over, and return when every reader has it; an error when one never will."""


class Line(Protocol):
    """What both sides are given to make their ends of; it is pickled when processes start."""

    def embedding_end(self) -> AbstractContextManager[EmbeddingEnd]:
        """In the embedding process."""

    def language_end(self, index: int) -> AbstractContextManager[LanguageEnd]:
        """In language process number `index`."""


# ------------------------------------------------------------------------------- made by name


def pool_config(settings: ModelSettings) -> PoolConfig:
    """A pool with exactly the fields that cross for this model."""
    size = settings.size
    return PoolConfig(
        total_tokens=size.pool_tokens,
        fields=multimodal_fields(size.hidden, size.num_deepstack, dtype=settings.dtype),
        block_size=size.block_size,
        default_num_blocks=size.landing_blocks,
        unclaimed_timeout=20.0,  # a language process asks before the blocks are written
    )


@dataclass(frozen=True)
class PoolLine:
    """A pool and two queues for each language process, all of them found by name."""

    name: str
    readers: int
    timeout: float = 30.0  # seconds that one side waits for the other within a room

    @contextmanager
    def created(self, settings: ModelSettings) -> Iterator[BlockPool]:
        """In the launcher: they stay while this is open, whoever dies."""
        with ExitStack() as stack:
            config = pool_config(settings)
            pool = BlockPool.create(self.name, config, role="launcher", device=settings.device)
            stack.enter_context(pool)
            for index in range(self.readers):
                for name in self._queue_names(index):
                    stack.enter_context(HandleQueue.create(name))
            yield pool

    @contextmanager
    def embedding_end(self) -> Iterator[EmbeddingEnd]:
        """In the embedding process."""
        with ExitStack() as stack:
            pool = stack.enter_context(BlockPool.attach(self.name, role="embedding"))
            endpoints = []
            for index in range(self.readers):
                to, back = (
                    stack.enter_context(HandleQueue.attach(name))
                    for name in self._queue_names(index)
                )
                endpoints.append(stack.enter_context(EmbeddingEndpoint(pool, to, back)))
            yield PoolEmbeddingEnd(pool, endpoints, self.timeout)

    @contextmanager
    def language_end(self, index: int) -> Iterator[LanguageEnd]:
        """In language process number `index`."""
        with ExitStack() as stack:
            pool = stack.enter_context(BlockPool.attach(self.name, role=f"language {index}"))
            to, back = (
                stack.enter_context(HandleQueue.attach(name)) for name in self._queue_names(index)
            )
            yield PoolLanguageEnd(stack.enter_context(LanguageEndpoint(pool, back, to)))

    def _queue_names(self, index: int) -> tuple[str, str]:
        return f"{self.name}.to-{index}", f"{self.name}.from-{index}"


# ---------------------------------------------------------------------------- embedding process


class PoolEmbeddingEnd:
    """Sends through a pool; one endpoint for each language process."""

    def __init__(
        self, pool: BlockPool, endpoints: Sequence[EmbeddingEndpoint], timeout: float
    ) -> None:
        self._pool, self._endpoints, self._timeout = pool, endpoints, timeout

    def send(self, room: int, embedded: Embedded, way: Way, readers: Sequence[int]) -> None:
        """Hand over by `way`."""
        if way == "fan-out":
            self._fan_out(room, embedded, readers)
            return
        endpoint, delta = self._endpoints[readers[0]], embedded.delta
        if way == "push":
            handle = self._write(room, embedded)
            sender = endpoint.send_handle(room, handle, mrope_position_delta=delta)
        else:
            sender = endpoint.send(room, embedded.fields, mrope_position_delta=delta)
        try:
            sender.wait(self._timeout)
        finally:
            sender.abort("the embedding process waited in vain")  # nothing when it has ended

    def _fan_out(self, room: int, embedded: Embedded, readers: Sequence[int]) -> None:
        """Write once; every language process reads the same blocks, the last one frees them."""
        handle = self._write(room, embedded)
        handle = self._pool.publish(handle, readers=len(readers))
        senders: list[Sender] = []
        try:
            for reader in readers:
                endpoint = self._endpoints[reader]
                senders.append(endpoint.send_handle(room, handle, published=True))
            for sender in senders:
                sender.wait(self._timeout)
        except BaseException:
            for sender in senders:
                sender.abort("another reader has failed")
            self._pool.free(handle)  # published blocks stay ours when a room fails
            raise

    def _write(self, room: int, embedded: Embedded) -> BlockHandle:
        """The embeddings in blocks of our own."""
        count = embedded.num_tokens
        handle = self._pool.alloc(count, f"room {room}", timeout=self._timeout)
        if handle is None:
            raise PoolTimeoutError(f"no room for {count} tokens within {self._timeout:g} s")
        view = self._pool.view(handle)
        for name, tensor in embedded.fields.items():
            view[name].copy_(tensor)
        view.aux[0], view.aux[1] = count, embedded.delta
        return handle


# ----------------------------------------------------------------------------- language process


class PoolLanguageEnd:
    """Asks over one endpoint."""

    def __init__(self, endpoint: LanguageEndpoint) -> None:
        self._endpoint = endpoint

    def ask(self, room: int, way: Way) -> Asked:
        """Ask for a room; blocks are reserved here, at once, when it is to land."""
        mode: Literal["landing", "push"] = "landing" if way == "landing" else "push"
        return PoolAsked(self._endpoint.receive(room, mode=mode), self._endpoint.pool)


class PoolAsked:
    """One room of a language endpoint."""

    def __init__(self, receiver: Receiver, pool: BlockPool) -> None:
        self._receiver, self._pool = receiver, pool

    def wait(self, seconds: float) -> AbstractContextManager[Received] | None:
        """What came, or None when it is not there yet."""
        try:
            return _held(self._receiver.wait(seconds), self._pool)
        except PoolTimeoutError:
            return None

    def give_up(self, reason: str) -> None:
        """End the room."""
        self._receiver.abort(reason)


@contextmanager
def _held(result: TransferResult, pool: BlockPool) -> Iterator[Received]:
    with result:
        yield Received(
            embedded=Embedded(result, result.mrope_position_delta),
            num_blocks=pool.config.blocks_for(result.num_tokens),
            rounds=result.rounds,
            num_bytes=result.num_bytes,
            is_zero_copy=result.is_zero_copy,
        )
