"""Where the language side puts what arrives: the two ways, one contract.

    landing   blocks of its own, reserved before it knows the length. When they are full it makes
              more room, in this order: grow in place; a second allocation for all the rest; or copy
              what is there into private memory and offer *the same* blocks again
    push      blocks that the embedding side published. All at once: read in place under a lease.
              In several chunks: each is copied into private memory and let go at once

No deadlock, in steps: (1) a room waits for blocks only before its first round, and then holds none;
(2) from its first round on it never needs more than it has, because offering the same blocks again
needs nobody; (3) so whoever holds blocks waits only for a message, and whoever waits for blocks
holds none. It also follows that a transfer can be longer than the whole pool. What is left are
results: those that a user has taken are his to release, the others are moved out of the pool when a
room starves (`language.py`).

What it does not do: know statuses or messages other than the chunk, or check what a room can check.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple, Protocol

from shmblocks.errors import TransferError
from shmblocks.handle import BlockHandle
from shmblocks.transfer.result import Part, PrivateTokens, nothing_to_give_back
from shmblocks.transfer.room import blocks_text
from shmblocks.transfer.tensors import AUX_LENGTH, Tensors, finish_copies, first_tokens

if TYPE_CHECKING:
    import torch

    from shmblocks.pool import BlockPool
    from shmblocks.transfer.messages import Chunk
    from shmblocks.transfer.returns import Returns


class Grant(NamedTuple):
    """Where the next chunk may go; no handle with push."""

    handle: BlockHandle | None
    offset: int


class Intake(Protocol):
    """One way of receiving."""

    aux: torch.Tensor | None
    blocks_wanted: int

    def first(self) -> Grant | None:
        """What to ask with; None when there are no blocks for it now."""

    def accept(self, chunk: Chunk) -> None:
        """Take a chunk that fits the room; an error when it is not what it says."""

    def more(self, remaining: int) -> Grant:
        """Where the next chunk may go."""

    def finish(self) -> list[Part]:
        """All that arrived. The intake holds nothing after it."""

    def give_back(self) -> None:
        """Give back everything that is held."""


def noted_aux(aux: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    """A copy of the aux of the first chunk, which must tell the length that the chunk tells."""
    copy = aux.clone()
    if int(copy[AUX_LENGTH]) != chunk.total_tokens:
        raise TransferError(
            f"aux[0]: expected the total length {chunk.total_tokens}, got {int(copy[AUX_LENGTH])}: "
            "the blocks do not hold what the message says"
        )
    return copy


class _Piece:
    """A landing allocation and how much of it is filled."""

    def __init__(self, handle: BlockHandle) -> None:
        self.handle = handle
        self.filled = 0

    @property
    def room(self) -> int:
        return self.handle.num_tokens - self.filled


class LandingIntake:
    """Blocks of our own; see the top of this file."""

    def __init__(self, pool: BlockPool, returns: Returns, req_id: str) -> None:
        self.aux: torch.Tensor | None = None
        self.blocks_wanted = 0
        self._pool = pool
        self._returns = returns
        self._req_id = req_id
        self._fields = pool.config.fields
        self._pieces: list[_Piece] = []
        self._private: PrivateTokens | None = None

    def first(self) -> Grant | None:
        config = self._pool.config
        blocks = min(config.default_num_blocks, config.total_blocks)
        self.blocks_wanted = blocks
        handle = self._pool.alloc_blocks(blocks, blocks * config.block_size, req_id=self._req_id)
        return None if handle is None else self._granted(handle)

    def _granted(self, handle: BlockHandle) -> Grant:
        self._pieces.append(_Piece(handle))
        self.blocks_wanted = 0
        return Grant(handle, 0)

    def accept(self, chunk: Chunk) -> None:
        piece = self._pieces[-1]
        granted = Grant(piece.handle, piece.filled)
        if (chunk.handle, chunk.offset) != (piece.handle.encode(), granted.offset):
            raise TransferError(f"expected a chunk at {granted}, got {chunk}")
        if chunk.num_tokens > piece.room:
            raise TransferError(f"expected at most {piece.room} tokens, got {chunk}")
        view = self._pool.view(piece.handle)
        if self.aux is None:
            self.aux = noted_aux(view.aux, chunk)
        if self._private is not None:
            self._private.append(view, piece.filled, chunk.num_tokens)
            finish_copies(view)
        else:
            piece.filled += chunk.num_tokens

    def more(self, remaining: int) -> Grant:
        piece = self._pieces[-1]
        if piece.room < remaining:
            self._grow(piece, remaining)
        if piece.room == 0:
            grant = self._second_allocation(remaining)
            if grant is not None:
                return grant
            self._empty_into_private(remaining)
            piece = self._pieces[-1]
        return Grant(piece.handle, piece.filled)

    def _grow(self, piece: _Piece, remaining: int) -> None:
        wanted = piece.filled + remaining
        if wanted > self._pool.config.total_tokens:
            return
        grown = self._pool.grow(piece.handle, wanted)
        if grown is not None:
            piece.handle = grown

    def _second_allocation(self, remaining: int) -> Grant | None:
        if remaining > self._pool.config.total_tokens:
            return None
        handle = self._pool.alloc(remaining, req_id=self._req_id)
        return None if handle is None else self._granted(handle)

    def _empty_into_private(self, remaining: int) -> None:
        """Copy everything out and keep only the last blocks, empty."""
        total = remaining + sum(piece.filled for piece in self._pieces)
        views = [self._pool.view(piece.handle) for piece in self._pieces]
        self._private = PrivateTokens(self._fields, views[0], total)
        for piece, view in zip(self._pieces, views, strict=True):
            self._private.append(view, 0, piece.filled)
            piece.filled = 0
        finish_copies(views[0])
        while len(self._pieces) > 1:
            self._returns.free(self._pieces.pop(0).handle)

    def finish(self) -> list[Part]:
        if self._private is not None:
            self.give_back()
            return [Part(self._private.tensors, nothing_to_give_back, in_pool=False)]
        parts = [self._part(piece) for piece in self._pieces]
        self._pieces = []
        return parts

    def _part(self, piece: _Piece) -> Part:
        tensors = first_tokens(self._fields, self._pool.view(piece.handle), piece.filled)
        return Part(tensors, functools.partial(self._returns.free, piece.handle), in_pool=True)

    def give_back(self) -> None:
        while self._pieces:
            self._returns.free(self._pieces.pop().handle)

    def __str__(self) -> str:
        return " and ".join(blocks_text(piece.handle) for piece in self._pieces) or "no blocks"


class PushIntake:
    """Blocks that the other side published; see the top of this file."""

    def __init__(self, pool: BlockPool) -> None:
        self.aux: torch.Tensor | None = None
        self.blocks_wanted = 0
        self._pool = pool
        self._fields = pool.config.fields
        self._part: Part | None = None
        self._private: PrivateTokens | None = None

    def first(self) -> Grant | None:
        return self.more(0)

    def more(self, remaining: int) -> Grant:
        return Grant(None, 0)

    def accept(self, chunk: Chunk) -> None:
        handle = BlockHandle.decode(chunk.handle)
        if chunk.offset or chunk.num_tokens > handle.num_tokens:
            raise TransferError(f"expected a chunk inside {handle}, got {chunk}")
        lease = self._pool.open(handle)
        try:
            self._read(lease.view, lease.view.aux, chunk)
            if chunk.num_tokens == chunk.total_tokens:
                tensors = first_tokens(self._fields, lease.view, chunk.num_tokens)
                self._part = Part(tensors, lease.release, in_pool=True)
        finally:
            if self._part is None:
                lease.release()

    def _read(self, view: Tensors, aux: torch.Tensor, chunk: Chunk) -> None:
        if self.aux is None:
            self.aux = noted_aux(aux, chunk)
        if chunk.num_tokens == chunk.total_tokens:
            return
        if self._private is None:
            self._private = PrivateTokens(self._fields, view, chunk.total_tokens)
        self._private.append(view, 0, chunk.num_tokens)

    def finish(self) -> list[Part]:
        part, self._part = self._part, None
        if part is None and self._private is not None:
            part = Part(self._private.tensors, nothing_to_give_back, in_pool=False)
        return [] if part is None else [part]

    def give_back(self) -> None:
        for part in self.finish():
            part.give_back()

    def __str__(self) -> str:
        return "published blocks"


def make_intake(pool: BlockPool, returns: Returns, mode: str, req_id: str) -> Intake:
    """The intake for a mode."""
    return LandingIntake(pool, returns, req_id) if mode == "landing" else PushIntake(pool)
