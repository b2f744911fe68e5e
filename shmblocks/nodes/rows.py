"""The rows of an allocation as bytes, field by field: what crosses between two nodes.

Lengths come from the pool's own config and from how many tokens were asked for.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Protocol

from shmblocks.config import PoolConfig
from shmblocks.pool import BlockPool

AUX = "aux"
# Bytes that are summed and then sent, or received and then summed. Smaller: more system calls.
# Larger: they have left the processor's cache when they are used the second time.
CHECKED_SLICE = 1 << 20
_ASKED = struct.Struct("<2Q")


class HasMemory(Protocol):
    """A lease, a reservation or a view."""

    def memory(self, name: str) -> memoryview: ...


def rows_of(
    config: PoolConfig, owner: HasMemory, first_token: int, num_tokens: int
) -> Iterator[memoryview]:
    """The bytes of tokens `first_token .. first_token + num_tokens - 1`, a field at a time."""
    for field in config.fields:
        start = first_token * field.token_bytes
        yield owner.memory(field.name)[start : start + num_tokens * field.token_bytes]


class Checksum:
    """CRC-32 of a part of an allocation: of what was asked for, `aux`, and the rows.

    What was asked for is in it, so that a question that was changed on its way shows, too.
    """

    def __init__(self, handle: bytes, first_token: int, num_tokens: int, aux: bytes) -> None:
        self.value = zlib.crc32(handle + _ASKED.pack(first_token, num_tokens) + aux)

    def add(self, rows: memoryview) -> None:
        """The next rows."""
        self.value = zlib.crc32(rows, self.value)


def sliced(rows: memoryview) -> Iterator[memoryview]:
    """Parts to sum one after the other."""
    for start in range(0, len(rows), CHECKED_SLICE):
        yield rows[start : start + CHECKED_SLICE]


def require_host_pool(pool: BlockPool) -> BlockPool:
    """The pool, if its fields lie where a socket can read and write them."""
    if pool.config.is_on_gpu:
        raise ValueError(
            f"pool {pool.name}: expected a pool in host memory, its fields lie on "
            f"{pool.config.device}: serve, and fetch into, a host pool (the spill pool is one)"
        )
    return pool
