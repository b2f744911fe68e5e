"""The block design of SGLang's encode/language disaggregation, v4.0, over shared memory.

It has the original's three names with the same signatures, so an engine that uses the original
only changes an import:

    from shmblocks.sglang import (
        MetadataAllocation, MultimodalDataBuffers, ReqToMetadataBlockAllocator,
    )

What is different
- Both classes take `name=`: processes that give the same name share one allocator, or one set of
  buffers. The first one creates it. Without a name it is private until it is inherited (fork) or
  pickled (spawn).
- The blocks of an allocation are always consecutive, and blocks of a dead process are freed.
- `mrope_positions` is stored per token, `[tokens, 3]`, so that a chunk of a resumed transfer is one
  slice. `get_buf` gives it as `[3, tokens]`.

The allocator and the buffers are two segments, because the original makes them separately. Make
both with the same sizes: then block n of one is block n of the other.

Environment: `SGLANG_MULTIMODAL_BLOCK_SIZE` (128), `SGLANG_DEFAULT_MULTIMODAL_BLOCKS` (8).
"""

from __future__ import annotations

import dataclasses
import os
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from shmblocks._state.layout import AUX_BYTES
from shmblocks.config import (
    Field,
    PoolConfig,
    default_block_size,
    default_default_num_blocks,
    multimodal_fields,
)
from shmblocks.errors import IncompatiblePoolError, PoolExistsError, PoolNotFoundError
from shmblocks.handle import BlockHandle
from shmblocks.pool import BlockPool

if TYPE_CHECKING:
    import torch

EMBEDDINGS = "input_embeddings"
FILL_IDS = "fill_ids"
MROPE = "mrope_positions"
DEEPSTACK = "deepstack_embeddings"

# Attempts to create or attach, while others create and remove a pool of the same name.
_ATTEMPTS = 100


@dataclasses.dataclass(frozen=True)
class MetadataAllocation:
    """Blocks `start_block .. start_block + num_blocks - 1` for `num_tokens` tokens.

    `handle` proves, when it is freed, that it is not stale. An allocation that an engine built has
    no handle and is freed by its numbers alone.
    """

    start_block: int
    num_blocks: int
    num_tokens: int
    handle: BlockHandle | None = dataclasses.field(default=None, repr=False, compare=False)


