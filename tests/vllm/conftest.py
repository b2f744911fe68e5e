"""Engines that are closed when the test is over, and a pool of which nothing is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from shmblocks import BlockPool
from shmblocks.vllm.config import ConnectorConfig
from tests.vllm import kit

MakeEngine = Callable[..., kit.Engine]


@pytest.fixture
def engine(pool_name: str) -> Iterator[MakeEngine]:
    """Makes engines on one pool of 16 blocks, each of which holds one item."""
    made: list[kit.Engine] = []

    def make(role: str = "ec_both", **more: object) -> kit.Engine:
        made.append(kit.Engine(pool_name, role, **more))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def keeper(pool_name: str) -> Iterator[BlockPool]:
    """A participant that outlives the engines, and looks at the pool when they have left."""
    config = ConnectorConfig.of(kit.extra(pool_name)).pool_config()
    with BlockPool.ensure(pool_name, config, role="keeper", prefault="off") as pool:
        yield pool
        if not pool.is_closed:
            assert pool.check() == []
