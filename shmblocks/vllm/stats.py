"""The counts of a connector as vLLM's statistics, log line and Prometheus metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorWorkerMetadata
from vllm.distributed.ec_transfer.ec_connector.metrics import (
    ECConnectorPromMetrics,
    ECConnectorStats,
)

from shmblocks.vllm.tally import COUNTS, add_up

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PREFIX = "vllm:ec_shmblocks_"


class ShmBlocksStats(ECConnectorStats):
    """Counts by name (`tally.COUNTS`), of one side or of several."""

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data=dict(data or {}))

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: ECConnectorStats) -> ShmBlocksStats:
        add_up(self.data, other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        """For the log line: the counts, and what follows from them."""
        counts = self.data
        found: dict[str, int | float] = {
            name: round(counts[name], 3) if name.endswith("_seconds") else int(counts[name])
            for name in COUNTS
            if counts.get(name)
        }
        lookups = counts.get("hits", 0) + counts.get("misses", 0)
        if lookups:
            found["hit_rate"] = round(counts.get("hits", 0) / lookups, 3)
        return found

    def is_empty(self) -> bool:
        return not self.data


class ShmBlocksWorkerCounts(ECConnectorWorkerMetadata):
    """A worker's counts on their way to the scheduler: nothing but statistics depends on them."""

    def __init__(self, counts: dict[str, float]) -> None:
        self.counts = counts

    def aggregate(self, other: ECConnectorWorkerMetadata) -> ECConnectorWorkerMetadata:
        if isinstance(other, ShmBlocksWorkerCounts):
            add_up(self.counts, other.counts)
        return self


class ShmBlocksPromMetrics(ECConnectorPromMetrics):
    """One counter for each name of `tally.COUNTS`."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type, type],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {name: self._counters_of(name, labelnames) for name in COUNTS}

    def _counters_of(self, name: str, labelnames: list[str]) -> dict[int, Any]:
        counter = self._counter_cls(
            name=f"{PREFIX}{name}", documentation=COUNTS[name], labelnames=labelnames
        )
        return {
            engine: counter.labels(*values)
            for engine, values in self.per_engine_labelvalues.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, amount in transfer_stats_data.items():
            if name in self._counters:
                self._counters[name][engine_idx].inc(amount)
