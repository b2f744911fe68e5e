"""`TransferResult`: what arrived, and the blocks that it lies in.

    one allocation       every field is that memory, no copy
    two allocations      a resumed landing: a field is joined into private memory when it is asked
                         for; `parts(name)` gives the two without a copy
    private memory       the pool could not hold all of the transfer at once

It holds its blocks until `release()` or the end of its `with` block. After that its tensors in the
pool may be overwritten: copy what must outlive it. It never releases itself, because nothing can
tell whether such a tensor is still in use.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from shmblocks.errors import InvalidStateError
from shmblocks.transfer.tensors import (
    AUX_MROPE_DELTA,
    Fields,
    PrivateTokens,
    Tensors,
    token_dim,
)

if TYPE_CHECKING:
    import torch

    from shmblocks.handle import BlockHandle
    from shmblocks.lease import Lease


class Part(NamedTuple):
    """Tokens that lie together. `give_back` frees their blocks; None for private memory. `lease`:
    the one that they are read under, of published blocks."""

    tensors: Tensors
    give_back: Callable[[], None] | None
    lease: Lease | None = None

    def num_tokens(self, fields: Fields) -> int:
        """Tokens of every field."""
        return int(self.tensors[fields[0].name].shape[token_dim(fields[0])])


class TransferResult(Mapping[str, "torch.Tensor"]):
    """The fields of one transfer, and `aux`, a copy of the int32[16].

    `result["input_embeddings"]` is `[num_tokens, *shape]`, a transposed field `[k, num_tokens]`.
    Any thread may use it.
    """

    def __init__(
        self, room: int, fields: Fields, parts: Sequence[Part], aux: torch.Tensor, rounds: int
    ) -> None:
        self.room = room
        self.aux = aux
        self.rounds = rounds
        self.num_tokens = sum(part.num_tokens(fields) for part in parts)
        self.num_bytes = self.num_tokens * sum(field.token_bytes for field in fields)
        self._fields = tuple(fields)
        self._parts = tuple(parts)
        self._joined: Tensors | None = parts[0].tensors if len(parts) == 1 else None
        self._lock = threading.Lock()
        self.is_zero_copy = len(parts) == 1 and self._is_in_pool
        self._is_released = False

    @property
    def mrope_position_delta(self) -> int:
        """aux[1]."""
        return int(self.aux[AUX_MROPE_DELTA])

    @property
    def is_released(self) -> bool:
        """Whether the blocks were given back."""
        return self._is_released

    @property
    def _is_in_pool(self) -> bool:
        return any(part.give_back is not None for part in self._parts)

    def __getitem__(self, name: str) -> torch.Tensor:
        with self._lock:
            self._check_usable(name)
            if self._joined is None:
                self._joined = self._join()
            return self._joined[name]

    def __iter__(self) -> Iterator[str]:
        return (field.name for field in self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def parts(self, name: str) -> list[torch.Tensor]:
        """The field as it lies in memory, in order, never copied."""
        with self._lock:
            self._check_usable(name)
            return [part.tensors[name] for part in self._parts]

    def release(self) -> None:
        """Give the blocks back; a second call does nothing."""
        with self._lock:
            self._is_released = True
            self._joined = None
            parts, self._parts = self._parts, ()
        _give_back(parts)

    def hand_on(self) -> BlockHandle:
        """Give the published blocks to another reader, as if nobody had read them; the result is
        released.

        The handle has one reader to come, of this pool or from another node (`relay.py`). Raises
        `InvalidStateError` when this result is not one published allocation, read in place.
        """
        with self._lock:
            self._check_usable()
            lease = self._parts[0].lease
            if len(self._parts) != 1 or lease is None:
                raise InvalidStateError(
                    f"{self!r}: only what was pushed, and is read in place, can be handed on: "
                    'receive with mode="push"'
                )
            lease.give_back()
            self._is_released = True
            self._joined = None
            self._parts = ()
            return lease.handle

    def move_out(self) -> None:
        """Copy everything into private memory and give the blocks back; the result stays usable.

        Tensors that were taken from it before still lie in the pool, as after `release`.
        """
        with self._lock:
            if not self._is_in_pool:
                return
            self._joined = self._join()
            parts, self._parts = self._parts, (Part(self._joined, None),)
            self.is_zero_copy = False
        _give_back(parts)

    def __enter__(self) -> TransferResult:
        self._check_usable()
        return self

    def __exit__(self, *_: object) -> None:
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

    def _check_usable(self, name: str | None = None) -> None:
        if self._is_released:
            raise InvalidStateError(
                f"the result of room {self.room} was released, and its blocks may hold another "
                "request's data now. Copy what must outlive release()"
            )
        if name is not None and name not in list(self):
            raise KeyError(f"field: expected one of {', '.join(self)}, got {name!r}")

    def _join(self) -> Tensors:
        device = self._parts[0].tensors[self._fields[0].name].device
        joined = PrivateTokens(self._fields, device, self.num_tokens)
        for part in self._parts:
            joined.append(part.tensors, 0, part.num_tokens(self._fields))
        return joined.tensors


def _give_back(parts: Sequence[Part]) -> None:
    for part in parts:
        if part.give_back is not None:
            part.give_back()
