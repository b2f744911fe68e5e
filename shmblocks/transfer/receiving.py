"""The language side's end of a room: the two ways to receive chunks, and the room.

    Bootstrapping --blocks--> WaitingForInput --chunk--> Transferring --last chunk--> Success
                  Request                        ^  |                   Done
                                                 +--+ Resume, chunk

Chunks are received
    landing   in blocks of our own, reserved before the length is known. When they are full, in this
              order: grow them in place; make a second allocation for all the rest; or copy what
              they hold into private memory and offer *the same* blocks again
    push      in blocks that the embedding side published. One chunk: read in place under a lease.
              Several: each is copied into private memory and released at once

What spilled (`pools.py`) is read in place as well, unless our pool lies on a GPU: then it is copied
into private memory of that GPU.

There is no deadlock: (1) a room waits for blocks only before its first round, and then holds none;
(2) from its first round on it never needs more blocks than it has, because it can offer the same
ones again; (3) so whoever holds blocks waits only for a message. It also follows that a transfer
can be longer than the whole pool. What may still hold blocks are results: a user releases those
that were taken, and `language.py` moves the others out of the pool when a room starves.

What it does not do: check a handle or a lease (the pool does).
"""

from __future__ import annotations

import abc
import functools
import secrets
from typing import TYPE_CHECKING

from shmblocks.errors import StaleHandleError, TransferError
from shmblocks.handle import BlockHandle
from shmblocks.transfer.messages import Chunk, Done, Grant, Mode, Request, Resume, Starved
from shmblocks.transfer.result import Part, TransferResult
from shmblocks.transfer.room import Room, Status, blocks_text
from shmblocks.transfer.tensors import (
    AUX_LENGTH,
    PrivateTokens,
    Tensors,
    finish_copies,
    first_tokens,
)

if TYPE_CHECKING:
    import torch

    from shmblocks.transfer.connection import Connection
    from shmblocks.transfer.pools import Pools
    from shmblocks.view import BlockView


# ---- where chunks go -------------------------------------------------------------------------


class ReceiveBuffer(abc.ABC):
    """One way of receiving. `aux` is known from the first chunk on."""

    def __init__(self, pools: Pools) -> None:
        self.aux: torch.Tensor | None = None
        self.blocks_wanted = 0
        self._pools = pools
        self._fields = pools.own.config.fields
        self._private: PrivateTokens | None = None

    @abc.abstractmethod
    def first_grant(self) -> Grant | None:
        """Where the first chunk may go; None if there are no free blocks for it now."""

    @abc.abstractmethod
    def next_grant(self, remaining: int) -> Grant:
        """Where the next chunk may go; `remaining` tokens are to come."""

    @abc.abstractmethod
    def accept(self, chunk: Chunk) -> None:
        """Take a chunk that fits the room; raises if the blocks don't hold what it says."""

    @abc.abstractmethod
    def finish(self) -> list[Part]:
        """All that arrived. The buffer holds nothing after it."""

    @abc.abstractmethod
    def give_back(self) -> None:
        """Give back everything that is held."""

    def _note_aux(self, aux: torch.Tensor, chunk: Chunk) -> None:
        """Keep the aux of the first chunk, which must agree with the chunk on the length."""
        if self.aux is not None:
            return
        copy = aux.clone()
        length = int(copy[AUX_LENGTH])
        if length != chunk.total_tokens:
            raise TransferError(
                f"aux[0]: expected the total length {chunk.total_tokens}, got {length}: the blocks "
                "do not hold what the message says"
            )
        self.aux = copy


class _Landing:
    """A landing allocation, and how many of its tokens are filled."""

    def __init__(self, handle: BlockHandle) -> None:
        self.handle = handle
        self.filled = 0

    @property
    def free_tokens(self) -> int:
        return self.handle.num_tokens - self.filled

    @property
    def grant(self) -> Grant:
        return Grant(self.handle, self.filled)


