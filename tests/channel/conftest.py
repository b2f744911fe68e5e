"""A small pool with room for channels, checked when the test is over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shmblocks import BlockPool, PoolConfig

CONFIG = PoolConfig(
    total_tokens=128,
    block_size=4,
    max_leases=64,
    channels=4,
    channel_slots=4 * 1040,
    lock_timeout=20.0,
)


@pytest.fixture
def pool(pool_name: str) -> Iterator[BlockPool]:
    """32 blocks of 4 tokens, without fields: torch is not needed."""
    with BlockPool.create(pool_name, CONFIG, role="tester", prefault="off") as made:
        yield made
        if not made.is_closed:
            assert made.check() == []
