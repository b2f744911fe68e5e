"""The embedding side's end of a room.

    Bootstrapping --Request--> WaitingForInput --chunk--> Transferring --Done--> Success
                                                 ^  |
                                                 +--+ Resume, chunk

A chunk is written because one round was asked for, and a round is asked for once: round 0 by the
Request, round n by the Resume that says n. So a message that comes twice is a duplicate by its
number, and no chunk is written twice; a Resume that fits always leads to a chunk, at once or, when
push waits for blocks, at a later `advance`. The last chunk is the one that reaches the total
length, however long the rounds were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shmblocks.errors import StaleHandleError
from shmblocks.handle import BlockHandle
from shmblocks.transfer.delivery import Delivery, Shipped, make_delivery
from shmblocks.transfer.intake import Grant
from shmblocks.transfer.messages import Chunk, Done, Request, Resume, Starved
from shmblocks.transfer.room import Room
from shmblocks.transfer.status import Status

if TYPE_CHECKING:
    from shmblocks.transfer.link import Link
    from shmblocks.transfer.payload import Payload
    from shmblocks.transfer.pools import Pools
    from shmblocks.transfer.returns import Returns


class SendingRoom(Room):
    """One payload on its way. `tokens`, `num_bytes` and `rounds` count what was sent."""

    def __init__(
        self,
        link: Link,
        pools: Pools,
        returns: Returns,
        room: int,
        payload: Payload,
        req_id: str,
    ) -> None:
        super().__init__(link, room, nonce=0)
        self._pools = pools
        self._returns = returns
        self._payload = payload
        self._req_id = req_id
        self._delivery: Delivery | None = None
        self._asked = -1  # the last round that was asked for
        self._grant: Grant | None = None  # where its chunk goes; None once that is sent
        self._has_starved = False  # and the other side was told so, in this round

    @property
    def total_tokens(self) -> int:
        """Tokens of the payload."""
        return self._payload.num_tokens

    @property
    def blocks_wanted(self) -> int:
        return self._delivery.blocks_wanted if self._delivery is not None else 0

    # ---- messages ----------------------------------------------------------------------------

    def on_request(self, request: Request) -> None:
        """The language side asks for round 0; again, with another nonce, when it began anew."""
        self.nonce = request.nonce
        self.withdrawn = None
        # Nothing was sent yet, so an earlier delivery holds nothing that is not the payload's.
        self._delivery = make_delivery(
            self._pools, self._returns, request.mode, self._payload, self._req_id
        )
        if self.status is Status.Bootstrapping:
            self.move(Status.WaitingForInput)
        self._on_grant(0, Grant(_decoded(request.handle), 0))

    def on_resume(self, resume: Resume) -> None:
        """The language side asks for a further round."""
        if resume.round <= self._asked:
            self.link.counts.duplicate += 1
            return
        expected = (self._asked + 1, self.rounds, self.tokens)
        got = (resume.round, resume.round, resume.sent_tokens)
        if self._delivery is None or expected != got or self.tokens == self.total_tokens:
            self.fail(
                f"expected a resume for round {self._asked + 1} after {self.rounds} chunks and "
                f"{self.tokens} of {self.total_tokens} tokens, got {resume}"
            )
            return
        self._delivery.collected()
        self._on_grant(resume.round, Grant(_decoded(resume.handle), resume.offset))

    def _on_grant(self, round_: int, grant: Grant) -> None:
        self._asked = round_
        self._grant = grant
        self._has_starved = False
        self.advance()

    def on_done(self, done: Done) -> None:
        """The language side has everything."""
        if self.tokens != self.total_tokens or self._delivery is None:
            self.fail(f"expected Done after {self.total_tokens} tokens, got it at {self.tokens}")
            return
        self._delivery.collected()
        self.move(Status.Success)
        self.give_back()

    # ---- work --------------------------------------------------------------------------------

    def advance(self) -> None:
        if self.is_over or self._delivery is None or self._grant is None:
            return
        try:
            shipped = self._delivery.ship(self._grant, self.tokens)
        except StaleHandleError as error:
            self.wait_for_reason(error)
            return
        if shipped is None:
            self._tell_that_it_starves()
        else:
            self._grant = None
            self._has_starved = False
            self._announce(shipped)

    def _tell_that_it_starves(self) -> None:
        wanted = self.blocks_wanted
        if wanted and not self._has_starved:
            self._has_starved = True
            self.link.send(Starved(self.link.origin, self.room, self.nonce, self._asked, wanted))

    def _announce(self, shipped: Shipped) -> None:
        chunk = Chunk(
            self.link.origin,
            self.room,
            self.nonce,
            round=self.rounds,
            handle=shipped.handle.encode(),
            offset=shipped.offset,
            sent_tokens=self.tokens,
            num_tokens=shipped.num_tokens,
            total_tokens=self.total_tokens,
        )
        self.rounds += 1
        self.link.counts.spilled += self._pools.has_spilled(shipped.handle)
        self.tokens += shipped.num_tokens
        self.num_bytes += shipped.num_tokens * self._payload.token_bytes
        self.move(Status.Transferring)
        self.link.send(chunk)

    def give_back(self) -> None:
        if self._delivery is not None:
            self._delivery.give_back()
        elif self._payload.blocks is not None and not self._payload.is_shared:
            self._returns.free(self._payload.blocks)
        self._grant = None
        self._payload.forget()

    def waits_for(self) -> str:
        if self.status is Status.Bootstrapping:
            return "the language side has not asked for it yet"
        if self.blocks_wanted:
            return f"it waits for {self.blocks_wanted} consecutive free blocks to push with"
        if self.tokens == self.total_tokens:
            return f"all {self.tokens} tokens are sent, the language side has not confirmed them"
        return (
            f"{self.tokens} of {self.total_tokens} tokens are sent in {self.rounds} round(s), the "
            "language side has not asked for the next"
        )


def _decoded(handle: bytes | None) -> BlockHandle | None:
    return None if handle is None else BlockHandle.decode(handle)
