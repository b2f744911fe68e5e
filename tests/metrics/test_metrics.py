"""What Prometheus is told of this node's pools."""

from __future__ import annotations

import re
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest

from shmblocks import BlockPool
from shmblocks._os.segment import path_of
from shmblocks._state.layout import H_VERSION, WORD
from shmblocks.metrics import (
    Metric,
    MetricsServer,
    PoolCollector,
    metric_names,
    metrics_text,
    read_metrics,
)
from tests.core.pools import abandon, create, take
from tests.support.children import Channel, fork
from tests.support.naming import worker_prefix

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pool(pool_name: str) -> Iterator[BlockPool]:
    """In which something has happened."""
    with create(pool_name) as pool:
        handle = pool.publish(take(pool, 1, "request-that-is-no-label"), readers=2)
        pool.open(handle).release()
        yield pool


def values(names: Sequence[str]) -> dict[str, float]:
    """`name{label=value,...}` -> value."""
    return {
        metric.name
        + sample.suffix
        + "{"
        + ",".join(f"{name}={value}" for name, value in sample.labels.items())
        + "}": sample.value
        for metric in read_metrics(names)
        for sample in metric.samples
    }


def state_of(name: str) -> str:
    (state,) = (
        sample.labels["state"]
        for metric in read_metrics([name])
        for sample in metric.samples
        if metric.name == "shmblocks_pool_state" and sample.value
    )
    return state


def test_gauges_and_counters_say_what_stats_say(pool: BlockPool) -> None:
    stats = pool.stats()
    found = values([pool.name])
    labels = f"{{pool={pool.name},device=cpu}}"
    assert found[f"shmblocks_pool_bytes{labels}"] == stats.total_blocks * stats.block_bytes
    assert found[f"shmblocks_pool_free_bytes{labels}"] == stats.free_blocks * stats.block_bytes
    assert found[f"shmblocks_pool_participants{labels}"] == 1
    assert found[f"shmblocks_pool_allocations{labels}"] == 1
    assert found[f"shmblocks_allocs_total{labels}"] == 1
    assert found[f"shmblocks_opens_total{labels}"] == 1
    assert found[f"shmblocks_publish_to_open_seconds_count{labels}"] == 1
    assert found[f"shmblocks_pool_memory_bytes{{pool={pool.name}}}"] == stats.size_bytes


def test_the_buckets_of_a_histogram_add_up_to_its_count(pool: BlockPool) -> None:
    (metric,) = (
        each
        for each in read_metrics([pool.name])
        if each.name == "shmblocks_publish_to_open_seconds"
    )
    buckets = [sample for sample in metric.samples if sample.suffix == "_bucket"]
    counts = [sample.value for sample in buckets]
    bounds = [float(sample.labels["le"]) for sample in buckets]
    assert counts == sorted(counts)
    assert bounds == sorted(bounds)
    assert buckets[-1].labels["le"] == "+Inf"
    assert counts[-1] == 1


def test_all_pools_of_the_node_are_there_without_names(pool: BlockPool) -> None:
    with create(f"{pool.name}-other") as other:
        text = metrics_text(read_metrics())
        for name in (pool.name, other.name):
            assert f'shmblocks_allocs_total{{pool="{name}",device="cpu"}}' in text


def test_neither_request_ids_nor_keys_are_labels(pool: BlockPool) -> None:
    assert "request-that-is-no-label" not in metrics_text(read_metrics([pool.name]))
    labels = {
        name
        for metric in read_metrics([pool.name])
        for sample in metric.samples
        for name in sample.labels
    }
    assert labels == {"pool", "device", "state", "le"}


def test_reading_is_no_participation(pool: BlockPool) -> None:
    read_metrics([pool.name])
    assert len(pool.participants()) == 1
    pool.close()
    assert state_of(pool.name) == "absent"


def test_a_pool_whose_processes_are_dead_is_dead(pool: BlockPool) -> None:
    assert state_of(pool.name) == "alive"
    name = pool.name
    abandon(pool)
    try:
        assert state_of(name) == "dead"
        assert values([name])[f"shmblocks_allocs_total{{pool={name},device=cpu}}"] == 1
    finally:
        Path(path_of(name)).unlink()


def test_a_pool_of_another_version_is_incompatible(pool: BlockPool) -> None:
    words = pool.state.segment.words
    version = words[H_VERSION]
    words[H_VERSION] = 99
    try:
        assert state_of(pool.name) == "incompatible"
    finally:
        words[H_VERSION] = version
    assert WORD == 8


def hold_the_lock(channel: Channel, name: str) -> None:
    """As one does that was stopped in the middle of an operation."""
    pool = BlockPool.attach(name, prefault="off")
    assert pool.state.mutex.try_file()
    channel.say("locked")
    channel.receive(timeout=600.0)


def test_a_lock_that_a_stopped_process_holds_is_reported_and_stops_nobody(pool: BlockPool) -> None:
    with create(f"{pool.name}-other") as other, fork(hold_the_lock, pool.name) as child:
        child.hear("locked")
        names = [pool.name, other.name]
        found = values(names)
        assert found[f"shmblocks_pool_state{{pool={pool.name},state=locked}}"] == 1
        assert found[f"shmblocks_pool_memory_bytes{{pool={pool.name}}}"] > 0
        assert f"shmblocks_allocs_total{{pool={pool.name},device=cpu}}" not in found
        assert f"shmblocks_allocs_total{{pool={other.name},device=cpu}}" in found
        child.kill()
    assert state_of(pool.name) == "alive"


