"""The rows of an allocation as bytes, field by field: what crosses between two nodes.

Lengths come from the pool's own config and from how many tokens were asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from shmblocks.config import PoolConfig
from shmblocks.pool import BlockPool

AUX = "aux"


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


def require_host_pool(pool: BlockPool) -> BlockPool:
    """The pool, if its fields lie where a socket can read and write them."""
    if pool.config.is_on_gpu:
        raise ValueError(
            f"pool {pool.name}: expected a pool in host memory, its fields lie on "
            f"{pool.config.device}: serve, and fetch into, a host pool (the spill pool is one)"
        )
    return pool
