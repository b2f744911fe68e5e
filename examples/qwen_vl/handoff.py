"""Handing embeddings over through a pool, in three ways.

    embedding process            queues with handles              language process i
    end.send(room, ...)  ------  <name>.to-i, <name>.from-i  ---  end.ask(room, way) -> Asked
           | Sending: wait()                                          | wait()
           +--> pool: input_embeddings, fill_ids, mrope_positions  ---+--> Received, read in place
                      deepstack_embeddings, aux

- The queues are `HandleQueue`s: a process may be killed in the middle of a put or get, and the one
  that replaces it attaches to the same queues by name.
- `Received` holds blocks until its `with` ends; the last reader frees them.

What is not here: the models, or the launcher. torch_queue.py has the same ends without a pool.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
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
    StaleHandleError,
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


class Sending(Protocol):
    """Embeddings on their way."""

    def wait(self, seconds: float) -> bool:
        """Whether every reader has them by then. An error when one never will."""

    def give_up(self, reason: str) -> None:
        """Nothing more is sent; nothing happens when every reader has them."""


class EmbeddingEnd(Protocol):
    """Where the embedding process sends."""

    def send(self, room: int, embedded: Embedded, way: Way, readers: Sequence[int]) -> Sending:
        """Begin to hand over. `embedded` stays as it is until that has ended."""


class Transport(Protocol):
    """What processes make their ends of; it is pickled when they start."""

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
class PoolTransport:
    """A pool and two queues for each language process, all of them found by name."""

    name: str
    readers: int
    timeout: float = 30.0  # seconds that one process waits for the other within a room

    @contextmanager
    def created(self, settings: ModelSettings) -> Iterator[BlockPool]:
        """In the launcher: pool and queues stay while this is open, whichever process dies."""
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

    def send(self, room: int, embedded: Embedded, way: Way, readers: Sequence[int]) -> PoolSending:
        """Begin to hand over by `way`."""
        if way == "fan-out":
            return self._fan_out(room, embedded, readers)
        endpoint, delta = self._endpoints[readers[0]], embedded.delta
        if way == "push":
            handle = self._write(room, embedded)
            sender = endpoint.send_handle(room, handle, mrope_position_delta=delta)
        else:
            sender = endpoint.send(room, embedded.fields, mrope_position_delta=delta)
        return PoolSending(self._pool, self._timeout, [sender], None)

    def _fan_out(self, room: int, embedded: Embedded, readers: Sequence[int]) -> PoolSending:
        """Write once; every language process reads the same blocks, the last one frees them."""
        handle = self._write(room, embedded)
        handle = self._pool.publish(handle, readers=len(readers))
        sending = PoolSending(self._pool, self._timeout, [], handle)
        try:
            for reader in readers:
                endpoint = self._endpoints[reader]
                sending.senders.append(endpoint.send_handle(room, handle, published=True))
        except BaseException:
            sending.give_up("another reader has failed")
            raise
        return sending

    def _write(self, room: int, embedded: Embedded) -> BlockHandle:
        """The embeddings in blocks of our own."""
        count = embedded.num_tokens
        handle = self._pool.alloc(count, f"room {room}", timeout=self._timeout)
        if handle is None:
            raise PoolTimeoutError(f"no free blocks for {count} tokens within {self._timeout:g} s")
        view = self._pool.view(handle)
        for name, tensor in embedded.fields.items():
            view[name].copy_(tensor)
        view.aux[0], view.aux[1] = count, embedded.delta
        return handle


class PoolSending:
    """One room, to one or several readers; `published`: blocks of ours that all of them read."""

    def __init__(
        self, pool: BlockPool, timeout: float, senders: list[Sender], published: BlockHandle | None
    ) -> None:
        self._pool, self._published = pool, published
        self._deadline = time.monotonic() + timeout
        self.senders = senders
        self._has_ended = False

    def wait(self, seconds: float) -> bool:
        """Whether every reader has it by then. An error when one never will, or is too slow."""
        until = min(time.monotonic() + seconds, self._deadline)
        for sender in self.senders:
            try:
                sender.wait(max(0.0, until - time.monotonic()))
            except PoolTimeoutError:
                if time.monotonic() >= self._deadline:
                    raise
                return False
        self._has_ended = True
        return True

    def give_up(self, reason: str) -> None:
        """End the room for all of them."""
        if self._has_ended:
            return
        self._has_ended = True
        with ExitStack() as all_of_it:  # whatever one of them raises
            all_of_it.callback(self._free)
            for sender in self.senders:
                all_of_it.callback(sender.abort, reason)

    def _free(self) -> None:
        """When a room fails, published blocks stay ours until all readers have released them."""
        if self._published is not None:
            with suppress(StaleHandleError):
                self._pool.free(self._published)


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
