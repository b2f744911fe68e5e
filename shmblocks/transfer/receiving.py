"""The language side's end of a room.

    Bootstrapping --blocks--> WaitingForInput --chunk--> Transferring --last chunk--> Success
                  Request                        ^  |                   Done
                                                 +--+ Resume, chunk

It draws the nonce that tells this attempt from others of the same room, and asks for one round at a
time; a chunk is taken when it is the answer to the round that was asked for last.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from shmblocks.errors import StaleHandleError, TransferError
from shmblocks.handle import BlockHandle
from shmblocks.transfer.intake import Grant, Intake
from shmblocks.transfer.messages import Chunk, Done, Mode, Request, Resume, Starved
from shmblocks.transfer.result import TransferResult
from shmblocks.transfer.room import Room
from shmblocks.transfer.status import Status

if TYPE_CHECKING:
    from shmblocks.transfer.link import Link
    from shmblocks.transfer.pools import Pools


class ReceivingRoom(Room):
    """One transfer to come. `tokens`, `num_bytes` and `rounds` count what was received."""

    def __init__(self, link: Link, pools: Pools, room: int, mode: Mode, intake: Intake) -> None:
        super().__init__(link, room, nonce=secrets.randbelow((1 << 64) - 1) + 1)
        self.mode = mode
        self.result: TransferResult | None = None
        self._pools = pools
        self._fields = pools.own.config.fields
        self._token_bytes = pools.own.config.token_bytes
        self._intake = intake
        self._total: int | None = None  # known from the first chunk on
        self._starves_over_there = False

    @property
    def blocks_wanted(self) -> int:
        return self._intake.blocks_wanted if self.status is Status.Bootstrapping else 0

    @property
    def is_starved(self) -> bool:
        """Whether it waits for blocks, on this side or the other."""
        return self.blocks_wanted > 0 or (self._starves_over_there and not self.is_over)

    # ---- work --------------------------------------------------------------------------------

    def advance(self) -> None:
        if self.withdrawn is not None and not self.is_over:
            self.wait_for_reason(self.withdrawn[1])
        if self.status is not Status.Bootstrapping:
            return
        grant = self._intake.first()
        if grant is not None:
            self.move(Status.WaitingForInput)
            self.link.send(
                Request(self.link.origin, self.room, self.nonce, self.mode, _encoded(grant))
            )

    def on_chunk(self, chunk: Chunk) -> None:
        """The embedding side wrote the next tokens."""
        if chunk.round < self.rounds:
            self.link.counts.duplicate += 1
            return
        self._check(chunk)
        self._starves_over_there = False
        try:
            self._intake.accept(chunk)
        except StaleHandleError as error:
            self.wait_for_reason(error)
        else:
            self._go_on(chunk)

    def _go_on(self, chunk: Chunk) -> None:
        """A chunk is here: the room has ended, or asks for the next."""
        self.move(Status.Transferring)
        self.rounds += 1
        self.tokens += chunk.num_tokens
        self.num_bytes += chunk.num_tokens * self._token_bytes
        self.link.counts.spilled += self._pools.has_spilled(BlockHandle.decode(chunk.handle))
        self._total = chunk.total_tokens
        if chunk.sent_tokens + chunk.num_tokens == chunk.total_tokens:
            self._finish()
        else:
            self._resume(chunk.total_tokens - self.tokens)

    def on_starved(self, starved: Starved) -> None:
        """The embedding side has no blocks for the round that was asked for."""
        if starved.round == self.rounds:
            self._starves_over_there = True
        else:
            self.link.counts.late += 1

    def _check(self, chunk: Chunk) -> None:
        """What the chunk says must follow from what came before it."""
        total = chunk.total_tokens if self._total is None else self._total
        expected = (self.rounds, self.tokens, total)
        got = (chunk.round, chunk.sent_tokens, chunk.total_tokens)
        is_asked_for = self.status in (Status.WaitingForInput, Status.Transferring)
        if not is_asked_for or expected != got or self.tokens + chunk.num_tokens > total:
            raise TransferError(
                f"expected a chunk of round {self.rounds} from token {self.tokens} of {total} on, "
                f"in a room at {self.status}, got {chunk}"
            )

    def _resume(self, remaining: int) -> None:
        grant = self._intake.more(remaining)
        self.link.send(
            Resume(
                self.link.origin,
                self.room,
                self.nonce,
                round=self.rounds,
                handle=_encoded(grant),
                offset=grant.offset,
                sent_tokens=self.tokens,
            )
        )

    def _finish(self) -> None:
        if self._intake.aux is None:
            raise TransferError("the last chunk came without a first one")
        self.result = TransferResult(
            self.room,
            self._fields,
            self._intake.finish(),
            self._intake.aux,
            self.rounds,
        )
        self.move(Status.Success)
        self.link.send(Done(self.link.origin, self.room, self.nonce))

    # ---- endings -----------------------------------------------------------------------------

    def give_back(self) -> None:
        self._intake.give_back()

    def discard(self) -> None:
        """Give the result back that nobody has taken."""
        result, self.result = self.result, None
        if result is not None:
            result.release()

    def waits_for(self) -> str:
        if self.blocks_wanted:
            return f"it waits for {self.blocks_wanted} consecutive free blocks to land in"
        if self._starves_over_there:
            return "the embedding side waits for free blocks to push with"
        if self._total is None:
            return f"it asked for the first round ({self._intake}), nothing came yet"
        return (
            f"{self.tokens} of {self._total} tokens are here, round {self.rounds} was asked for "
            f"({self._intake})"
        )


def _encoded(grant: Grant) -> bytes | None:
    return None if grant.handle is None else grant.handle.encode()