class LandingBuffer(ReceiveBuffer):
    """Blocks of our own."""

    def __init__(self, pools: Pools, req_id: str) -> None:
        super().__init__(pools)
        self._req_id = req_id
        self._landings: list[_Landing] = []

    def first_grant(self) -> Grant | None:
        config = self._pools.own.config
        self.blocks_wanted = min(config.default_num_blocks, config.total_blocks)
        return self._alloc(self.blocks_wanted * config.block_size)

    def _alloc(self, num_tokens: int) -> Grant | None:
        handle = self._pools.alloc(num_tokens, self._req_id)
        if handle is None:
            return None
        self.blocks_wanted = 0
        self._landings.append(_Landing(handle))
        return Grant(handle, 0)

    def next_grant(self, remaining: int) -> Grant:
        landing = self._landings[-1]
        if landing.free_tokens < remaining:
            self._grow(landing, remaining)
        if landing.free_tokens > 0:
            return landing.grant
        return self._alloc(remaining) or self._offer_again(remaining)

    def _grow(self, landing: _Landing, remaining: int) -> None:
        wanted, pool = landing.filled + remaining, self._pools.of(landing.handle)
        if wanted <= pool.config.total_tokens:
            landing.handle = pool.grow(landing.handle, wanted) or landing.handle

    def _offer_again(self, remaining: int) -> Grant:
        """Copy everything out and offer the last blocks, empty."""
        self._private = self._copy_out(remaining)
        while len(self._landings) > 1:
            self._pools.free(self._landings.pop(0).handle)
        return self._landings[0].grant

    def _copy_out(self, remaining: int) -> PrivateTokens:
        """Private memory with all that is here, and enough for `remaining` tokens more."""
        total = remaining + sum(landing.filled for landing in self._landings)
        private = PrivateTokens(self._fields, self._pools.device, total)
        for landing in self._landings:
            view = self._view(landing)
            private.append(view, 0, landing.filled)
            finish_copies(view)
            landing.filled = 0
        return private

    def _view(self, landing: _Landing) -> BlockView:
        return self._pools.of(landing.handle).view(landing.handle)

    def accept(self, chunk: Chunk) -> None:
        landing = self._landings[-1]
        if (chunk.handle, chunk.offset) != (landing.handle.encode(), landing.filled):
            raise TransferError(f"expected a chunk at {landing.grant}, got {chunk}")
        if chunk.num_tokens > landing.free_tokens:
            raise TransferError(f"expected at most {landing.free_tokens} tokens, got {chunk}")
        view = self._view(landing)
        self._note_aux(view.aux, chunk)
        if self._private is not None:
            self._private.append(view, landing.filled, chunk.num_tokens)
            finish_copies(view)
        else:
            landing.filled += chunk.num_tokens

    def finish(self) -> list[Part]:
        if self._private is None and any(
            self._pools.must_move(landing.handle) for landing in self._landings
        ):
            self._private = self._copy_out(0)
        if self._private is not None:
            self.give_back()
            return [Part(self._private.tensors, None)]
        parts = [self._part(landing) for landing in self._landings]
        self._landings = []
        return parts

    def _part(self, landing: _Landing) -> Part:
        tensors = first_tokens(self._fields, self._view(landing), landing.filled)
        return Part(tensors, functools.partial(self._pools.free, landing.handle))

    def give_back(self) -> None:
        while self._landings:
            self._pools.free(self._landings.pop().handle)

    def __str__(self) -> str:
        return " and ".join(blocks_text(each.handle) for each in self._landings) or "no blocks"


class PushBuffer(ReceiveBuffer):
    """Blocks that the other side published."""

    def __init__(self, pools: Pools) -> None:
        super().__init__(pools)
        self._part: Part | None = None

    def first_grant(self) -> Grant | None:
        return Grant(None, 0)

    def next_grant(self, remaining: int) -> Grant:
        return Grant(None, 0)

    def accept(self, chunk: Chunk) -> None:
        handle = BlockHandle.decode(chunk.handle)
        if chunk.offset or chunk.num_tokens > handle.num_tokens:
            raise TransferError(f"expected a chunk inside {handle}, got {chunk}")
        is_whole = chunk.num_tokens == chunk.total_tokens
        lease = self._pools.of(handle).open(handle)
        try:
            self._note_aux(lease.view.aux, chunk)
            if is_whole and not self._pools.must_move(handle):
                tensors = first_tokens(self._fields, lease.view, chunk.num_tokens)
                self._part = Part(tensors, lease.release, lease)
            else:
                self._copy(lease.view, chunk)
        finally:
            if self._part is None:
                lease.release()

    def _copy(self, view: Tensors, chunk: Chunk) -> None:
        if self._private is None:
            self._private = PrivateTokens(self._fields, self._pools.device, chunk.total_tokens)
        self._private.append(view, 0, chunk.num_tokens)

    def finish(self) -> list[Part]:
        part, self._part = self._part, None
        if part is None and self._private is not None:
            part = Part(self._private.tensors, None)
        return [] if part is None else [part]

    def give_back(self) -> None:
        part, self._part = self._part, None
        if part is not None and part.give_back is not None:
            part.give_back()

    def __str__(self) -> str:
        return "published blocks"


