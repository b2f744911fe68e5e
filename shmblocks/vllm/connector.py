"""`ShmBlocksECConnector`: vLLM's encoder cache connector, over a pool of the node.

vLLM makes two of them in each instance, one in the scheduler's process and one in each worker. This
file has vLLM's hooks and nothing else; what they do stands in `scheduler.py` and `worker.py`.

Contract
- No hook of the scheduler raises or waits: an exception there would stop the engine.
- What is wrong with the configuration or the machine is an error when the connector is made.
- `request_finished` never asks vLLM to delay: nothing here depends on a message of a worker.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import vllm
from vllm.distributed.ec_transfer.ec_connector.base import (
    ECConnectorBase,
    ECConnectorMetadata,
    ECConnectorRole,
)
from vllm.distributed.ec_transfer.ec_connector.utils import (
    PlaceholderMetadataResolver,
    collect_ec_item_metadata,
)

from shmblocks._words import bytes_text
from shmblocks.cache import TensorCache
from shmblocks.pool import BlockPool, Prefault
from shmblocks.vllm.config import ConnectorConfig
from shmblocks.vllm.copies import Copies, HostCopies
from shmblocks.vllm.identity import Identity, namespace_of, refuse_what_cannot_be_shared
from shmblocks.vllm.plan import StepPlan
from shmblocks.vllm.scheduler import SchedulerSide
from shmblocks.vllm.stats import ShmBlocksPromMetrics, ShmBlocksStats, ShmBlocksWorkerCounts
from shmblocks.vllm.tally import add_up
from shmblocks.vllm.worker import WorkerSide

if TYPE_CHECKING:
    import torch
    from vllm.config import ParallelConfig, VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ECConnectorOutput
    from vllm.v1.request import Request

    from shmblocks.vllm.fetching import Fetches

# Seconds that a scheduler waits for the pool in GPU memory, which a worker makes. Smaller: workers
# that start slowly are called missing. Larger: a failed start is told later.
CUDA_POOL_PATIENCE = 120.0

# vLLM shows what loggers below "vllm" say.
_log = logging.getLogger("vllm.ec.shmblocks")

F = TypeVar("F", bound=Callable[..., object])


def _never_raises(otherwise: Callable[[], object]) -> Callable[[F], F]:
    """A hook whose failure is a log line, and an answer under which the engine goes on."""

    def decorate(hook: F) -> F:
        @functools.wraps(hook)
        def guarded(*args: object, **kwargs: object) -> object:
            try:
                return hook(*args, **kwargs)
            except Exception:  # noqa: BLE001  whatever it is would stop the engine
                _log.exception("%s failed; the engine goes on without it", hook.__name__)
                return otherwise()

        return guarded  # type: ignore[return-value]

    return decorate


class ShmBlocksMetadata(ECConnectorMetadata):
    """A step's plan, as vLLM carries it."""

    def __init__(self, plan: StepPlan) -> None:
        self.plan = plan


