"""Metrics of the pools of this node, in the words of Prometheus.

    read_metrics(names)      samples of all pools, or of those; text with `metrics_text`
    PoolCollector()          the same for a registry of prometheus_client (`shmblocks[metrics]`)
    MetricsServer(port)      serves the text at /metrics; `shmblocks metrics`

Contract
- Reading is no participation: it keeps no pool alive, and shows dead pools too.
- Reading is bounded: it waits for the lock of each pool `lock_timeout` seconds at most. A pool
  whose lock a stopped process holds is reported in the state `locked`, with its size only.
- Counters and histograms lie in the segment. They count all processes, also those that were killed,
  and start at 0 with each new pool. One scrape for each node is enough.
- Labels are the pool, its device, and a few fixed words. Keys and request ids are never labels.

What it does not do: read queues, or work in prometheus_client's multiprocess mode (in which no
collector of a registry is asked; scrape `shmblocks metrics` beside the server instead).
"""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import msgspec

from shmblocks._os.segment import normal_name
from shmblocks._state.info import CounterValues, HistogramValues, PoolStats, PoolSummary
from shmblocks.inspector import list_pools, summary_of

if TYPE_CHECKING:
    from prometheus_client.core import Metric as ClientMetric
    from prometheus_client.registry import CollectorRegistry

# Seconds that a read waits for the lock of each pool. Smaller: a pool in heavy use is missing now
# and then. Larger: each stopped process that holds a lock delays the read.
LOCK_TIMEOUT = 0.25
# A port that exporters use by convention, and that no other one has.
PORT = 9464
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Kind = Literal["gauge", "counter", "histogram"]
STATES = ("alive", "dead", "locked", "incompatible", "absent")
_USED = ("reserved", "published", "leased", "draining", "settling")


class Sample(msgspec.Struct, frozen=True):
    """One value. `suffix` stands behind the name of its metric."""

    suffix: str
    labels: dict[str, str]
    value: float


class Metric(msgspec.Struct, frozen=True):
    """One metric and its samples over all pools.

    `name` is as in the text, for a counter with `_total`.
    """

    name: str
    kind: Kind
    help: str
    samples: list[Sample]


