"""A small model of vLLM's engine: the hooks in their order, and an encoder cache that is too small.

`Engine.step` is one step: the scheduler's pass over the waiting requests, then the workers. Its
encoder makes rows that follow from the identifier, so that a wrong item shows.
"""

from __future__ import annotations

import hashlib
import pickle
from collections import OrderedDict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole

from shmblocks import BlockPool
from shmblocks.vllm.connector import ShmBlocksECConnector
from shmblocks.vllm.scheduler import SchedulerSide
from shmblocks.vllm.tally import add_up
from shmblocks.vllm.worker import WorkerSide
from tests.vllm import stub
from tests.vllm.requests import BLOCK, ROWS, WIDTH, Request


def encoded(identifier: str, rows: int = ROWS, weights: int = 0) -> torch.Tensor:
    """What the encoder makes of it."""
    seed = int.from_bytes(hashlib.sha256(f"{identifier}{weights}".encode()).digest()[:4], "little")
    return torch.arange(rows * WIDTH, dtype=torch.float32).view(rows, WIDTH) + seed % 10_007


def vllm_config(role: str, extra: dict[str, object], *, ranks: int = 1, **more: object) -> Any:  # noqa: ANN401
    """As much of vLLM's config as the connector asks for; `more` replaces parts of it."""
    transfer = SimpleNamespace(
        ec_role=role,
        engine_id="engine",
        ec_connector_extra_config=extra,
        is_ec_producer=role in ("ec_producer", "ec_both"),
        is_ec_consumer=role in ("ec_consumer", "ec_both"),
    )
    vision = SimpleNamespace(to_dict=lambda: {"depth": 2})
    model = SimpleNamespace(
        model="tiny",
        revision=None,
        dtype=torch.float32,
        quantization=None,
        hf_config=SimpleNamespace(vision_config=vision),
        multimodal_config=SimpleNamespace(mm_processor_cache_gb=more.get("processor_cache_gb", 4)),
        get_inputs_embeds_size=lambda: WIDTH,
    )
    return SimpleNamespace(
        ec_transfer_config=transfer,
        model_config=model,
        cache_config=SimpleNamespace(enable_prefix_caching=more.get("prefix_caching", True)),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=ranks,
            prefill_context_parallel_size=1,
            nnodes=more.get("nnodes", 1),
        ),
    )


def new_scheduler(config: Any) -> ShmBlocksECConnector:  # noqa: ANN401
    """An instance's connector in its scheduler's process."""
    return ShmBlocksECConnector(config, ECConnectorRole.SCHEDULER)


def extra(pool: str, blocks: int = 16, **more: object) -> dict[str, object]:
    return {"pool": pool, "pool_bytes": blocks * BLOCK, "block_bytes": BLOCK, **more}


