"""A pool per test, judged when the test is over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shmblocks import BlockPool
from tests.core import pools


def require_right(pool: BlockPool) -> None:
    """The invariants, and the accounting equation: every block is in exactly one count."""
    assert pool.check() == []
    stats = pool.stats()
    assert stats.total_blocks == (
        stats.free_blocks
        + stats.reserved_blocks
        + stats.published_blocks
        + stats.leased_blocks
        + stats.draining_blocks
        + stats.settling_blocks
    )


@pytest.fixture
def pool(pool_name: str) -> Iterator[BlockPool]:
    """16 blocks of 4 tokens, default 2, no fields; checked and closed after the test."""
    with pools.create(pool_name, role="tester") as made:
        yield made
        if not made.is_closed:
            require_right(made)