_GAUGES = {
    "shmblocks_pool_state": (
        "1 for the state that the pool is in: alive, dead (all its processes died), locked (a "
        "stopped process holds its lock), incompatible (another version, or damaged), absent."
    ),
    "shmblocks_pool_memory_bytes": "Memory of the pool, with what a CUDA pool has on its GPU.",
    "shmblocks_pool_bytes": "Size of all blocks.",
    "shmblocks_pool_free_bytes": "Size of the free blocks.",
    "shmblocks_pool_used_bytes": "Size of the blocks in each other state.",
    "shmblocks_pool_largest_free_run_bytes": "Size of the most free blocks in a row.",
    "shmblocks_pool_allocations": "Allocations that there are.",
    "shmblocks_pool_leases": "Leases that are open.",
    "shmblocks_pool_participants": "Living processes that are attached.",
    "shmblocks_pool_dead_participants": "Dead processes that were not reaped yet.",
    "shmblocks_pool_waiters": "Threads and coroutines that wait for blocks.",
    "shmblocks_cache_entries": "Entries of the content cache.",
    "shmblocks_cache_bytes": "Size of the blocks of all entries.",
    "shmblocks_cache_pinned_bytes": "Size of the blocks of entries that cannot be evicted now.",
    "shmblocks_node_peers": "Readers on other nodes that are connected to the pool's servers.",
}
# Name -> (attribute of CounterValues, help).
_COUNTERS = {
    "shmblocks_allocs_total": ("allocations", "Allocations that were served."),
    "shmblocks_publishes_total": ("publishes", "Allocations that were published."),
    "shmblocks_opens_total": ("opens", "Leases that were opened for reading by handle."),
    "shmblocks_releases_total": ("releases", "Leases that their holders ended."),
    "shmblocks_reaped_blocks_total": (
        "reaped_blocks",
        "Blocks that were taken back from the dead, or that nobody claimed in time.",
    ),
    "shmblocks_alloc_timeouts_total": ("alloc_timeouts", "Waits for blocks that ended without."),
    "shmblocks_lock_takeovers_total": (
        "lock_takeovers",
        "Changes that a process left half made (it died) and another one completed.",
    ),
    "shmblocks_cache_queries_total": ("lookups", "Lookups of a key."),
    "shmblocks_cache_hits_total": ("hits", "Lookups that got a lease."),
    "shmblocks_cache_misses_total": ("misses", "Lookups whose key had no complete entry."),
    "shmblocks_cache_mismatches_total": (
        "mismatches",
        "Lookups whose entry had another number of tokens, dtype or shape.",
    ),
    "shmblocks_cache_puts_total": ("puts", "Entries that were made."),
    "shmblocks_cache_duplicate_puts_total": ("duplicates", "Puts of a key that was there."),
    "shmblocks_cache_evictions_total": ("evictions", "Entries that went for want of room."),
    "shmblocks_cache_evicted_bytes_total": ("evicted_blocks", "Size of their blocks."),
    "shmblocks_cache_skipped_saves_total": ("skipped", "Puts for which there was no room."),
    "shmblocks_cache_claim_takeovers_total": (
        "takeovers",
        "Claims of the dead that another process took over.",
    ),
    "shmblocks_cache_pending_waits_total": ("waits", "Waits for an entry that another one makes."),
    "shmblocks_node_reads_total": ("node_reads", "Fetches of other nodes, confirmed by them."),
    "shmblocks_node_sent_bytes_total": ("node_sent_bytes", "Size of what they fetched."),
    "shmblocks_node_given_back_total": (
        "node_given_back",
        "Fetches of other nodes that were not confirmed; to be fetched again.",
    ),
    "shmblocks_node_refusals_total": (
        "node_refusals",
        "Fetches of other nodes that were answered with an error.",
    ),
    "shmblocks_node_turned_away_total": (
        "node_turned_away",
        "Connections that did not prove the key, or were too many.",
    ),
    "shmblocks_node_fetches_total": ("node_fetches", "Fetches from other nodes that succeeded."),
    "shmblocks_node_received_bytes_total": ("node_received_bytes", "Size of what was fetched."),
    "shmblocks_node_failures_total": ("node_failures", "Fetches from other nodes that failed."),
    "shmblocks_node_quarantined_blocks_total": (
        "node_quarantined",
        "Blocks kept apart after a fetch that failed, since bytes could still come (NIXL).",
    ),
}
_HISTOGRAMS = {
    "shmblocks_alloc_wait_seconds": (
        "alloc_wait",
        "From the call to the blocks, of those allocations that had to wait.",
    ),
    "shmblocks_publish_to_open_seconds": (
        "publish_to_open",
        "From the publication to the opening, for each lease.",
    ),
    "shmblocks_lock_held_seconds": (
        "lock_held",
        "How long the lock of the pool was held; one section in 64 is timed.",
    ),
}


def metric_names() -> set[str]:
    """The names of all metrics."""
    return {*_GAUGES, *_COUNTERS, *_HISTOGRAMS}


# ---- reading -----------------------------------------------------------------------------------


def read_metrics(
    names: Sequence[str] | None = None, *, lock_timeout: float = LOCK_TIMEOUT
) -> list[Metric]:
    """All metrics of the pools of those names, or of all pools of this node that can be read.

    A pool that cannot be read has its state and size only; one that is not there its state.
    `lock_timeout`: seconds to wait for the lock of each.
    """
    if names is None:
        pools = list_pools(lock_timeout)
    else:
        pools = [_named(name, lock_timeout) for name in dict.fromkeys(map(normal_name, names))]
    metrics = _empty()
    for pool in pools:
        _add_pool(metrics, pool)
    return list(metrics.values())


