"""Tickets: a lease on its way to another process, as at most 64 bytes.

Decoding trusts no byte; whether the lease still travels is asked of the pool, under its lock.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from shmblocks._state.cache_state import Ticket
from shmblocks.errors import MalformedHandleError
from shmblocks.handle import BlockHandle

# Slot, start block, number of blocks; number of the ticket, tokens, generation, pool.
_TICKET = struct.Struct("<4s3I4Q")
_MARK = b"SBT1"
TICKET_BYTES = _TICKET.size


class Tickets(NamedTuple):
    """Leases on one entry that travel: its handle, what stands in its `aux`, a ticket for each."""

    handle: BlockHandle
    aux: bytes
    tickets: list[bytes]


def encode_ticket(ticket: Ticket) -> bytes:
    """The bytes that travel."""
    handle = ticket.handle
    return _TICKET.pack(
        _MARK,
        ticket.slot,
        handle.start_block,
        handle.num_blocks,
        ticket.number,
        handle.num_tokens,
        handle.generation,
        handle.pool_id,
    )


def decode_ticket(data: bytes) -> Ticket:
    """The ticket that `encode_ticket` made; `MalformedHandleError` for any other bytes."""
    if len(data) != TICKET_BYTES or data[: len(_MARK)] != _MARK:
        raise MalformedHandleError(
            f"expected the {TICKET_BYTES} bytes of Lease.ticket(), got {len(data)} bytes"
        )
    _, slot, start, blocks, number, tokens, generation, pool_id = _TICKET.unpack(data)
    return Ticket(slot, number, BlockHandle(start, blocks, tokens, generation, pool_id))
