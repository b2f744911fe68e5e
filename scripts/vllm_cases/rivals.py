"""vLLM's own connectors and ours, each as the three objects of two engines, with one interface.

    save(cache, name)          a producer's worker puts one item away
    look_up(request, name)     a consumer's scheduler finds it, and plans to load it
    load(plan, cache)          a consumer's worker puts it into its engine's cache

ECCPUConnector runs on GPUs alone, and in one instance alone. Its own scheduler and worker run here
with what is CUDA in them replaced: streams and events do nothing, and its batched copy is a memmove
for each run of blocks.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch

# Of vLLM's `SchedulerOutput`.
NOTHING_FREED: Any = SimpleNamespace(free_encoder_mm_hashes=[])
Cache = dict[str, torch.Tensor]


class Request:
    """One with one item."""

    def __init__(self, name: str, rows: int) -> None:
        self.request_id = name
        self.num_preemptions = 0
        self.ec_transfer_params = None
        self._rows = rows
        position = SimpleNamespace(offset=0, length=rows, get_num_embeds=lambda: rows)
        feature = SimpleNamespace(
            identifier=name, modality="image", data=None, mm_position=position
        )
        self.mm_features = [feature]

    def get_num_encoder_embeds(self, index: int) -> int:
        return self._rows


def vllm_config(role: str, width: int, extra: dict[str, Any]) -> Any:  # noqa: ANN401
    """As much of vLLM's config as the connectors ask for."""
    from vllm.config.ec_transfer import ECTransferConfig

    transfer = ECTransferConfig(
        ec_connector="compared", ec_role=role, ec_connector_extra_config=extra
    )
    transfer.mm_encoder_output_widths = {"image": width}
    model = SimpleNamespace(
        model="compared",
        revision=None,
        dtype=torch.bfloat16,
        quantization=None,
        hf_config=SimpleNamespace(),
        multimodal_config=SimpleNamespace(mm_processor_cache_gb=4),
        get_inputs_embeds_size=lambda: width,
    )
    return SimpleNamespace(
        ec_transfer_config=transfer,
        model_config=model,
        cache_config=SimpleNamespace(enable_prefix_caching=True),
        instance_id=f"vllm-compare-{os.getpid()}",
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1,
            prefill_context_parallel_size=1,
            data_parallel_index=0,
            nnodes=1,
            distributed_executor_backend="mp",
        ),
    )


class Rival(Protocol):
    """One way to share an encoder cache."""

    name: str

    def save(self, cache: Cache, name: str) -> None: ...

    def look_up(self, request: Request, name: str) -> Any: ...  # noqa: ANN401

    def load(self, plan: Any, cache: Cache) -> None: ...  # noqa: ANN401

    def forget(self, name: str) -> None:
        """The engine drops the item; so does one whose store has no bound."""
        ...

    def close(self) -> None: ...


class _Hooks:
    """What those have in common that are driven through the hooks."""

    scheduler: Any
    worker: Any

    def look_up(self, request: Request, name: str) -> Any:  # noqa: ANN401
        self.scheduler.ensure_cache_available(request, 0)
        if not self.scheduler.has_cache_item(name):
            raise LookupError(f"{name} was saved and is not found")
        self.scheduler.update_state_after_alloc(request, 0)
        return self.scheduler.build_connector_meta(NOTHING_FREED)

    def load(self, plan: Any, cache: Cache) -> None:  # noqa: ANN401
        self.worker.bind_connector_metadata(plan)
        self.worker.start_load_caches(cache)
        self.worker.get_finished(set())
        self.worker.clear_connector_metadata()


class Ours(_Hooks):
    """`ShmBlocksECConnector`: a producer and a consumer on one pool."""

    def __init__(self, width: int, pool_bytes: int, *, in_place: bool) -> None:
        from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole

        from shmblocks.vllm.connector import ShmBlocksECConnector

        self.name = "shmblocks, in place" if in_place else "shmblocks, with a copy"
        pool = f"vllm-compare-{os.getpid()}-{in_place}"
        extra = {"pool": pool, "pool_bytes": pool_bytes, "in_place": in_place}

        def make(role: str, side: ECConnectorRole) -> ShmBlocksECConnector:
            return ShmBlocksECConnector(vllm_config(role, width, extra), side)

        self._encoder = make("ec_producer", ECConnectorRole.SCHEDULER)
        self._saver = make("ec_producer", ECConnectorRole.WORKER)
        self.scheduler = make("ec_consumer", ECConnectorRole.SCHEDULER)
        self.worker = make("ec_consumer", ECConnectorRole.WORKER)

    def save(self, cache: Cache, name: str) -> None:
        request: Any = Request(name, len(cache[name]))
        self._encoder.update_state_after_alloc(request, 0)
        plan = self._encoder.build_connector_meta(NOTHING_FREED)
        self._saver.bind_connector_metadata(plan)
        self._saver.save_caches(cache, name)
        self._saver.get_finished(set())
        self._saver.clear_connector_metadata()

    def forget(self, name: str) -> None:
        from shmblocks.vllm.connector import ShmBlocksMetadata
        from shmblocks.vllm.plan import StepPlan

        self.load(ShmBlocksMetadata(StepPlan()), {})  # ends the lease of what was in place

    def close(self) -> None:
        for each in (self._encoder, self._saver, self.scheduler, self.worker):
            each.shutdown()


