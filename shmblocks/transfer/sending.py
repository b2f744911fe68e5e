"""The embedding side's end of a room: the payload, the two ways to write chunks, and the room.

    Bootstrapping --Request--> WaitingForInput --chunk--> Transferring --Done--> Success
                                                 ^  |
                                                 +--+ Resume, chunk

The payload is one of
    tensors             checked; borrowed until the room has ended; copied into the pool
    reserved blocks     from `pool.alloc`, written by the caller; the payload owns them from then
                        on. Push publishes them as they are, landing copies out of them
    published blocks    from `pool.publish(readers=n)`, for several receivers. They stay the
                        caller's, who frees them if one of the rooms fails. Push only

Chunks are written
    landing   into the blocks that the language side granted, under a writer's lease: if they are
              freed meanwhile, nobody gets them before the lease ends
    push      into blocks of our own, which are then published. What fits into the pool goes at
              once, and waits for free blocks without holding any. What can never fit goes in chunks
              of at most half the pool, so that the next can be written while the last is read.
              A full pool spills, if there is one to spill to

No chunk is written twice, and none is forgotten: each answers one round, and each round is asked
for once, round 0 by the Request, round n by the Resume with that number. A message that comes twice
is known by its round. A Resume that fits always leads to a chunk: at once, or in a later `advance`
when push waits for blocks. The last chunk is the one that reaches the total length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from shmblocks.errors import InvalidStateError, StaleHandleError, TransferError
from shmblocks.handle import BlockHandle
from shmblocks.transfer.messages import Chunk, Done, Grant, Mode, Request, Resume, Starved
from shmblocks.transfer.room import Room, Status
from shmblocks.transfer.tensors import (
    AUX_LENGTH,
    AUX_MROPE_DELTA,
    AUX_SIZE,
    Fields,
    Tensors,
    copy_tokens,
    count_tokens,
    finish_copies,
)

if TYPE_CHECKING:
    import torch

    from shmblocks.pool import BlockPool
    from shmblocks.transfer.connection import Connection
    from shmblocks.transfer.pools import Pools
    from shmblocks.view import BlockView

INT32_MAX = (1 << 31) - 1


# ---- what is sent ----------------------------------------------------------------------------


class Payload:
    """Tokens to send. `is_shared`: published blocks, which stay the caller's.

    `blocks` hold the tokens already; None for tensors. `held` are blocks to free when the room
    ends: reserved, or published and perhaps not read yet.
    """

    def __init__(
        self,
        fields: Fields,
        num_tokens: int,
        tensors: Tensors,
        aux: torch.Tensor | None,
        blocks: BlockHandle | None = None,
    ) -> None:
        self.num_tokens = num_tokens
        self.token_bytes = sum(field.token_bytes for field in fields)
        self.blocks = blocks
        self.is_shared = aux is None
        self.held = None if self.is_shared else blocks
        self._fields = fields
        self._tensors = tensors
        self._aux = aux

    def write(self, view: BlockView, offset: int, first_token: int, num_tokens: int) -> None:
        """Copy tokens `first_token ..`, from token `offset` of the blocks on, and the aux."""
        copy_tokens(self._fields, view, offset, self._tensors, first_token, num_tokens)
        if self._aux is not None:
            view.aux.copy_(self._aux)

    def give_back(self, pools: Pools) -> None:
        """Free what is held, drop the borrowed tensors: the room has ended."""
        held, self.held = self.held, None
        if held is not None:
            pools.free(held)
        self._tensors = {}


def payload_of_tensors(pool: BlockPool, tensors: Tensors, delta: int) -> Payload:
    """A payload that is copied; TypeError or ValueError if the tensors don't fit the pool."""
    import torch

    num_tokens = count_tokens(pool.config.fields, tensors)
    if num_tokens > INT32_MAX:
        raise ValueError(f"tensors: expected at most {INT32_MAX} tokens, got {num_tokens}")
    aux = torch.zeros(AUX_SIZE, dtype=torch.int32)
    aux[AUX_LENGTH] = num_tokens
    aux[AUX_MROPE_DELTA] = _checked_delta(delta)
    return Payload(pool.config.fields, num_tokens, dict(tensors), aux)


def payload_of_blocks(pool: BlockPool, handle: BlockHandle, delta: int | None) -> Payload:
    """A payload of a reservation of this process. Sets `aux[0]`, and `aux[1]` if it is given."""
    view = pool.view(handle)
    view.aux[AUX_LENGTH] = handle.num_tokens
    if delta is not None:
        view.aux[AUX_MROPE_DELTA] = _checked_delta(delta)
    tensors = {field.name: view[field.name] for field in pool.config.fields}
    return Payload(pool.config.fields, handle.num_tokens, tensors, view.aux, handle)


def payload_of_published(pool: BlockPool, handle: BlockHandle) -> Payload:
    """A payload of blocks that the caller has published, with their aux written before."""
    if handle.is_fake or handle.pool_id != pool.pool_id:
        raise InvalidStateError(f"{handle}: expected published blocks of pool {pool.name}")
    return Payload(pool.config.fields, handle.num_tokens, {}, None, handle)


def _checked_delta(delta: int) -> int:
    if not -INT32_MAX - 1 <= delta <= INT32_MAX:
        raise ValueError(f"mrope_position_delta: expected an int32, got {delta}")
    return delta


# ---- the room --------------------------------------------------------------------------------


class Written(NamedTuple):
    """Tokens that were written, and where."""

    handle: BlockHandle
    offset: int
    num_tokens: int