# ---- the room --------------------------------------------------------------------------------


class ReceivingRoom(Room):
    """One transfer to come.

    It draws the nonce of its attempt and asks for one round at a time. It takes a chunk if that
    answers the round that it has asked for last.
    """

    def __init__(
        self, connection: Connection, pools: Pools, number: int, mode: Mode, req_id: str
    ) -> None:
        super().__init__(connection, number, nonce=secrets.randbelow((1 << 64) - 1) + 1)
        self.result: TransferResult | None = None
        self._mode = mode
        self._pools = pools
        self._buffer: ReceiveBuffer = (
            LandingBuffer(pools, req_id) if mode == "landing" else PushBuffer(pools)
        )
        self._total: int | None = None  # tokens; known from the first chunk on
        self._peer_starves = False

    @property
    def is_starved(self) -> bool:
        """Whether it waits for free blocks, on this side or the other."""
        return not self.is_over and (self.blocks_wanted > 0 or self._peer_starves)

    def advance(self) -> None:
        if self.stale is not None and not self.is_over:
            self.wait_for_reason(self.stale[1])
        if self.status is not Status.Bootstrapping:
            return
        grant = self._buffer.first_grant()
        self.blocks_wanted = self._buffer.blocks_wanted
        if grant is not None:
            self.move(Status.WaitingForInput)
            self.connection.send(Request(*self.ids, self._mode, grant.handle_bytes))

    def on_chunk(self, chunk: Chunk) -> None:
        """The embedding side wrote the next tokens."""
        if chunk.round < self.rounds:
            self.connection.counts.duplicate += 1
            return
        self._check(chunk)
        self._peer_starves = False
        try:
            self._buffer.accept(chunk)
        except StaleHandleError as error:
            self.wait_for_reason(error)
            return
        self._count(chunk)
        if self.num_tokens == chunk.total_tokens:
            self._finish()
        else:
            self._resume(chunk.total_tokens - self.num_tokens)

    def _check(self, chunk: Chunk) -> None:
        """The chunk must follow from the ones before it."""
        total = chunk.total_tokens if self._total is None else self._total
        expected = (self.rounds, self.num_tokens, total)
        got = (chunk.round, chunk.sent_tokens, chunk.total_tokens)
        is_asked_for = self.status in (Status.WaitingForInput, Status.Transferring)
        if not is_asked_for or expected != got or self.num_tokens + chunk.num_tokens > total:
            raise TransferError(
                f"expected a chunk of round {self.rounds} from token {self.num_tokens} of {total} "
                f"on, in a room at {self.status}, got {chunk}"
            )

    def _count(self, chunk: Chunk) -> None:
        self.move(Status.Transferring)
        self.rounds += 1
        self.num_tokens += chunk.num_tokens
        self.num_bytes += chunk.num_tokens * self._pools.own.config.token_bytes
        self.connection.counts.spilled += self._pools.has_spilled(BlockHandle.decode(chunk.handle))
        self._total = chunk.total_tokens

    def _resume(self, remaining: int) -> None:
        grant = self._buffer.next_grant(remaining)
        self.connection.send(
            Resume(
                *self.ids,
                round=self.rounds,
                handle=grant.handle_bytes,
                offset=grant.offset,
                sent_tokens=self.num_tokens,
            )
        )

    def _finish(self) -> None:
        aux, fields = self._buffer.aux, self._pools.own.config.fields
        if aux is None:
            raise TransferError("the last chunk came without a first one")
        self.result = TransferResult(self.number, fields, self._buffer.finish(), aux, self.rounds)
        self.move(Status.Success)
        self.connection.send(Done(*self.ids))

    def on_starved(self, starved: Starved) -> None:
        """The embedding side has no free blocks for the round that was asked for."""
        if starved.round == self.rounds:
            self._peer_starves = True
        else:
            self.connection.counts.late += 1

    def give_back(self) -> None:
        self.blocks_wanted = 0
        self._buffer.give_back()

    def discard(self) -> None:
        """Give back the result that nobody has taken."""
        result, self.result = self.result, None
        if result is not None:
            result.release()

    def waits_for(self) -> str:
        if self.blocks_wanted:
            return f"it waits for {self.blocks_wanted} consecutive free blocks to land in"
        if self._peer_starves:
            return "the embedding side waits for free blocks to push with"
        if self._total is None:
            return f"it asked for the first round ({self._buffer}), nothing came yet"
        return (
            f"{self.num_tokens} of {self._total} tokens are here, round {self.rounds} was asked "
            f"for ({self._buffer})"
        )