def _named(name: str, lock_timeout: float) -> PoolSummary:
    """A summary without size for a pool that is not there."""
    return summary_of(name, lock_timeout) or PoolSummary(name=name, size_bytes=0, state="dead")


def _empty() -> dict[str, Metric]:
    metrics = {name: Metric(name, "gauge", text, []) for name, text in _GAUGES.items()}
    for name, (_, text) in _COUNTERS.items():
        metrics[name] = Metric(name, "counter", text, [])
    for name, (_, text) in _HISTOGRAMS.items():
        metrics[name] = Metric(name, "histogram", text, [])
    return metrics


def _add_pool(metrics: dict[str, Metric], pool: PoolSummary) -> None:
    state = _state(pool)
    for each in STATES:
        labels = {"pool": pool.name, "state": each}
        _add(metrics["shmblocks_pool_state"], labels, each == state)
    stats = pool.stats
    memory = pool.size_bytes + (stats.device_bytes if stats else 0)
    _add(metrics["shmblocks_pool_memory_bytes"], {"pool": pool.name}, memory)
    if stats is None:
        return
    labels = {"pool": pool.name, "device": stats.device}
    for name, value in _gauges(stats).items():
        _add(metrics[name], labels, value)
    for used in _USED:
        size = getattr(stats, f"{used}_blocks") * stats.block_bytes
        _add(metrics["shmblocks_pool_used_bytes"], {**labels, "state": used}, size)
    _add_counters(metrics, labels, stats.counters, stats.block_bytes)


def _state(pool: PoolSummary) -> str:
    if pool.stats is not None or pool.state == "incompatible":
        return pool.state
    return "locked" if pool.size_bytes else "absent"


def _gauges(stats: PoolStats) -> dict[str, float]:
    block = stats.block_bytes
    return {
        "shmblocks_pool_bytes": stats.total_blocks * block,
        "shmblocks_pool_free_bytes": stats.free_blocks * block,
        "shmblocks_pool_largest_free_run_bytes": stats.largest_free_run * block,
        "shmblocks_pool_allocations": stats.allocations,
        "shmblocks_pool_leases": stats.leases,
        "shmblocks_pool_participants": stats.participants,
        "shmblocks_pool_dead_participants": stats.dead_participants,
        "shmblocks_pool_waiters": stats.waiters,
        "shmblocks_cache_entries": stats.entries,
        "shmblocks_cache_bytes": stats.entry_blocks * block,
        "shmblocks_cache_pinned_bytes": stats.pinned_entry_blocks * block,
        "shmblocks_node_peers": stats.node_peers,
    }


def _add_counters(
    metrics: dict[str, Metric], labels: dict[str, str], counters: CounterValues, block_bytes: int
) -> None:
    for name, (attribute, _) in _COUNTERS.items():
        unit = block_bytes if attribute == "evicted_blocks" else 1
        _add(metrics[name], labels, getattr(counters, attribute) * unit)
    for name, (attribute, _) in _HISTOGRAMS.items():
        histogram: HistogramValues = getattr(counters, attribute)
        for bound, count in _cumulative(histogram):
            _add(metrics[name], {**labels, "le": bound}, count, "_bucket")
        _add(metrics[name], labels, histogram.sum_seconds, "_sum")
        _add(metrics[name], labels, histogram.count, "_count")


def _add(metric: Metric, labels: dict[str, str], value: float, suffix: str = "") -> None:
    metric.samples.append(Sample(suffix, labels, float(value)))


def _cumulative(histogram: HistogramValues) -> Iterator[tuple[str, int]]:
    """(upper bound in seconds, how many took less) of each bucket; the last bound is `+Inf`."""
    total = 0
    for number, count in enumerate(histogram.buckets):
        total += count
        is_last = number == len(histogram.buckets) - 1
        yield "+Inf" if is_last else repr(2**number / 1e6), total


# ---- the text ----------------------------------------------------------------------------------