class SendingRoom(Room):
    """One payload being sent."""

    def __init__(
        self, connection: Connection, pools: Pools, number: int, payload: Payload, req_id: str
    ) -> None:
        super().__init__(connection, number, nonce=0)
        self.total_tokens = payload.num_tokens
        self._pools = pools
        self._payload = payload
        self._req_id = req_id
        self._mode: Mode | None = None  # None: the other side has not asked yet
        self._asked = -1  # the last round that was asked for
        self._grant: Grant | None = None  # where its chunk goes; None once it is sent
        self._has_starved = False  # whether the other side was told that this round starves

    # ---- messages ----------------------------------------------------------------------------

    def on_request(self, request: Request) -> None:
        """The language side asks for round 0; again, with another nonce, when it began anew."""
        self.nonce = request.nonce
        self.stale = None
        self._mode = request.mode
        self.blocks_wanted = 0
        if self._mode == "landing" and self._payload.is_shared:
            raise TransferError(
                "blocks that are published already can only be pushed: receive with mode='push'"
            )
        if self.status is Status.Bootstrapping:
            self.move(Status.WaitingForInput)
        self._start_round(0, Grant.decode(request.handle))

    def on_resume(self, resume: Resume) -> None:
        """The language side asks for a further round."""
        if resume.round <= self._asked:
            self.connection.counts.duplicate += 1
            return
        expected = (self._asked + 1, self.rounds, self.num_tokens)
        got = (resume.round, resume.round, resume.sent_tokens)
        if expected != got or self.num_tokens == self.total_tokens:
            raise TransferError(
                f"expected a resume for round {self._asked + 1} after {self.rounds} chunks and "
                f"{self.num_tokens} of {self.total_tokens} tokens, got {resume}"
            )
        self._on_taken()
        self._start_round(resume.round, Grant.decode(resume.handle, resume.offset))

    def _start_round(self, number: int, grant: Grant) -> None:
        self._asked = number
        self._grant = grant
        self._has_starved = False
        self.advance()

    def on_done(self, done: Done) -> None:
        """The language side has everything."""
        if self.num_tokens != self.total_tokens:
            raise TransferError(
                f"expected Done after {self.total_tokens} tokens, got it at {self.num_tokens}"
            )
        self._on_taken()
        self.move(Status.Success)
        self.give_back()

    def _on_taken(self) -> None:
        """The other side has what was written last."""
        if self._mode == "push":
            self._payload.held = None

    # ---- writing -----------------------------------------------------------------------------

    def advance(self) -> None:
        if self.is_over or self._grant is None:
            return
        try:
            written = self._write(self._grant)
        except StaleHandleError as error:
            self.wait_for_reason(error)
            return
        if written is not None:
            self._grant = None
            self._announce(written)
        elif not self._has_starved:
            self._has_starved = True
            self.connection.send(Starved(*self.ids, self._asked, self.blocks_wanted))

    def _write(self, grant: Grant) -> Written | None:
        """Write the next tokens; None if there are no free blocks for them now."""
        if self._mode == "landing":
            return self._land(grant)
        if grant.handle is not None:
            raise TransferError(f"expected no blocks with push, got {grant}")
        payload = self._payload
        if payload.blocks is None:
            return self._push_copy()
        if payload.held is not None:
            payload.held = payload.blocks = self._pools.of(payload.held).publish(payload.held)
        return Written(payload.blocks, 0, payload.num_tokens)

    def _land(self, grant: Grant) -> Written:
        handle, offset = grant
        if handle is None or offset >= handle.num_tokens:
            raise TransferError(f"expected blocks that are not full, got {grant}")
        num_tokens = min(handle.num_tokens - offset, self.total_tokens - self.num_tokens)
        with self._pools.of(handle).open_for_write(handle) as lease:
            self._payload.write(lease.view, offset, self.num_tokens, num_tokens)
            finish_copies(lease.view)
        return Written(handle, offset, num_tokens)

    def _push_copy(self) -> Written | None:
        payload = self._payload
        for pool in self._pools.all:
            num_tokens = self._chunk_tokens(pool)
            payload.held = pool.alloc(num_tokens, req_id=self._req_id)
            if payload.held is not None:
                self.blocks_wanted = 0
                payload.write(pool.view(payload.held), 0, self.num_tokens, num_tokens)
                payload.held = pool.publish(payload.held)
                return Written(payload.held, 0, num_tokens)
        own = self._pools.own
        self.blocks_wanted = own.config.blocks_for(self._chunk_tokens(own))
        return None

    def _chunk_tokens(self, pool: BlockPool) -> int:
        config, left = pool.config, self.total_tokens - self.num_tokens
        if self.total_tokens <= config.total_tokens:
            return left
        return min(left, max(config.total_blocks // 2, 1) * config.block_size)

    def _announce(self, written: Written) -> None:
        chunk = Chunk(
            *self.ids,
            round=self.rounds,
            handle=written.handle.encode(),
            offset=written.offset,
            sent_tokens=self.num_tokens,
            num_tokens=written.num_tokens,
            total_tokens=self.total_tokens,
        )
        self.rounds += 1
        self.connection.counts.spilled += self._pools.has_spilled(written.handle)
        self.num_tokens += written.num_tokens
        self.num_bytes += written.num_tokens * self._payload.token_bytes
        self.move(Status.Transferring)
        self.connection.send(chunk)

    def give_back(self) -> None:
        self.blocks_wanted = 0
        self._grant = None
        self._payload.give_back(self._pools)

    def waits_for(self) -> str:
        if self.status is Status.Bootstrapping:
            return "the language side has not asked for it yet"
        if self.blocks_wanted:
            return f"it waits for {self.blocks_wanted} consecutive free blocks to push with"
        if self.num_tokens == self.total_tokens:
            return (
                f"all {self.num_tokens} tokens are sent, the language side has not confirmed them"
            )
        return (
            f"{self.num_tokens} of {self.total_tokens} tokens are sent in {self.rounds} round(s), "
            "the language side has not asked for the next"
        )