class ShmBlocksECConnector(ECConnectorBase):
    """Shares encoder outputs among all instances of a node. Its settings: `ConnectorConfig`."""

    def __init__(self, vllm_config: VllmConfig, role: ECConnectorRole) -> None:
        super().__init__(vllm_config, role)
        transfer = vllm_config.ec_transfer_config
        if transfer is None:
            raise ValueError("ShmBlocksECConnector: expected an --ec-transfer-config")
        config = ConnectorConfig.of(transfer.ec_connector_extra_config)
        refuse_what_cannot_be_shared(vllm_config)
        self._resolver = PlaceholderMetadataResolver(vllm_config.model_config)
        self._worker_counts: dict[str, float] = {}
        self.scheduler: SchedulerSide | None = None
        self.worker: WorkerSide | None = None
        if role == ECConnectorRole.SCHEDULER:
            self.scheduler = self._scheduler_side(vllm_config, config)
        else:
            self.worker = _worker_side(vllm_config.parallel_config, transfer.ec_role, config)

    def _scheduler_side(self, vllm_config: VllmConfig, config: ConnectorConfig) -> SchedulerSide:
        namespace = namespace_of(vllm_config, vllm.__version__, config.namespace)
        identity = Identity(namespace, only_content_hashes=config.only_content_hashes)
        transfer = vllm_config.ec_transfer_config
        label = f"vllm {transfer.ec_role if transfer else ''} scheduler"
        key = config.nodes_key() if config.nodes else None  # what is wrong with it is told first
        pool = _open_pool(config, label, is_worker=False)
        _log.info(
            "pool %s of %s, %d participants; namespace %s of %s",
            pool.name,
            bytes_text(pool.stats().size_bytes),
            len(pool.participants()),
            identity.name,
            namespace.model,
        )
        cache = TensorCache(pool)
        return SchedulerSide(
            cache,
            identity,
            self._resolver.fields_for,
            is_producer=self.is_producer,
            is_consumer=self.is_consumer,
            ranks=_num_ranks(vllm_config.parallel_config),
            wait_seconds=config.wait_seconds,
            hold_seconds=config.hold_seconds,
            fetches=_fetches(cache, config, key) if config.nodes else None,
        )

    def shutdown(self) -> None:
        """Leave the pool; what this process holds of it comes back."""
        for side in (self.scheduler, self.worker):
            if side is not None:
                side.close()

    # ---- in a worker -----------------------------------------------------------------------------

    def _worker_and_plan(self) -> tuple[WorkerSide, StepPlan]:
        metadata = self._get_connector_metadata()
        if self.worker is None or not isinstance(metadata, ShmBlocksMetadata):
            raise RuntimeError(
                f"ShmBlocksECConnector: expected a worker's connector and its own metadata, got "
                f"{self.role} and {type(metadata).__name__}"
            )
        return self.worker, metadata.plan

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs: object) -> None:
        """Load what the scheduler has promised. Raises only when a promise is broken."""
        worker, plan = self._worker_and_plan()
        worker.load(plan, encoder_cache)

    def start_save_caches(self, **kwargs: object) -> None:
        """Publish what this engine has encoded before, and the pool has evicted since."""
        worker, plan = self._worker_and_plan()
        encoder_cache = cast("dict[str, torch.Tensor]", kwargs.get("encoder_cache", {}))
        worker.republish(plan, encoder_cache)
        if not self.is_consumer:
            # vLLM asks only consumers to load; what was not encoded here is to be here as well.
            worker.load(plan, encoder_cache)

    def save_caches(
        self,
        encoder_cache: dict[str, torch.Tensor],
        mm_hash: str,
        **kwargs: object,
    ) -> None:
        """Publish an item that was encoded in this step."""
        if self.is_producer:
            worker, plan = self._worker_and_plan()
            worker.save(plan, mm_hash, encoder_cache)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, None]:
        """The step is over: end the claims of what it did not save."""
        worker, plan = self._worker_and_plan()
        worker.finish(plan)
        return None, None

    def build_connector_worker_meta(self) -> ShmBlocksWorkerCounts | None:
        """The worker's counts, unless they went with `get_ec_connector_stats` (the V2 runner)."""
        counts = self.worker.tally.drain() if self.worker is not None else {}
        return ShmBlocksWorkerCounts(counts) if counts else None

    # ---- in the scheduler ------------------------------------------------------------------------

    def _scheduler(self) -> SchedulerSide:
        if self.scheduler is None:
            raise RuntimeError(f"ShmBlocksECConnector: a scheduler's hook in a {self.role}")
        return self.scheduler

    @_never_raises(lambda: True)
    def ensure_cache_available(self, request: Request, num_computed_tokens: int) -> bool:
        """False: another instance encodes it, so ask again; or the request is lost."""
        return self._scheduler().is_available(request, num_computed_tokens)

    @_never_raises(set[str])
    def take_unavailable_requests(self) -> set[str]:
        """Requests without media whose item is not to be had any more."""
        return self._scheduler().take_lost()

    @_never_raises(lambda: False)
    def has_cache_item(self, identifier: str) -> bool:
        """Whether the item is in the pool: a promise, which the workers will find kept."""
        return self._scheduler().has(identifier)

    @_never_raises(lambda: None)
    def update_state_after_alloc(self, request: Request, index: int) -> None:
        """The item is scheduled, to be loaded or to be encoded."""
        self._scheduler().after_alloc(request, index)

    @_never_raises(lambda: None)
    def update_state_after_free(self, request: Request, index: int) -> None:
        """The request is past that item."""
        self._scheduler().after_free(request, index)

    @_never_raises(lambda: ShmBlocksMetadata(StepPlan()))
    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> ShmBlocksMetadata:
        """The step's plan for the workers."""
        freed = scheduler_output.free_encoder_mm_hashes
        return ShmBlocksMetadata(self._scheduler().take_plan(freed))

    @_never_raises(lambda: None)
    def update_connector_output(self, connector_output: ECConnectorOutput) -> None:
        """Counts of workers, for the statistics."""
        counts = connector_output.ec_connector_worker_meta
        if isinstance(counts, ShmBlocksWorkerCounts):
            add_up(self._worker_counts, counts.counts)

    @_never_raises(lambda: (False, None))
    def request_finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        """What a client needs to ask for these items without sending the media; never a delay.

        An item that is not in the pool has empty metadata: then the media must be sent.
        """
        scheduler = self._scheduler()
        scheduler.finished(request)
        if not self.is_producer or not request.mm_features:
            return False, None
        items = collect_ec_item_metadata(request.mm_features, self._resolver)
        for identifier, item in items.items():
            if not scheduler.may_announce(identifier):
                item["metadata"] = {}
        return False, items or None

    # ---- statistics ------------------------------------------------------------------------------

    @_never_raises(lambda: None)
    def get_ec_connector_stats(self) -> ShmBlocksStats | None:
        """What was counted since the last call, on either side."""
        side = self.scheduler or self.worker
        counts = side.tally.drain() if side is not None else {}
        workers, self._worker_counts = self._worker_counts, {}
        add_up(counts, workers)
        return ShmBlocksStats(counts) if counts else None

    @classmethod
    def build_ec_connector_stats(cls, data: dict[str, Any] | None = None) -> ShmBlocksStats:
        """The statistics that crossed to another process as `data`."""
        return ShmBlocksStats(data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type, type],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> ShmBlocksPromMetrics:
        """Counters for `/metrics`."""
        return ShmBlocksPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def _open_pool(config: ConnectorConfig, label: str, *, is_worker: bool) -> BlockPool:
    """The pool of the node, made if need be; in the scheduler without a thread that maps pages."""
    prefault: Prefault = "background" if is_worker else "off"
    wanted = config.pool_config()
    if wanted.is_on_gpu and not is_worker:
        # Only a process that uses the GPU can make it.
        return BlockPool.attach(
            config.pool, timeout=CUDA_POOL_PATIENCE, role=label, prefault=prefault
        )
    return BlockPool.ensure(config.pool, wanted, role=label, prefault=prefault)