def metrics_text(metrics: Iterable[Metric]) -> str:
    """In the text format of Prometheus, version 0.0.4."""
    return "".join(f"{text}\n" for metric in metrics for text in _lines(metric))


def _lines(metric: Metric) -> Iterator[str]:
    if not metric.samples:
        return
    yield f"# HELP {metric.name} {metric.help}"
    yield f"# TYPE {metric.name} {metric.kind}"
    for sample in metric.samples:
        # (The name of a pool has no letter that would have to be escaped.)
        labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
        yield f"{metric.name}{sample.suffix}{{{labels}}} {_number(sample.value)}"


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)


# ---- prometheus_client -------------------------------------------------------------------------


class PoolCollector:
    """Gives a registry of prometheus_client the metrics of this node's pools at each scrape.

        PoolCollector()                          # in the default registry

    One for each node: it counts for all processes. It is not asked in multiprocess mode.
    """

    def __init__(
        self,
        names: Sequence[str] | None = None,
        *,
        registry: CollectorRegistry | None = None,
        lock_timeout: float = LOCK_TIMEOUT,
    ) -> None:
        """As `read_metrics`; `registry`: prometheus_client's default one if None.

        Raises `ImportError` where prometheus_client is not installed (`shmblocks[metrics]`).
        """
        from prometheus_client import REGISTRY

        self._names = None if names is None else [normal_name(name) for name in names]
        self._lock_timeout = lock_timeout
        self._registry = REGISTRY if registry is None else registry
        self._registry.register(self)

    def describe(self) -> Iterable[ClientMetric]:
        """What there will be, for the registry; reads no pool."""
        return map(_client_metric, _empty().values())

    def collect(self) -> Iterable[ClientMetric]:
        """All of it now."""
        return map(_client_metric, read_metrics(self._names, lock_timeout=self._lock_timeout))

    def unregister(self) -> None:
        """Take it out of its registry."""
        self._registry.unregister(self)


def _client_metric(metric: Metric) -> ClientMetric:
    from prometheus_client.core import Metric as ClientMetric

    # The client adds the suffix of counters itself.
    found = ClientMetric(metric.name.removesuffix("_total"), metric.help, metric.kind)
    for sample in metric.samples:
        found.add_sample(metric.name + sample.suffix, sample.labels, sample.value)
    return found


# ---- serving -----------------------------------------------------------------------------------


class MetricsServer:
    """Serves the metrics over HTTP at /metrics until it is closed. Owns its socket.

    One read at a time: a second request waits for the first. Whoever can reach the port can read.
    """

    def __init__(
        self,
        port: int = PORT,
        host: str = "127.0.0.1",
        *,
        names: Sequence[str] | None = None,
        lock_timeout: float = LOCK_TIMEOUT,
    ) -> None:
        """Listen; port 0: any that is free. Raises `OSError` when the port is taken."""
        self._host = host
        reading = threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            # Seconds after which a client that says nothing is dropped.
            timeout = 10

            def do_GET(self) -> None:
                if self.path.partition("?")[0] not in ("/", "/metrics"):
                    self.send_error(404, "expected /metrics")
                    return
                with reading:
                    metrics = read_metrics(names, lock_timeout=lock_timeout)
                body = metrics_text(metrics).encode()
                with contextlib.suppress(ConnectionError):  # the client has gone away
                    self.send_response(200)
                    self.send_header("Content-Type", CONTENT_TYPE)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Scrapes are not logged."""

        self._server = http.server.ThreadingHTTPServer((host, port), Handler)
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        """Where it is served."""
        return f"http://{self._host}:{self._server.server_port}/metrics"

    def serve(self) -> None:
        """Serve in this thread until an exception (KeyboardInterrupt) or `shut_down`."""
        self._server.serve_forever()

    def shut_down(self) -> None:
        """End `serve` of another thread."""
        self._server.shutdown()

    def close(self) -> None:
        """Close the socket."""
        self._server.server_close()

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
