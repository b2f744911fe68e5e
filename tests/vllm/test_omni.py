"""Payloads of vLLM-omni through a pool, against a stub where it is not installed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm_omni.distributed.omni_connectors.factory import OmniConnectorFactory

from shmblocks import BlockPool
from shmblocks.testing import abandon
from shmblocks.vllm_omni import NAME, ShmBlocksConnector, register

Make = Callable[..., ShmBlocksConnector]
POOL_BYTES = 1 << 20


@pytest.fixture
def make(pool_name: str) -> Iterator[Make]:
    made: list[ShmBlocksConnector] = []

    def connector(**more: object) -> ShmBlocksConnector:
        config = {"pool": pool_name, "pool_bytes": POOL_BYTES, "put_seconds": 0.01, **more}
        made.append(ShmBlocksConnector(config))
        return made[-1]

    yield connector
    for each in made:
        each.close()


def pool_of(connector: ShmBlocksConnector) -> BlockPool:
    assert connector._pool is not None
    return connector._pool


def put(connector: ShmBlocksConnector, key: str, data: object) -> Any:  # noqa: ANN401
    stored, size, metadata = connector.put("0", "1", key, data)
    assert stored
    assert size > 0
    return metadata


@pytest.mark.parametrize("data", [{"a": [1, 2]}, {}, [], b"x" * 300_000, "text"])
def test_a_payload_is_read_once_and_leaves_nothing(make: Make, data: object) -> None:
    first, second = make(stage_id=0), make(stage_id=1)
    put(first, "request_0_1", data)
    found = second.get("0", "1", "request_0_1")
    assert found is not None
    assert found[0] == data
    assert second.get("0", "1", "request_0_1") is None
    pool = pool_of(first)
    assert pool.available_blocks() == pool.config.total_blocks
    assert pool.check() == []


def test_what_is_not_there_yet_is_none(make: Make) -> None:
    assert make().get("0", "1", "nothing") is None


@pytest.mark.parametrize("metadata", [None, {}, "text", {"source_host": "a"}, {"key": {"shm": {}}}])
def test_the_key_alone_finds_it(make: Make, metadata: Any) -> None:  # noqa: ANN401
    connector = make()
    put(connector, "a/key with ünusual letters", 1)
    found = connector.get("0", "1", "a/key with ünusual letters", metadata)
    assert found is not None
    assert found[0] == 1


def test_a_key_that_is_put_again_has_the_new_payload(make: Make) -> None:
    connector = make()
    put(connector, "key", 1)
    put(connector, "key", 2)
    found = connector.get("0", "1", "key")
    assert found is not None
    assert found[0] == 2
    assert pool_of(connector).stats().allocations == 0


def test_cleanup_frees_that_key_and_no_other(make: Make) -> None:
    connector = make()
    put(connector, "request", 1)
    put(connector, "request_0", 2)
    connector.cleanup("request")
    assert connector.get("0", "1", "request") is None
    assert connector.get("0", "1", "request_0") is not None
    connector.cleanup("request_0")  # read already


def test_keys_that_others_have_read_are_forgotten(make: Make) -> None:
    first, second = make(), make()
    for name in "abc":
        put(first, name, name)
    second.get("0", "1", "b")
    first.reap_consumed()
    assert list(first._pending_keys) == ["a", "c"]


def test_without_room_a_put_fails_and_says_so(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    connector = make()
    put(connector, "a", b"x" * (POOL_BYTES // 2))
    assert connector.put("0", "1", "b", b"x" * (POOL_BYTES // 2)) == (False, 0, None)
    assert connector.put("0", "1", "c", b"x" * (2 * POOL_BYTES)) == (False, 0, None)
    assert connector.put("0", "1", "d", object()) == (False, 0, None)
    assert "put of b failed" in caplog.text
    assert "put of c failed" in caplog.text
    assert "put of d failed" in caplog.text


def test_closing_frees_what_was_not_read(make: Make) -> None:
    first, second = make(), make()
    put(first, "a", 1)
    put(second, "b", 2)
    first.close()
    first.close()
    assert first.put("0", "1", "c", 1) == (False, 0, None)
    assert second.get("0", "1", "a") is None
    assert second.get("0", "1", "b") is not None


def test_the_last_to_close_removes_the_pool(make: Make, pool_name: str) -> None:
    first, second = make(), make()
    first.close()
    assert Path(f"/dev/shm/{pool_name}").exists()
    second.close()
    assert not Path(f"/dev/shm/{pool_name}").exists()


def test_dropped_it_closes_itself(pool_name: str) -> None:
    ShmBlocksConnector({"pool": pool_name, "pool_bytes": POOL_BYTES})
    gc.collect()
    assert not Path(f"/dev/shm/{pool_name}").exists()


def test_a_payload_outlives_the_process_that_has_put_it(make: Make) -> None:
    first, second = make(), make()
    put(first, "a", 1)
    abandon(pool_of(first))
    pool_of(second).reap()
    found = second.get("0", "1", "a")
    assert found is not None
    assert found[0] == 1
    first._pool = None


def test_its_health_tells_how_full_the_pool_is(make: Make) -> None:
    connector = make()
    put(connector, "a", b"x" * 100_000)
    health = connector.health()
    assert (health["status"], health["puts"], health["free_blocks"]) == ("healthy", 1, 14)
    connector.close()
    assert connector.health()["status"] == "closed"


def test_the_plugin_makes_it_known_by_its_name_and_may_run_twice() -> None:
    register()
    register()
    assert NAME in OmniConnectorFactory.list_registered_connectors()
