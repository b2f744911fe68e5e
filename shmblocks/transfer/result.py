"""`TransferResult`: what arrived, and the blocks that it lies in.

    one allocation       every field is that memory, no copy
    two allocations      a resumed landing: joined into private memory when a field is asked for;
                         `parts(name)` gives the two without a copy
    private memory       it went through a pool that had no room for all of it at once

It holds the blocks until `release()` (or the end of its `with` block). Tensors of it that lie in
the pool may be overwritten after that: copy what must outlive it. Nothing releases it by itself,
because nothing could tell whether such a tensor is still in use.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from shmblocks.config import Field
from shmblocks.errors import InvalidStateError
from shmblocks.transfer.tensors import (
    AUX_MROPE_DELTA,
    Tensors,
    copy_tokens,
    empty,
    nbytes,
    token_dim,
)

if TYPE_CHECKING:
    import torch


class Part(NamedTuple):
    """Tokens that lie together: their tensors, and what gives their blocks back."""

    tensors: Tensors
    give_back: Callable[[], None]
    in_pool: bool

    def num_tokens(self, fields: Sequence[Field]) -> int:
        """Tokens of every field."""
        first = fields[0]
        return int(self.tensors[first.name].shape[token_dim(first)])


def nothing_to_give_back() -> None:
    """For private memory."""


class PrivateTokens:
    """Memory of this process for all tokens of a transfer, filled from the front."""

    def __init__(self, fields: Sequence[Field], device: torch.device, total_tokens: int) -> None:
        self._fields = fields
        self.tensors = empty(fields, device, total_tokens)
        self.filled = 0

    def append(self, source: Tensors, source_token: int, num_tokens: int) -> None:
        """Copy the next tokens in."""
        copy_tokens(self._fields, self.tensors, self.filled, source, source_token, num_tokens)
        self.filled += num_tokens


class TransferResult(Mapping[str, "torch.Tensor"]):
    """The fields of one transfer: `result["input_embeddings"]` is `[num_tokens, *shape]` (a
    transposed field: `[k, num_tokens]`), `result.aux` a copy of the int32[16]."""

    def __init__(
        self,
        room: int,
        fields: Sequence[Field],
        parts: Sequence[Part],
        aux: torch.Tensor,
        rounds: int,
    ) -> None:
        self.room = room
        self.aux = aux
        self.rounds = rounds
        self.num_tokens = sum(part.num_tokens(fields) for part in parts)
        self.num_bytes = sum(nbytes(part.tensors) for part in parts)
        self.is_zero_copy = len(parts) == 1 and parts[0].in_pool
        self._fields = tuple(fields)
        self._parts = tuple(parts)
        self._joined: Tensors | None = parts[0].tensors if len(parts) == 1 else None
        self._lock = threading.Lock()
        self._is_released = False

    @property
    def mrope_position_delta(self) -> int:
        """aux[1]."""
        return int(self.aux[AUX_MROPE_DELTA])

    @property
    def is_released(self) -> bool:
        """Whether the blocks were given back."""
        return self._is_released

    def __getitem__(self, name: str) -> torch.Tensor:
        with self._lock:
            self._check_held()
            if self._joined is None:
                self._joined = self._join()
            return self._joined[self._known(name)]

    def __iter__(self) -> Iterator[str]:
        return (field.name for field in self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def parts(self, name: str) -> list[torch.Tensor]:
        """The field as it lies in memory, in order, never copied."""
        with self._lock:
            self._check_held()
            return [part.tensors[self._known(name)] for part in self._parts]

    def release(self) -> None:
        """Give the blocks back; a second call does nothing."""
        with self._lock:
            parts, self._parts = self._parts, ()
            self._joined = None
            self._is_released = True
        for part in parts:
            part.give_back()

    def move_out(self) -> None:
        """Copy everything into private memory and give the blocks back; the result stays usable.

        Tensors that were taken from it before still lie in the pool, as after `release`.
        """
        with self._lock:
            if self._is_released or not any(part.in_pool for part in self._parts):
                return
            tensors = self._join()
            parts, self._parts = self._parts, (Part(tensors, nothing_to_give_back, in_pool=False),)
            self._joined = tensors
            self.is_zero_copy = False
        for part in parts:
            part.give_back()

    def __enter__(self) -> TransferResult:
        self._check_held()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        held = "released" if self._is_released else f"{len(self._parts)} part(s)"
        return (
            f"TransferResult(room={self.room}, num_tokens={self.num_tokens}, "
            f"rounds={self.rounds}, is_zero_copy={self.is_zero_copy}, {held})"
        )

    def _check_held(self) -> None:
        if self._is_released:
            raise InvalidStateError(
                f"the result of room {self.room} was released; its blocks may hold another "
                "request's data by now. Copy what must outlive release()"
            )

    def _known(self, name: str) -> str:
        if all(field.name != name for field in self._fields):
            raise KeyError(f"field: expected one of {', '.join(self)}, got {name!r}")
        return name

    def _join(self) -> Tensors:
        device = self._parts[0].tensors[self._fields[0].name].device
        joined = PrivateTokens(self._fields, device, self.num_tokens)
        for part in self._parts:
            joined.append(part.tensors, 0, part.num_tokens(self._fields))
        return joined.tensors