class Engine:
    """An instance: a scheduler, its workers, and their encoder caches."""

    def __init__(
        self,
        pool: str,
        role: str = "ec_both",
        *,
        ranks: int = 1,
        room: int = 8,
        weights: int = 0,
        compute: str = "cpu",
        **more: object,
    ) -> None:
        """`room`: items that the engine's own encoder cache holds. `compute`: its device."""
        config = vllm_config(role, extra(pool) | more, ranks=ranks)
        # The workers first, as in vLLM: in GPU memory they make the pool.
        self.workers = []
        for rank in range(ranks):
            stub.Ranks.rank = rank
            self.workers.append(ShmBlocksECConnector(config, ECConnectorRole.WORKER))
        stub.Ranks.rank = 0
        self.scheduler = new_scheduler(config)
        self.caches: list[dict[str, torch.Tensor]] = [{} for _ in range(ranks)]
        self.weights = weights
        self.compute = compute
        self.encodes_only = role == "ec_producer"
        self.encoded: list[str] = []
        self._room = room
        # What the scheduler believes to be in the workers' caches, the oldest first.
        self._cached: OrderedDict[str, None] = OrderedDict()

    @property
    def side(self) -> SchedulerSide:
        assert self.scheduler.scheduler is not None
        return self.scheduler.scheduler

    @property
    def pool(self) -> BlockPool:
        return self.side._pool

    def worker_side(self, rank: int = 0) -> WorkerSide:
        side = self.workers[rank].worker
        assert side is not None
        return side

    def counts(self) -> dict[str, int]:
        """Of all sides, but for seconds."""
        totals: dict[str, float] = {}
        workers = [self.worker_side(rank).tally for rank in range(len(self.workers))]
        for tally in (self.side.tally, *workers):
            add_up(totals, tally.totals)
        return {name: int(each) for name, each in totals.items() if not name.endswith("_seconds")}

    # ---- a step --------------------------------------------------------------------------------

    def schedule(self, requests: Sequence[Request]) -> tuple[list[Request], list[str], Any]:
        """One pass: which requests are scheduled, what is to be encoded, and the metadata."""
        scheduled, to_encode, freed = [], [], list[str]()
        in_use = {feature.identifier for each in requests for feature in each.mm_features}
        for request in requests:
            if not self.scheduler.ensure_cache_available(request, 0):  # type: ignore[arg-type]
                continue
            for index, feature in enumerate(request.mm_features):
                identifier = feature.identifier
                if identifier in self._cached:
                    self._cached.move_to_end(identifier)
                    continue
                freed += self._make_room(in_use)
                is_there = self.scheduler.has_cache_item(identifier)
                self._cached[identifier] = None
                self.scheduler.update_state_after_alloc(request, index)  # type: ignore[arg-type]
                if not is_there:
                    assert feature.data["pixel_values"].data is not None, "the engine is dead"
                    to_encode.append(identifier)
            scheduled.append(request)
        output: Any = SimpleNamespace(
            free_encoder_mm_hashes=[name for name in freed if name not in self._cached]
        )
        return scheduled, to_encode, (output, self.scheduler.build_connector_meta(output))

    def _make_room(self, in_use: set[str]) -> list[str]:
        freed = []
        for identifier in list(self._cached):
            if len(self._cached) < self._room:
                break
            if identifier not in in_use:
                del self._cached[identifier]
                freed.append(identifier)
        return freed

    def work(
        self,
        scheduled: Sequence[Request],
        to_encode: Sequence[str],
        passed: Any,  # noqa: ANN401
    ) -> dict[str, list[torch.Tensor]]:
        """The workers' part; what each request gathered, compared on all ranks."""
        output, metadata = passed
        rows = {f.identifier: f.mm_position.length for each in scheduled for f in each.mm_features}
        for worker, cache in zip(self.workers, self.caches, strict=True):
            for identifier in output.free_encoder_mm_hashes:
                cache.pop(identifier, None)
            worker.bind_connector_metadata(pickle.loads(pickle.dumps(metadata)))
            if worker.is_producer:
                worker.start_save_caches(encoder_cache=cache)
            if worker.is_consumer:
                worker.start_load_caches(cache)
            try:
                for identifier in to_encode:
                    cache[identifier] = self.encode(identifier, rows[identifier])
                    worker.save_caches(encoder_cache=cache, mm_hash=identifier)
            finally:
                assert worker.get_finished(set()) == (None, None)
                counts = worker.build_connector_worker_meta()
                worker.clear_connector_metadata()
            told: Any = SimpleNamespace(ec_connector_worker_meta=counts)
            self.scheduler.update_connector_output(told)
        self.encoded += to_encode
        if self.encodes_only:
            return {}
        return {each.request_id: self._gathered(each) for each in scheduled}

    def encode(self, identifier: str, rows: int) -> torch.Tensor:
        """Its encoder."""
        return encoded(identifier, rows, self.weights).to(self.compute)

    def _gathered(self, request: Request) -> list[torch.Tensor]:
        found = []
        for feature in request.mm_features:
            items = [cache[feature.identifier] for cache in self.caches]  # KeyError: engine dead
            assert all(torch.equal(items[0], item) for item in items)
            found.append(items[0])
        return found

    def finish(self, request: Request) -> dict[str, Any] | None:
        """The request is over; what its client is told of its items."""
        is_delayed, told = self.scheduler.request_finished(request)  # type: ignore[arg-type]
        assert is_delayed is False
        return told

    def step(self, *requests: Request) -> set[str]:
        """Schedule and run them, compare what they got, and finish them; who was scheduled."""
        scheduled, to_encode, passed = self.schedule(requests)
        gathered = self.work(scheduled, to_encode, passed)
        for request in scheduled:
            for feature, item in zip(
                request.mm_features, gathered.get(request.request_id, ()), strict=False
            ):
                rows = feature.mm_position.length
                assert torch.equal(item, self.encode(feature.identifier, rows))
            self.finish(request)
        return {request.request_id for request in scheduled}

    def close(self) -> None:
        for connector in (self.scheduler, *self.workers):
            connector.shutdown()
        for cache in self.caches:
            cache.clear()  # in place it is the pool's memory