def test_the_text_is_what_the_parser_of_prometheus_reads(pool: BlockPool) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    metrics = read_metrics([pool.name])
    families = {
        each.name: each for each in parser.text_string_to_metric_families(metrics_text(metrics))
    }
    for metric in metrics:
        family = families[metric.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        read = {(each.name, *each.labels.items()): each.value for each in family.samples}
        assert read == {
            (metric.name + sample.suffix, *sample.labels.items()): sample.value
            for sample in metric.samples
        }


def test_without_pools_there_is_no_text() -> None:
    assert metrics_text(read_metrics([])) == ""
    assert {metric.name for metric in read_metrics([])} == metric_names()


# ---- prometheus_client -------------------------------------------------------------------------


def test_a_registry_gives_what_the_text_gives(pool: BlockPool) -> None:
    client = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry()
    collector = PoolCollector([pool.name], registry=registry)
    theirs = client.generate_latest(registry).decode().replace(".0\n", "\n")
    ours = metrics_text(read_metrics([pool.name]))

    def samples(text: str) -> set[str]:
        lines = (line for line in text.splitlines() if not line.startswith("#"))
        # Each read of a pool is a section under its lock, of which one in 64 is timed.
        return {sort_labels(line) for line in lines if "lock_held" not in line}

    assert {each.partition(" ")[0] for each in samples(theirs)} == {
        each.partition(" ")[0] for each in samples(ours)
    }
    collector.unregister()
    assert client.generate_latest(registry) == b""


def sort_labels(line: str) -> str:
    name, _, rest = line.partition("{")
    labels, _, value = rest.partition("} ")
    return f"{name}{{{','.join(sorted(labels.split(',')))}}} {value}"


class FakeMetric:
    """As prometheus_client's: a name without `_total`, and samples with it."""

    def __init__(self, name: str, documentation: str, kind: str) -> None:
        self.name, self.documentation, self.kind = name, documentation, kind
        self.samples: list[tuple[str, dict[str, str], float]] = []

    def add_sample(self, name: str, labels: dict[str, str], value: float) -> None:
        self.samples.append((name, labels, value))


class FakeRegistry:
    def __init__(self) -> None:
        self.collectors: list[PoolCollector] = []

    def register(self, collector: PoolCollector) -> None:
        self.collectors.append(collector)

    def unregister(self, collector: PoolCollector) -> None:
        self.collectors.remove(collector)


def test_the_default_registry_is_taken_when_none_is_given(
    pool: BlockPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = FakeRegistry()
    client, core = ModuleType("prometheus_client"), ModuleType("prometheus_client.core")
    monkeypatch.setattr(client, "REGISTRY", registry, raising=False)
    monkeypatch.setattr(core, "Metric", FakeMetric, raising=False)
    monkeypatch.setitem(sys.modules, "prometheus_client", client)
    monkeypatch.setitem(sys.modules, "prometheus_client.core", core)
    collector = PoolCollector([pool.name])
    assert registry.collectors == [collector]
    described = {each.name: each for each in collector.describe()}
    assert set(described) == {name.removesuffix("_total") for name in metric_names()}
    collected = {each.name: each for each in collector.collect()}
    assert described.keys() == collected.keys()
    samples = [tuple(each) for each in collected["shmblocks_allocs"].samples]
    labels = {"pool": pool.name, "device": "cpu"}
    assert samples == [("shmblocks_allocs_total", labels, 1.0)]
    collector.unregister()
    assert registry.collectors == []


# ---- serving -----------------------------------------------------------------------------------


@pytest.fixture
def server(pool: BlockPool) -> Iterator[MetricsServer]:
    with MetricsServer(0, names=[pool.name]) as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        yield server
        server.shut_down()
        thread.join()


def test_metrics_are_served(pool: BlockPool, server: MetricsServer) -> None:
    with urllib.request.urlopen(server.url, timeout=30) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert f'shmblocks_allocs_total{{pool="{pool.name}"' in answer.read().decode()


def test_another_path_is_not_found(server: MetricsServer) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404") as caught:
        urllib.request.urlopen(server.url + "/other", timeout=30)
    caught.value.close()


# ---- documents ---------------------------------------------------------------------------------


def test_the_page_lists_every_metric_and_no_other() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    named = set(re.findall(r"`(shmblocks_[a-z_]+)[`{]", text))
    assert named == metric_names()


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    text = (ROOT / "docs" / "grafana.json").read_text()
    asked = {base_name(name) for name in re.findall(r"shmblocks_[a-z_]+", text)}
    assert asked <= metric_names(), "a panel would stay empty"
    assert len(asked) >= 15


def base_name(name: str) -> str:
    for kind in ("_bucket", "_sum", "_count"):
        if name.removesuffix(kind) in metric_names():
            return name.removesuffix(kind)
    return name


def test_names_are_as_prometheus_wants_them() -> None:
    kinds: dict[str, Metric] = {metric.name: metric for metric in read_metrics([])}
    for name, metric in kinds.items():
        assert re.fullmatch(r"shmblocks_[a-z]+(_[a-z]+)*", name)
        assert name.endswith("_total") == (metric.kind == "counter")
        assert metric.help.endswith(".")
    assert worker_prefix() not in kinds
