"""`TensorCache` with several nodes: what this one has not comes from the key's owner."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from shmblocks import BlockPool, Namespace
from shmblocks.cache import CacheLease, Claim, TensorCache, byte_config
from shmblocks.nodes import Nodes, NodeServer
from tests.support.children import wait_until
from tests.support.naming import new_pool_name

SECRET = b"sixteen bytes or more of a secret"
KEYS = [Namespace(model="encoder").key(f"picture {number}") for number in range(12)]


class Two(NamedTuple):
    """This node's cache; the other node's, which owns every key; and that one's server."""

    here: TensorCache
    there: TensorCache
    server: NodeServer


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Two]:
    """Made as an engine makes it: addresses in a list, the key in a file."""
    key_file = tmp_path / "key"
    key_file.write_bytes(SECRET)
    monkeypatch.setenv("SHMBLOCKS_KEY_FILE", str(key_file))
    with contextlib.ExitStack() as stack:
        pools = [
            stack.enter_context(
                BlockPool.create(new_pool_name(), byte_config(4 << 20), prefault="off")
            )
            for _ in range(2)
        ]
        server = stack.enter_context(NodeServer(pools[1], ("127.0.0.1", 0), key=SECRET))
        host, port = server.address
        here = TensorCache(pools[0], nodes=[f"{host}:{port}"])
        stack.callback(here.close)
        yield Two(here, TensorCache(pools[1]), server)
        for pool in pools:
            assert pool.cache_stats().claims == 0
            wait_until(
                lambda pool=pool: not any(info.leases for info in pool.allocations()),  # type: ignore[misc]
                "no lease is open",
            )
            pool.drop_all()
            assert pool.available_blocks() == pool.config.total_blocks
            assert pool.check() == []


def tensor_of(seed: int) -> torch.Tensor:
    return torch.randn(100, 8, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def assert_is(found: CacheLease | Claim | None, expected: torch.Tensor) -> None:
    assert isinstance(found, CacheLease)
    with found:
        assert torch.equal(found.tensor, expected)


def test_a_tensor_of_the_owner_is_got_and_then_here(two: Two) -> None:
    two.there.put(KEYS[0], tensor_of(0))
    assert_is(two.here.get(KEYS[0]), tensor_of(0))
    assert two.here.pool.find(KEYS[0]) is not None
    assert_is(two.here.get(KEYS[0]), tensor_of(0))
    wait_until(lambda: two.server.stats().fetched == 1, "it has crossed")
    assert two.here.get(KEYS[1]) is None


def test_a_claim_comes_only_for_what_the_owner_has_not(two: Two) -> None:
    two.there.put(KEYS[0], tensor_of(0))
    assert_is(two.here.get_or_claim(KEYS[0], timeout=10.0), tensor_of(0))
    with two.here.get_or_claim(KEYS[1], timeout=10.0) as found:
        assert isinstance(found, Claim)
        assert found.put(tensor_of(1))
    assert_is(two.here.get_or_claim(KEYS[1], timeout=10.0), tensor_of(1))


def test_coroutines_get_or_claim(two: Two) -> None:
    for number in range(4):
        two.there.put(KEYS[number], tensor_of(number))

    async def get_all() -> list[CacheLease | Claim]:
        return await asyncio.gather(
            *(two.here.get_or_claim_async(key, timeout=10.0) for key in KEYS[:5])
        )

    *found, claim = asyncio.run(get_all())
    for number, lease in enumerate(found):
        assert_is(lease, tensor_of(number))
    assert isinstance(claim, Claim)
    claim.abandon()


def test_a_tensor_of_another_shape_is_encoded_here(two: Two) -> None:
    two.there.put(KEYS[0], tensor_of(0))
    with two.here.get_or_claim(KEYS[0], shape=(50, 8), dtype=torch.bfloat16) as found:
        assert isinstance(found, Claim)
        assert not found.put(torch.zeros(50, 8, dtype=torch.bfloat16)), "the key has an entry"
    assert two.here.pool.stats().counters.mismatches == 1
    two.here.pool.drop_all()
    assert two.here.get(KEYS[0], shape=(50, 8)) is None


def test_somebody_elses_claim_here_is_not_waited_for_by_a_get(two: Two) -> None:
    two.there.put(KEYS[0], tensor_of(0))
    with BlockPool.attach(two.here.pool.name, prefault="off") as encoder:
        answer = encoder.claim(KEYS[0])
        assert two.here.get(KEYS[0]) is None
        encoder.end_claim(KEYS[0], answer)
    assert_is(two.here.get(KEYS[0]), tensor_of(0))


def test_a_cache_survives_its_owners_death(two: Two, rng: random.Random) -> None:
    two.there.put(KEYS[0], tensor_of(0))
    two.server.close()
    for key in rng.sample(KEYS, 5):
        with two.here.get_or_claim(key, timeout=10.0) as found:
            assert isinstance(found, Claim)
            found.put(tensor_of(5))


def test_nodes_of_the_callers_are_used_and_left_open(two: Two) -> None:
    two.there.put(KEYS[0], tensor_of(0))
    with Nodes(two.here.pool, [two.server.address], key=SECRET) as nodes:
        cache = TensorCache(two.here.pool, nodes=nodes)
        assert_is(cache.get(KEYS[0]), tensor_of(0))
        cache.close()
        assert not nodes.nodes[0].is_closed


def test_arguments_that_make_no_sense_are_told(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="list of addresses"):
        TensorCache(two.here.pool, nodes="10.0.0.1:7400")
    with pytest.raises(ValueError, match="HOST:PORT"):
        TensorCache(two.here.pool, nodes=["10.0.0.1"])
    assert TensorCache(two.here.pool, nodes=[]).get(KEYS[0]) is None
    monkeypatch.setenv("SHMBLOCKS_KEY_FILE", "/nowhere/key")
    with pytest.raises(FileNotFoundError):
        TensorCache(two.here.pool, nodes=["10.0.0.1:7400"])
