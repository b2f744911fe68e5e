"""A small pool, checked when the test is over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shmblocks import BlockPool
from tests.cache import kit


@pytest.fixture
def pool(pool_name: str) -> Iterator[BlockPool]:
    """32 blocks of 4 tokens, without fields."""
    with BlockPool.create(pool_name, kit.config(), role="tester", prefault="off") as made:
        yield made
        if not made.is_closed:
            assert made.check() == []
