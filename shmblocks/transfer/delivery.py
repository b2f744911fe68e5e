"""How the embedding side gets tokens to where the language side reads them: two ways, one contract.

    landing   writes into the blocks that the language side granted, under a writer's lease: if they
              are freed meanwhile, they are not used again before the lease ends
    push      allocates, writes, publishes. What fits into the pool goes at once, and waits for
              that, holding nothing; what can never fit goes in chunks of at most half the pool, so
              that the next can be written while the last is read by somebody else. A full pool
              spills, if there is one to spill to

What it does not do: know statuses, or decide when a chunk is due.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from shmblocks.errors import TransferError
from shmblocks.handle import BlockHandle
from shmblocks.transfer.intake import Grant
from shmblocks.transfer.room import blocks_text
from shmblocks.transfer.tensors import finish_copies

if TYPE_CHECKING:
    from shmblocks.pool import BlockPool
    from shmblocks.transfer.payload import Payload
    from shmblocks.transfer.pools import Pools
    from shmblocks.transfer.returns import Returns


class Shipped(NamedTuple):
    """Tokens that were written, and where."""

    handle: BlockHandle
    offset: int
    num_tokens: int


class Delivery(Protocol):
    """One way of sending."""

    blocks_wanted: int

    def ship(self, grant: Grant, sent: int) -> Shipped | None:
        """Write the next tokens; None when that cannot be done now."""

    def collected(self) -> None:
        """The other side has what was shipped last."""

    def give_back(self) -> None:
        """Give back everything that is held."""


class LandingDelivery:
    """Into granted blocks; see the top of this file."""

    def __init__(self, pools: Pools, returns: Returns, payload: Payload) -> None:
        if payload.is_shared:
            raise TransferError(
                "blocks that are published already can only be pushed: receive with mode='push'"
            )
        self.blocks_wanted = 0
        self._pools = pools
        self._returns = returns
        self._payload = payload

    def ship(self, grant: Grant, sent: int) -> Shipped | None:
        handle, offset = grant
        if handle is None or offset >= handle.num_tokens:
            raise TransferError(f"expected blocks with room to write into, got {grant}")
        num_tokens = min(handle.num_tokens - offset, self._payload.num_tokens - sent)
        with self._pools.of(handle).open_for_write(handle) as lease:
            self._payload.write(lease.view, offset, sent, num_tokens)
            finish_copies(lease.view)
        return Shipped(handle, offset, num_tokens)

    def collected(self) -> None:
        """What was written is in the other side's own blocks."""

    def give_back(self) -> None:
        if self._payload.blocks is not None:
            self._returns.free(self._payload.blocks)

    def __str__(self) -> str:
        return "blocks of the other side"


class PushDelivery:
    """Through blocks of our own; see the top of this file."""

    def __init__(self, pools: Pools, returns: Returns, payload: Payload, req_id: str) -> None:
        self.blocks_wanted = 0
        self._pools = pools
        self._returns = returns
        self._payload = payload
        self._req_id = req_id
        # Reserved, or published and not known to be read. Never what stays the caller's.
        self._held = None if payload.is_shared else payload.blocks

    def ship(self, grant: Grant, sent: int) -> Shipped | None:
        if grant.handle is not None:
            raise TransferError(f"expected no blocks with push, got {grant}")
        if self._payload.blocks is None:
            return self._ship_copy(sent)
        if not self._payload.is_shared:
            self._held = self._pools.of(self._payload.blocks).publish(self._payload.blocks)
        return Shipped(self._payload.blocks, 0, self._payload.num_tokens)

    def _ship_copy(self, sent: int) -> Shipped | None:
        for pool in self._pools.all:
            num_tokens = self._chunk_tokens(pool, sent)
            self._held = pool.alloc(num_tokens, req_id=self._req_id)
            if self._held is not None:
                self.blocks_wanted = 0
                self._payload.write(pool.view(self._held), 0, sent, num_tokens)
                self._held = pool.publish(self._held)
                return Shipped(self._held, 0, num_tokens)
        own = self._pools.own
        self.blocks_wanted = own.config.blocks_for(self._chunk_tokens(own, sent))
        return None

    def _chunk_tokens(self, pool: BlockPool, sent: int) -> int:
        config, total = pool.config, self._payload.num_tokens
        if total <= config.total_tokens:
            return total - sent
        return min(total - sent, max(config.total_blocks // 2, 1) * config.block_size)

    def collected(self) -> None:
        self._held = None

    def give_back(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            self._returns.free(held)

    def __str__(self) -> str:
        return blocks_text(self._held) if self._held is not None else "no blocks"


def make_delivery(
    pools: Pools, returns: Returns, mode: str, payload: Payload, req_id: str
) -> LandingDelivery | PushDelivery:
    """The delivery for a mode."""
    if mode == "landing":
        return LandingDelivery(pools, returns, payload)
    return PushDelivery(pools, returns, payload, req_id)
