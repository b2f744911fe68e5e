"""A pool per test; when the test is over every block is free and nobody waits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shmblocks import BlockPool
from tests.core import pools
from tests.core.conftest import require_right
from tests.queue.kit import give_up_the_net
from tests.wait_queue.kit import TOTAL


@pytest.fixture
def pool(pool_name: str) -> Iterator[BlockPool]:
    """16 blocks of 4 tokens, no fields."""
    with pools.create(pool_name, role="tester") as made:
        yield made
        if not made.is_closed:
            made.reap()
            require_right(made)
            stats = made.stats()
            assert (stats.waiters, stats.free_blocks) == (0, TOTAL), stats


@pytest.fixture
def no_net(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sleeps end by a wake-up, and only so. Name it before `pool`."""
    give_up_the_net(monkeypatch)
