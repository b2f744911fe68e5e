"""A fake GPU, and pools that use it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shmblocks import BlockPool, Field
from shmblocks.cuda import driver
from tests.core import pools
from tests.core.conftest import require_right
from tests.cuda_logic.fakes import FakeGpu

FIELDS = (Field("rows", (4,), "int32"), Field("ids", (), "int64"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu()
    monkeypatch.setattr(driver, "load", lambda: fake)
    return fake


@pytest.fixture
def pool(gpu: FakeGpu, pool_name: str) -> Iterator[BlockPool]:
    """A pinned pool in host memory: 16 blocks of 4 tokens."""
    with pools.create(pool_name, pools.tiny(fields=FIELDS)) as made:
        made.pin()
        yield made
        if not made.is_closed:
            require_right(made)


@pytest.fixture
def cuda_pool(gpu: FakeGpu, pool_name: str) -> Iterator[BlockPool]:
    """A pool in (what it takes for) CUDA memory: 16 blocks of 4 tokens."""
    config = pools.tiny(fields=FIELDS)
    with BlockPool.create(pool_name, config, device="cuda:0", prefault="off") as made:
        yield made
        if not made.is_closed:
            require_right(made)