class ReqToMetadataBlockAllocator:
    """Hands out consecutive blocks, next fit, to every process that shares it."""

    def __init__(
        self, total_tokens: int, block_size: int | None = None, *, name: str | None = None
    ) -> None:
        """`total_tokens` is rounded up to whole blocks; `block_size` None: the environment's."""
        config = _config(total_tokens, block_size, ())
        self._pool = _shared(name, "blocks", config)
        self.block_size = config.block_size
        self.num_blocks = config.total_blocks
        self.default_num_blocks = self._pool.config.default_num_blocks

    @property
    def pool(self) -> BlockPool:
        """The pool underneath: `stats()`, `check()`, `reap()`, `name`."""
        return self._pool

    def available_blocks(self) -> int:
        """Blocks that are free at this moment."""
        return self._pool.available_blocks()

    def alloc(
        self, num_tokens: int, req_id: object = None, fake: bool = False
    ) -> MetadataAllocation | None:
        """Blocks for a known length (embedding side); None when there are none now."""
        num_blocks = -(-num_tokens // self.block_size)
        return self.alloc_blocks(num_blocks, num_tokens, req_id, fake)

    def alloc_default(self, req_id: object = None, fake: bool = False) -> MetadataAllocation | None:
        """The default number of blocks, for a length not known yet (language side)."""
        num_tokens = self.default_num_blocks * self.block_size
        return self.alloc_blocks(self.default_num_blocks, num_tokens, req_id, fake)

    def alloc_blocks(
        self, num_blocks: int, num_tokens: int, req_id: object = None, fake: bool = False
    ) -> MetadataAllocation | None:
        """`num_blocks` consecutive blocks; None when there are none now, or never can be."""
        if not fake and num_blocks > self.num_blocks:
            return None
        text = None if req_id is None else str(req_id)
        handle = self._pool.alloc_blocks(num_blocks, num_tokens, text, fake)
        if handle is None:
            return None
        return MetadataAllocation(handle.start_block, handle.num_blocks, handle.num_tokens, handle)

    def free(
        self, allocation: MetadataAllocation, req_id: object = None, fake: bool = False
    ) -> None:
        """Give blocks back, from any process. Raises `StaleHandleError` when they were freed."""
        if fake:
            return
        handle = allocation.handle
        if handle is None:
            handle = self._pool.handle_at(allocation.start_block)
        self._pool.free(handle)

    def close(self) -> None:
        """Leave; the last process to leave removes it."""
        self._pool.close()


class MultimodalInputs(Protocol):
    """What `set_buf` reads of a request's multimodal inputs."""

    @property
    def mrope_positions(self) -> torch.Tensor | None: ...
    @property
    def mrope_position_delta(self) -> torch.Tensor | Sequence[Sequence[int]] | None: ...


class EmbeddingRequest(Protocol):
    """What `set_buf` reads of a request (and `deepstack_embedding`, if the buffers have it)."""

    @property
    def embedding(self) -> torch.Tensor: ...
    @property
    def fill_ids(self) -> Sequence[int] | torch.Tensor: ...
    @property
    def multimodal_inputs(self) -> MultimodalInputs | None: ...


class MultimodalDataBuffers:
    """The fields of every block, in memory that all processes of the same `name` share.

    input_embeddings      [tokens, embedding_dim] bf16
    fill_ids              [tokens] int32
    mrope_positions       [tokens, 3] int32
    aux_datas             [blocks, 16] int32; an allocation uses the row of its start block
    deepstack_embeddings  [tokens, num_deepstack_embeddings * embedding_dim] bf16, or None
    """

    def __init__(
        self,
        size: int,
        max_prefill_tokens: int,
        embedding_dim: int = 8192,
        block_size: int | None = None,
        num_deepstack_embeddings: int = 0,
        *,
        name: str | None = None,
    ) -> None:
        """For `size` requests of `max_prefill_tokens` tokens, rounded up to whole blocks."""
        fields = multimodal_fields(embedding_dim, num_deepstack_embeddings)
        config = _config(size * max_prefill_tokens, block_size, fields)
        self._pool = _shared(name, "buffers", config)
        self.embedding_dim = embedding_dim
        self.num_deepstack_embeddings = num_deepstack_embeddings
        self.block_size = config.block_size
        self.num_blocks = config.total_blocks
        self.total_capacity_tokens = config.total_tokens

    @property
    def pool(self) -> BlockPool:
        """The pool whose memory this is; nothing is allocated from it."""
        return self._pool

    @property
    def input_embeddings(self) -> torch.Tensor:
        return self._pool.field(EMBEDDINGS)

    @property
    def fill_ids(self) -> torch.Tensor:
        return self._pool.field(FILL_IDS)

    @property
    def mrope_positions(self) -> torch.Tensor:
        return self._pool.field(MROPE)

    @property
    def aux_datas(self) -> torch.Tensor:
        return self._pool.field("aux")

    @property
    def deepstack_embeddings(self) -> torch.Tensor | None:
        return self._pool.field(DEEPSTACK) if self.num_deepstack_embeddings else None

    def get_buf_infos(self) -> tuple[list[int], list[int], list[int]]:
        """(pointers, lengths in bytes, bytes per block) of every buffer, for an RDMA engine.

        In the order of `get_buf`.
        """
        buffers = self._buffers()
        per_block = [
            AUX_BYTES if field is None else field.token_bytes * self.block_size
            for field in self._fields()
        ]
        return [b.data_ptr() for b in buffers], [b.nbytes for b in buffers], per_block

    def get_buf_chunk_info(
        self,
        allocation: MetadataAllocation,
        offset_tokens: int = 0,
        max_tokens: int | None = None,
    ) -> list[tuple[int, int]]:
        """(offset, length) in bytes of a chunk in every buffer, in the order of `get_buf`.

        The chunk begins `offset_tokens` into the allocation and has `max_tokens` tokens or what is
        left, whichever is less.
        """
        if not 0 <= offset_tokens <= allocation.num_tokens:
            raise ValueError(
                f"offset_tokens: expected 0 to {allocation.num_tokens}, got {offset_tokens}"
            )
        if max_tokens is not None and max_tokens < 0:
            raise ValueError(f"max_tokens: expected at least 0, got {max_tokens}")
        left = allocation.num_tokens - offset_tokens
        tokens = left if max_tokens is None else min(left, max_tokens)
        first = self._rows(allocation).start + offset_tokens
        aux = (allocation.start_block * AUX_BYTES, AUX_BYTES)
        return [
            aux if field is None else (first * field.token_bytes, tokens * field.token_bytes)
            for field in self._fields()
        ]

    def get_buf(self, allocation: MetadataAllocation) -> tuple[torch.Tensor, ...]:
        """(embeddings, fill_ids, mrope `[3, n]`, aux[, deepstack]) of an allocation, in place."""
        rows = self._rows(allocation)
        buffers: list[torch.Tensor] = [
            self.input_embeddings[rows],
            self.fill_ids[rows],
            self.mrope_positions[rows].t(),
            self.aux_datas[allocation.start_block],
        ]
        deepstack = self.deepstack_embeddings
        if deepstack is not None:
            buffers.append(deepstack[rows])
        return tuple(buffers)

    def set_buf(self, req: EmbeddingRequest, allocation: MetadataAllocation) -> None:
        """Copy a request's embedding, ids, positions and lengths into its blocks.

        `aux[0]` becomes the total length in tokens, `aux[1]` the mrope position delta.
        """
        import torch

        length = int(req.embedding.shape[0])
        if length > allocation.num_tokens:
            raise ValueError(
                f"embedding: expected at most the {allocation.num_tokens} tokens of {allocation}, "
                f"got {length}"
            )
        buffers = self.get_buf(allocation)
        embeddings, fill_ids, mrope, aux = buffers[:4]
        embeddings[:length].copy_(req.embedding)
        fill_ids[:length].copy_(torch.as_tensor(req.fill_ids, dtype=torch.int32)[:length])
        aux.zero_()
        aux[0] = length
        inputs = req.multimodal_inputs
        if inputs is not None and inputs.mrope_positions is not None:
            mrope[:, :length].copy_(inputs.mrope_positions[:, :length])
        if inputs is not None and inputs.mrope_position_delta is not None:
            aux[1] = int(inputs.mrope_position_delta[0][0])
        if len(buffers) > 4:
            deepstack: torch.Tensor | None = getattr(req, "deepstack_embedding", None)
            if deepstack is not None:
                buffers[4][:length].copy_(deepstack.reshape(length, -1))

    def close(self) -> None:
        """Leave; the last process to leave removes the memory, once no tensor uses it."""
        self._pool.close()

    def _buffers(self) -> list[torch.Tensor]:
        return [
            self.aux_datas if field is None else self._pool.field(field.name)
            for field in self._fields()
        ]

    def _fields(self) -> list[Field | None]:
        """In the order of `get_buf`; None stands for aux."""
        fields: list[Field | None] = list(self._pool.config.fields)
        fields.insert(3, None)
        return fields

    def _rows(self, allocation: MetadataAllocation) -> slice:
        start = allocation.start_block * self.block_size
        end = start + allocation.num_tokens
        if (
            allocation.start_block < 0
            or allocation.start_block + allocation.num_blocks > self.num_blocks
            or not 0 <= allocation.num_tokens <= allocation.num_blocks * self.block_size
        ):
            raise ValueError(
                f"allocation: expected blocks below {self.num_blocks} that hold its tokens, "
                f"got {allocation}"
            )
        return slice(start, end)


def _config(total_tokens: int, block_size: int | None, fields: tuple[Field, ...]) -> PoolConfig:
    block_size = default_block_size() if block_size is None else block_size
    total_blocks = -(-total_tokens // block_size)
    return PoolConfig(
        total_tokens=total_blocks * block_size,
        fields=fields,
        block_size=block_size,
        default_num_blocks=default_default_num_blocks(),
    )


def _shared(name: str | None, part: str, config: PoolConfig) -> BlockPool:
    """Attach to the pool of that name, or create it; a private one if `name` is None."""
    if name is None:
        return BlockPool.create(f"sglang-{os.getpid()}-{secrets.token_hex(6)}.{part}", config)
    full_name = f"{name}.{part}"
    makers: tuple[Callable[[], BlockPool], ...] = (
        lambda: BlockPool.attach(full_name),
        lambda: BlockPool.create(full_name, config),
    )
    for attempt in range(2 * _ATTEMPTS):
        try:
            pool = makers[attempt % 2]()
        except (PoolNotFoundError, PoolExistsError):
            # Another process has removed or created it since our last attempt: try again.
            continue
        if pool.config != config:
            pool.close()
            raise IncompatiblePoolError(
                f"pool {full_name}: another process made it with other sizes; give all processes "
                f"the same: expected {config}, got {pool.config}"
            )
        return pool
    raise PoolExistsError(f"pool {full_name}: created and removed by others again and again")
