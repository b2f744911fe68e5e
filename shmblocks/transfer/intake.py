"""Where the language side puts what arrives: the two ways, one contract.

    landing   blocks of its own, reserved before it knows the length. When they are full it makes
              more room, in this order: grow in place; a second allocation for all the rest; or copy
              what is there into private memory and offer *the same* blocks again
    push      blocks that the embedding side published. All at once: read in place under a lease.
              In several chunks: each is copied into private memory and let go at once

What spilled (`pools.py`) is read in place like all else, unless our pool lies on a GPU: then it is
copied into private memory there.

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

    from shmblocks.transfer.messages import Chunk
    from shmblocks.transfer.pools import Pools
    from shmblocks.transfer.returns import Returns
    from shmblocks.view import BlockView


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

    def __init__(self, pools: Pools, returns: Returns, req_id: str) -> None:
        self.aux: torch.Tensor | None = None
        self.blocks_wanted = 0
        self._pools = pools
        self._returns = returns
        self._req_id = req_id
        self._fields = pools.own.config.fields
        self._pieces: list[_Piece] = []
        self._private: PrivateTokens | None = None

    def first(self) -> Grant | None:
        config = self._pools.own.config
        blocks = min(config.default_num_blocks, config.total_blocks)
        self.blocks_wanted = blocks
        handle = self._pools.alloc(blocks * config.block_size, self._req_id)
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
        view = self._view(piece)
        if self.aux is None:
            self.aux = noted_aux(view.aux, chunk)
        if self._private is not None:
            self._private.append(view, piece.filled, chunk.num_tokens)
            finish_copies(view)
        else:
            piece.filled += chunk.num_tokens

    def _view(self, piece: _Piece) -> BlockView:
        return self._pools.of(piece.handle).view(piece.handle)

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
        wanted, pool = piece.filled + remaining, self._pools.of(piece.handle)
        if wanted > pool.config.total_tokens:
            return
        grown = pool.grow(piece.handle, wanted)
        if grown is not None:
            piece.handle = grown

    def _second_allocation(self, remaining: int) -> Grant | None:
        handle = self._pools.alloc(remaining, self._req_id)
        return None if handle is None else self._granted(handle)

    def _empty_into_private(self, remaining: int) -> None:
        """Copy everything out and keep only the last blocks, empty."""
        self._private = self._copy_out(remaining)
        while len(self._pieces) > 1:
            self._returns.free(self._pieces.pop(0).handle)

    def _copy_out(self, more_tokens: int) -> PrivateTokens:
        """All that is here in private memory, with room for more; every piece is empty then."""
        total = more_tokens + sum(piece.filled for piece in self._pieces)
        private = PrivateTokens(self._fields, self._pools.device, total)
        for piece in self._pieces:
            view = self._view(piece)
            private.append(view, 0, piece.filled)
            finish_copies(view)
            piece.filled = 0
        return private

    def finish(self) -> list[Part]:
        if self._private is None and any(map(self._must_move, self._pieces)):
            self._private = self._copy_out(0)
        if self._private is not None:
            self.give_back()
            return [Part(self._private.tensors, nothing_to_give_back, in_pool=False)]
        parts = [self._part(piece) for piece in self._pieces]
        self._pieces = []
        return parts

    def _must_move(self, piece: _Piece) -> bool:
        return self._pools.must_move(piece.handle)

    def _part(self, piece: _Piece) -> Part:
        tensors = first_tokens(self._fields, self._view(piece), piece.filled)
        return Part(tensors, functools.partial(self._returns.free, piece.handle), in_pool=True)

    def give_back(self) -> None:
        while self._pieces:
            self._returns.free(self._pieces.pop().handle)

    def __str__(self) -> str:
        return " and ".join(blocks_text(piece.handle) for piece in self._pieces) or "no blocks"


class PushIntake:
    """Blocks that the other side published; see the top of this file."""

    def __init__(self, pools: Pools) -> None:
        self.aux: torch.Tensor | None = None
        self.blocks_wanted = 0
        self._pools = pools
        self._fields = pools.own.config.fields
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
        in_place = chunk.num_tokens == chunk.total_tokens and not self._pools.must_move(handle)
        lease = self._pools.of(handle).open(handle)
        try:
            if self.aux is None:
                self.aux = noted_aux(lease.view.aux, chunk)
            if not in_place:
                self._copy(lease.view, chunk)
            else:
                tensors = first_tokens(self._fields, lease.view, chunk.num_tokens)
                self._part = Part(tensors, lease.release, in_pool=True)
        finally:
            if self._part is None:
                lease.release()

    def _copy(self, view: Tensors, chunk: Chunk) -> None:
        if self._private is None:
            device = self._pools.device
            self._private = PrivateTokens(self._fields, device, chunk.total_tokens)
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


def make_intake(pools: Pools, returns: Returns, mode: str, req_id: str) -> Intake:
    """The intake for a mode."""
    return LandingIntake(pools, returns, req_id) if mode == "landing" else PushIntake(pools)
