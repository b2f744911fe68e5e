"""Views: the fields of an allocation as torch tensors over the shared memory, without a copy.

Contract
- A tensor of a view borrows the pool's mapping and keeps it alive, so that closing the pool under
  a living tensor is safe: the memory stays mapped until the last tensor is gone.
- What the memory *means* is not kept: after the lease or the allocation ended, another allocation
  may use the blocks. Copy (`tensor.clone()`) what must outlive it.
- Tensors are made when they are asked for; torch is imported by the first one.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from shmblocks._state.layout import AUX_BYTES, Layout
from shmblocks.config import DTYPES, Field, PoolConfig
from shmblocks.handle import BlockHandle

if TYPE_CHECKING:
    import torch


class FieldTensors:
    """One tensor per field over the whole pool, `[total_tokens, *shape]`, made once."""

    def __init__(self, mapping: mmap.mmap, config: PoolConfig, layout: Layout) -> None:
        self._mapping = mapping
        self._config = config
        self._layout = layout
        self._fields = {field.name: field for field in config.fields}
        # Names of the fields that users see as `[k, tokens]`.
        self.transposed = frozenset(field.name for field in config.fields if field.transposed)
        self._tensors: dict[str, torch.Tensor] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._fields)

    def field(self, name: str) -> Field:
        """The field's description; KeyError names the fields that there are."""
        try:
            return self._fields[name]
        except KeyError:
            raise KeyError(
                f"field: expected one of {', '.join(self._fields) or '(the pool has none)'}, "
                f"got {name!r}"
            ) from None

    def offset(self, name: str) -> int:
        """Where the field begins in the segment, or in the CUDA allocation, in bytes."""
        return self._layout.fields[self.field(name).name]

    def tensor(self, name: str) -> torch.Tensor:
        """The field of every token of the pool, as stored."""
        tensor = self._tensors.get(name)
        if tensor is None:
            field = self.field(name)
            tensor = self._make(
                field.dtype,
                (self._config.total_tokens, *field.shape),
                self.offset(name),
                self.field_bytes,
            )
            self._tensors[name] = tensor
        return tensor

    def aux(self) -> torch.Tensor:
        """int32 `[total_blocks, 16]`."""
        tensor = self._tensors.get("aux")
        if tensor is None:
            shape = (self._config.total_blocks, AUX_BYTES // 4)
            tensor = self._make("int32", shape, self._layout.aux, self._segment_bytes)
            self._tensors["aux"] = tensor
        return tensor

    def _make(
        self,
        dtype: str,
        shape: tuple[int, ...],
        offset: int,
        get: Callable[[int, int], torch.Tensor],
    ) -> torch.Tensor:
        import torch

        size, torch_name = DTYPES[dtype]
        count = size
        for length in shape:
            count *= length
        # Bytes first: frombuffer does not know every dtype in every torch version, views do.
        return get(offset, count).view(getattr(torch, torch_name)).view(shape)

    def field_bytes(self, offset: int, size: int) -> torch.Tensor:
        """A part of the memory that fields lie in, as uint8."""
        return self._segment_bytes(offset, size)

    def _segment_bytes(self, offset: int, size: int) -> torch.Tensor:
        import torch

        return torch.frombuffer(self._mapping, dtype=torch.uint8, count=size, offset=offset)


class BlockView(Mapping[str, "torch.Tensor"]):
    """The fields of one allocation. Borrows the memory, keeps the mapping alive, owns no block.

    `view["input_embeddings"]` is `[num_tokens, *shape]` of the field's dtype (a transposed field:
    `[k, num_tokens]`), in place; `view.aux` the allocation's int32[16].
    """

    __slots__ = ("_owner", "_tensors", "handle", "start_token")

    def __init__(
        self, tensors: FieldTensors, handle: BlockHandle, start_token: int, owner: object
    ) -> None:
        """`owner` is kept alive: a pool that is dropped under a view must not leave."""
        self._owner = owner
        self._tensors = tensors
        self.handle = handle
        self.start_token = start_token

    @property
    def num_tokens(self) -> int:
        """Tokens of every field."""
        return self.handle.num_tokens

    @property
    def aux(self) -> torch.Tensor:
        """int32[16]: `aux[0]` total length in tokens, `aux[1]` mrope position delta."""
        return self._tensors.aux()[self.handle.start_block]

    def __getitem__(self, name: str) -> torch.Tensor:
        start, tensors = self.start_token, self._tensors
        rows = tensors.tensor(name)[start : start + self.handle.num_tokens]
        return rows.t() if name in tensors.transposed else rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors.names)

    def __len__(self) -> int:
        return len(self._tensors.names)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"BlockView({self.handle}, fields={', '.join(self._tensors.names)})"