def _fetches(cache: TensorCache, config: ConnectorConfig, key: bytes | None) -> Fetches:
    # Here: who has one node needs no network.
    from shmblocks.nodes import Nodes
    from shmblocks.nodes.nodes import KEY_TIMEOUT
    from shmblocks.vllm.fetching import CONNECTIONS, Fetches

    _log.info("what is not in the pool is asked of %s", ", ".join(config.nodes))
    nodes = Nodes(cache.pool, config.nodes, key=key, connections=CONNECTIONS)
    return Fetches(cache, nodes, timeout=min(KEY_TIMEOUT, config.wait_seconds))


def _num_ranks(parallel: ParallelConfig) -> int:
    return parallel.tensor_parallel_size * getattr(parallel, "prefill_context_parallel_size", 1)


def _worker_side(
    parallel: ParallelConfig, ec_role: str | None, config: ConnectorConfig
) -> WorkerSide:
    from vllm.distributed.parallel_state import get_pcp_group, get_tensor_model_parallel_rank
    from vllm.platforms import current_platform

    is_cuda = current_platform.is_cuda_alike()
    if config.in_place and is_cuda:
        raise ValueError(
            "ec_connector_extra_config: in_place: expected false on a GPU, whose model may write "
            "to what it gathers from"
        )
    if config.pool_config().is_on_gpu and not is_cuda:
        raise ValueError(
            f"ec_connector_extra_config: device: expected 'cpu' on {current_platform.device_type}, "
            f"got {config.device!r}"
        )
    rank = get_tensor_model_parallel_rank()
    if _num_ranks(parallel) > parallel.tensor_parallel_size:
        rank += get_pcp_group().rank_in_group * parallel.tensor_parallel_size
    cache = TensorCache(_open_pool(config, f"vllm {ec_role} rank {rank}", is_worker=True))
    try:
        copies = _copies(cache, is_cuda=is_cuda)
    except BaseException:
        cache.pool.close()
        raise
    return WorkerSide(cache, copies, rank=rank, saves=rank == 0, in_place=config.in_place)


def _copies(cache: TensorCache, *, is_cuda: bool) -> Copies:
    if not is_cuda:
        return HostCopies(cache)
    from shmblocks.vllm.cuda import CudaCopies

    return CudaCopies(cache)