class Example(_Hooks):
    """vLLM's ECExampleConnector: a file for each item."""

    def __init__(self, width: int, folder: Path) -> None:
        from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole
        from vllm.distributed.ec_transfer.ec_connector.example_connector import ECExampleConnector

        self.name = f"ECExample, {'/dev/shm' if str(folder).startswith('/dev/shm') else 'disk'}"
        self._folder = folder
        folder.mkdir(parents=True)
        extra = {"shared_storage_path": str(folder)}
        self._saver = ECExampleConnector(
            vllm_config("ec_producer", width, extra), ECConnectorRole.WORKER
        )
        consumer = vllm_config("ec_consumer", width, extra)
        self.scheduler = ECExampleConnector(consumer, ECConnectorRole.SCHEDULER)
        self.worker = ECExampleConnector(consumer, ECConnectorRole.WORKER)

    def save(self, cache: Cache, name: str) -> None:
        self._saver.save_caches(cache, name)

    def forget(self, name: str) -> None:
        shutil.rmtree(self._folder / name)

    def close(self) -> None:
        shutil.rmtree(self._folder)


class Cpu:
    """vLLM's ECCPUConnector: its scheduler and its worker, without CUDA, as `ec_both`."""

    name = "ECCPU's code, memmove"

    def __init__(self, width: int, pool_bytes: int) -> None:
        from vllm.distributed.ec_transfer.ec_connector.cpu.scheduler import ECCPUScheduler
        from vllm.distributed.ec_transfer.ec_connector.cpu.worker import ECCPUWorker

        config = vllm_config("ec_both", width, {"ec_cpu_bytes": pool_bytes})
        _replace_cuda()
        self._scheduler = ECCPUScheduler(config)
        self._worker = ECCPUWorker(config)

    def save(self, cache: Cache, name: str) -> None:
        self._scheduler.update_state_after_alloc(Request(name, len(cache[name])), 0)
        plan = self._scheduler.build_connector_meta(NOTHING_FREED)
        self._worker.save_caches(cache, name, plan)
        self._worker.flush_saves()
        self._report()

    def look_up(self, request: Request, name: str) -> Any:  # noqa: ANN401
        self._scheduler.ensure_cache_available(request, 0)
        if not self._scheduler.has_cache_item(name):
            raise LookupError(f"{name} was saved and is not found")
        self._scheduler.update_state_after_alloc(request, 0)
        return self._scheduler.build_connector_meta(NOTHING_FREED)

    def load(self, plan: Any, cache: Cache) -> None:  # noqa: ANN401
        self._worker.start_load_caches(cache, plan)
        self._report()

    def _report(self) -> None:
        told = self._worker.build_connector_worker_meta()
        self._scheduler.update_connector_output(SimpleNamespace(ec_connector_worker_meta=told))

    def forget(self, name: str) -> None:
        """It evicts by itself."""

    def close(self) -> None:
        self._scheduler.shutdown()
        self._worker.shutdown()


class _Event:
    """A moment that has come."""

    def __init__(self, **_: object) -> None: ...

    def record(self, stream: object) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 0.0

    def synchronize(self) -> None: ...


class _Stream:
    """Where everything is done at once."""

    def wait_stream(self, other: object) -> None: ...


@contextlib.contextmanager
def _on(stream: object) -> Iterator[None]:
    yield


def _move(sources: Any, destinations: Any, sizes: Any, **_: object) -> None:  # noqa: ANN401
    for source, destination, size in zip(
        sources.tolist(), destinations.tolist(), sizes.tolist(), strict=True
    ):
        ctypes.memmove(destination, source, size)


def _replace_cuda() -> None:
    """In the worker's module, and `record_stream`, which tensors of a CPU do not have."""
    from vllm.distributed.ec_transfer.ec_connector.cpu import worker

    stream = _Stream()
    module = vars(worker)
    module["get_tensor_model_parallel_rank"] = lambda: 0
    module["get_pcp_group"] = lambda: SimpleNamespace(rank_in_group=0)
    module["swap_blocks_batch"] = _move
    module["current_platform"] = SimpleNamespace(
        device_type="cpu", Stream=_Stream, current_stream=lambda: stream, stream=_on
    )
    worker.ECCPUWorker._acquire_event = lambda self: _Event()
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[assignment,method-assign]
