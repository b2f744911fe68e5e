"""A fetch into a CUDA pool: by way of pinned host memory, published in the order of a stream."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from shmblocks import UNBOUNDED, BlockHandle, BlockPool
from shmblocks.nodes import NodeServer, RemotePool, nixl_agent
from tests.core.conftest import require_right
from tests.cuda_logic.fakes import STREAM, FakeGpu
from tests.nodes import fake_agent
from tests.nodes.kit import KEY, LONG, Content, fill, holds_leases
from tests.support.children import wait_until

ENTRY = b"the key of 16 B."


class Pools(NamedTuple):
    """The CUDA pool of this node, its host pool; the other node's pool; and the way there."""

    cuda: BlockPool
    host: BlockPool
    there: BlockPool
    remote: RemotePool
    gpu: FakeGpu


@pytest.fixture
def pools(cuda_pool: BlockPool, pool_name: str, gpu: FakeGpu) -> Iterator[Pools]:
    on_host = msgspec.structs.replace(cuda_pool.config, device="cpu")
    with (
        BlockPool.create(f"{pool_name}-host", on_host, prefault="off") as host,
        BlockPool.create(f"{pool_name}-there", on_host, prefault="off") as there,
        NodeServer(there, ("127.0.0.1", 0), key=KEY) as server,
        RemotePool(cuda_pool, server.address, key=KEY, host=host) as remote,
    ):
        yield Pools(cuda_pool, host, there, remote, gpu)
        gpu.run(STREAM)
        for pool in (host, there):
            wait_until(lambda pool=pool: not holds_leases(pool), "no lease is open", LONG)  # type: ignore[misc]
            pool.drop_all()
            pool.reap()
            assert pool.available_blocks() == pool.config.total_blocks
            require_right(pool)


def publish(
    pool: BlockPool, num_tokens: int, key: bytes | None = None
) -> tuple[BlockHandle, Content]:
    with pool.reserve(num_tokens, timeout=0.0) as reservation:
        content = fill(reservation, random.Random(num_tokens))
        readers = UNBOUNDED if key else 1
        return reservation.publish(readers=readers, key=key), content


def read(pools: Pools, handle: BlockHandle) -> Content:
    with pools.cuda.open(handle) as lease:
        found = {name: lease[name].cpu().numpy().tobytes() for name in lease}
        found["aux"] = bytes(lease.memory("aux"))
    pools.gpu.run(STREAM)
    return found


def test_rows_that_an_agent_reads_land_in_the_host_pool_too(
    pools: Pools, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(fake_agent.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(nixl_agent, "CLASS", fake_agent.CLASS)
    monkeypatch.setattr(nixl_agent, "is_installed", lambda: True)
    with (
        NodeServer(pools.there, ("127.0.0.1", 0), key=KEY, nixl=True) as server,
        RemotePool(pools.cuda, server.address, key=KEY, host=pools.host, engine="nixl") as remote,
    ):
        handle, content = publish(pools.there, 9)
        local = remote.fetch(handle, timeout=LONG)
        pools.gpu.run(STREAM)
        assert read(pools, local) == content
        wait_until(lambda: not holds_leases(pools.there), "it is confirmed", LONG)


def test_rows_come_to_the_gpu_and_the_host_blocks_come_back_behind_the_copies(
    pools: Pools,
) -> None:
    handle, content = publish(pools.there, 9)
    local = pools.remote.fetch(handle, timeout=LONG)
    assert local.pool_id == pools.cuda.pool_id
    total = pools.host.config.total_blocks
    assert pools.host.available_blocks() < total, "the stream has not got there"
    assert not pools.cuda.state.is_ready(local)
    pools.gpu.run(STREAM)
    pools.host.reap()
    assert pools.host.available_blocks() == total
    assert read(pools, local) == content


def test_an_entry_comes_by_key(pools: Pools) -> None:
    _, content = publish(pools.there, 9, ENTRY)
    lease = pools.remote.fetch_key(ENTRY, timeout=LONG)
    assert lease is not None
    pools.gpu.run(STREAM)
    lease.release()
    pools.gpu.run(STREAM)
    found = pools.cuda.find(ENTRY)
    assert found is not None
    assert read(pools, found.handle) == content
    pools.cuda.drop_all()


def test_a_fetch_that_fails_gives_both_reservations_back(pools: Pools) -> None:
    handle, _ = publish(pools.there, 9)
    pools.there.free(handle)
    with pytest.raises(Exception, match="freed"):
        pools.remote.fetch(handle, timeout=LONG)
    assert pools.host.available_blocks() == pools.host.config.total_blocks
    assert pools.cuda.available_blocks() == pools.cuda.config.total_blocks


def test_a_pool_on_a_gpu_needs_a_host_pool_with_its_fields(pools: Pools, pool_name: str) -> None:
    with pytest.raises(ValueError, match="expected a pool in host memory"):
        RemotePool(pools.cuda, ("127.0.0.1", 1), key=KEY)
    with pytest.raises(ValueError, match="expected a pool in host memory"):
        RemotePool(pools.cuda, ("127.0.0.1", 1), key=KEY, host=pools.cuda)
    other = msgspec.structs.replace(pools.host.config, block_size=8)
    with (
        BlockPool.create(f"{pool_name}-other", other, prefault="off") as unlike,
        pytest.raises(ValueError, match="block_size"),
    ):
        RemotePool(pools.cuda, ("127.0.0.1", 1), key=KEY, host=unlike)
    with pools.cuda.reserve(4) as landing, pytest.raises(ValueError, match="host memory"):
        pools.remote.fetch_into(BlockHandle(0, 1, 4, 1, 7), landing.handle)
    pools.gpu.run(STREAM)
