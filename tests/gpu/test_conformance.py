"""The suite that every kind of pool passes, over pools in CUDA memory and pinned host pools."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from shmblocks import BlockPool, PoolConfig, PoolExistsError
from tests.core.conformance import test_conformance as suite
from tests.core.conformance.kinds import Kind


class SettledPool(BlockPool):
    """Counts after the streams have come to everything, as the suite expects it."""

    def available_blocks(self) -> int:
        torch.cuda.synchronize()
        return super().available_blocks()


class CudaPool:
    """All fields in CUDA memory."""

    name = "cuda"

    def create(self, name: str, config: PoolConfig) -> BlockPool:
        return SettledPool.create(name, config, prefault="off", device="cuda:0")

    def attach(self, name: str) -> BlockPool:
        return SettledPool.attach(name, prefault="off")

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.cpu()


class PinnedPool:
    """All fields in POSIX shared memory, registered with CUDA."""

    name = "pinned"

    def create(self, name: str, config: PoolConfig) -> BlockPool:
        pool = BlockPool.create(name, config, prefault="off")
        pool.pin()
        return pool

    def attach(self, name: str) -> BlockPool:
        pool = BlockPool.attach(name, prefault="off")
        pool.pin()
        return pool

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@pytest.fixture(params=[CudaPool(), PinnedPool()], ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


@pytest.fixture
def pool(kind: Kind, pool_name: str) -> Iterator[BlockPool]:
    with kind.create(pool_name, suite.CONFIG) as made:
        yield made
        assert made.check() == []


test_what_is_published_is_read_bit_for_bit_by_another_attachment = (
    suite.test_what_is_published_is_read_bit_for_bit_by_another_attachment
)
test_shapes_are_those_of_the_fields = suite.test_shapes_are_those_of_the_fields
test_a_freed_handle_cannot_be_read = suite.test_a_freed_handle_cannot_be_read
test_an_unpublished_handle_cannot_be_read = suite.test_an_unpublished_handle_cannot_be_read
test_growing_keeps_the_content = suite.test_growing_keeps_the_content
test_a_landing_allocation_is_written_by_another_and_read_by_its_owner = (
    suite.test_a_landing_allocation_is_written_by_another_and_read_by_its_owner
)
test_a_tensor_outlives_its_pool = suite.test_a_tensor_outlives_its_pool


def test_a_pool_is_attached_by_name_and_named_once(kind: Kind, pool: BlockPool) -> None:
    with kind.attach(pool.name) as other:
        assert (other.pool_id, other.config) == (pool.pool_id, pool.config)
    with pytest.raises(PoolExistsError):
        kind.create(pool.name, suite.CONFIG)
