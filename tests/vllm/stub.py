"""What the connectors need of vLLM and vLLM-omni, for machines without them.

These are the base classes and little more.

`scripts/vllm` runs the real one; `test_connector.py` compares these classes' hooks with what is
expected, so that the stub cannot drift from what is tested against the real base class.
"""

from __future__ import annotations

import enum
import importlib.machinery
import importlib.util
import sys
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import msgspec

VERSION = "0.0.stub"
CONNECTORS = "vllm.distributed.ec_transfer.ec_connector"


class ECConnectorRole(enum.Enum):
    SCHEDULER = 0
    WORKER = 1


class ECConnectorMetadata(ABC):  # noqa: B024  as vLLM's
    pass


class ECConnectorWorkerMetadata(ABC):
    @abstractmethod
    def aggregate(self, other: ECConnectorWorkerMetadata) -> ECConnectorWorkerMetadata: ...


class ECConnectorBase(ABC):
    def __init__(self, vllm_config: Any, role: ECConnectorRole) -> None:  # noqa: ANN401
        self._connector_metadata: ECConnectorMetadata | None = None
        self._role = role
        self._is_producer = vllm_config.ec_transfer_config.is_ec_producer
        self._is_consumer = vllm_config.ec_transfer_config.is_ec_consumer

    @property
    def role(self) -> ECConnectorRole:
        return self._role

    @property
    def is_producer(self) -> bool:
        return bool(self._is_producer)

    @property
    def is_consumer(self) -> bool:
        return bool(self._is_consumer)

    def shutdown(self) -> None:
        return None

    def bind_connector_metadata(self, connector_metadata: ECConnectorMetadata) -> None:
        self._connector_metadata = connector_metadata

    def clear_connector_metadata(self) -> None:
        self._connector_metadata = None

    def _get_connector_metadata(self) -> ECConnectorMetadata:
        assert self._connector_metadata is not None
        return self._connector_metadata

    @abstractmethod
    def start_load_caches(self, encoder_cache: Any, **kwargs: Any) -> None: ...  # noqa: ANN401

    @abstractmethod
    def save_caches(self, encoder_cache: Any, mm_hash: str, **kwargs: Any) -> None: ...  # noqa: ANN401

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, None]:
        return None, None

    def build_connector_worker_meta(self) -> ECConnectorWorkerMetadata | None:
        return None

    def get_ec_connector_stats(self) -> ECConnectorStats | None:
        return None

    @abstractmethod
    def has_cache_item(self, identifier: str) -> bool: ...

    def ensure_cache_available(self, request: Any, num_computed_tokens: int) -> bool:  # noqa: ANN401
        return True

    def start_save_caches(self, **kwargs: Any) -> None:  # noqa: ANN401
        return None

    def take_unavailable_requests(self) -> set[str]:
        return set()

    def update_state_after_free(self, request: Any, index: int) -> None:  # noqa: ANN401
        return None

    @abstractmethod
    def update_state_after_alloc(self, request: Any, index: int) -> None: ...  # noqa: ANN401

    @abstractmethod
    def build_connector_meta(self, scheduler_output: Any) -> ECConnectorMetadata: ...  # noqa: ANN401

    def update_connector_output(self, connector_output: Any) -> None:  # noqa: ANN401
        return None

    def request_finished(self, request: Any) -> tuple[bool, dict[str, Any] | None]:  # noqa: ANN401
        return False, None

    @classmethod
    def build_ec_connector_stats(cls, data: dict[str, Any] | None = None) -> Any:  # noqa: ANN401
        return None

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,  # noqa: ANN401
        metric_types: Any,  # noqa: ANN401
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> Any:  # noqa: ANN401
        return None


class ECConnectorStats:
    def __init__(self, data: dict[str, Any] | None = None) -> None:
        self.data = data or {}


class ECConnectorPromMetrics:
    def __init__(
        self,
        vllm_config: Any,  # noqa: ANN401
        metric_types: dict[type, type],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        (self._counter_cls,) = metric_types.values()
        self.per_engine_labelvalues = per_engine_labelvalues


class ECConnectorFactory:
    _registry: ClassVar[dict[str, Any]] = {}

    @classmethod
    def register_connector(cls, name: str, module_path: str, class_name: str) -> None:
        if name in cls._registry:
            raise ValueError(f"Connector '{name}' is already registered.")
        cls._registry[name] = lambda: getattr(importlib.import_module(module_path), class_name)


class PlaceholderMetadataResolver:
    def __init__(self, model_config: object) -> None:
        pass

    def fields_for(self, modality: str) -> set[str]:
        return {"image_grid_thw"} if modality == "image" else set()


def collect_ec_item_metadata(
    mm_features: Any,  # noqa: ANN401
    resolver: PlaceholderMetadataResolver,
) -> dict[str, dict[str, Any]]:
    return {
        feature.identifier: {
            "item_indices": [index],
            "metadata": {"image_grid_thw": [1, 2, feature.mm_position.length]},
        }
        for index, feature in enumerate(mm_features)
    }


class Platform:
    """One whose kind a test may change."""

    device_type = "cpu"

    def is_cuda_alike(self) -> bool:
        return self.device_type == "cuda"


class Ranks:
    """The rank of the worker that is made next."""

    rank = 0


def get_tensor_model_parallel_rank() -> int:
    return Ranks.rank


def get_pcp_group() -> SimpleNamespace:
    return SimpleNamespace(rank_in_group=0)


# ---- vLLM-omni ---------------------------------------------------------------------------------


class SharedMemoryConnector:
    """As much of it as ours uses, and its destructor."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.stage_id = config.get("stage_id", -1)
        self._pending_keys: OrderedDict[str, None] = OrderedDict()
        self._pending_keys_lock = threading.Lock()
        self._metrics = {"puts": 0, "gets": 0, "bytes_transferred": 0}

    @staticmethod
    def serialize_obj(obj: object) -> bytes:
        return msgspec.msgpack.encode(obj)

    @staticmethod
    def deserialize_obj(data: bytes) -> object:
        return msgspec.msgpack.decode(data)

    def close(self) -> None:
        raise NotImplementedError

    def __del__(self) -> None:
        self.close()


class OmniConnectorFactory:
    _registry: ClassVar[dict[str, Any]] = {}

    @classmethod
    def register_connector(cls, name: str, constructor: Any) -> None:  # noqa: ANN401
        if name in cls._registry:
            raise ValueError(f"Connector '{name}' is already registered.")
        cls._registry[name] = constructor

    @classmethod
    def list_registered_connectors(cls) -> list[str]:
        return list(cls._registry)


OMNI = "vllm_omni.distributed.omni_connectors"
OMNI_MODULES: dict[str, tuple[Any, ...]] = {
    "vllm_omni": (),
    "vllm_omni.distributed": (),
    OMNI: (),
    f"{OMNI}.factory": (OmniConnectorFactory,),
    f"{OMNI}.connectors": (),
    f"{OMNI}.connectors.shm_connector": (SharedMemoryConnector,),
}

MODULES: dict[str, tuple[Any, ...]] = {
    "vllm": (),
    "vllm.distributed": (),
    "vllm.distributed.ec_transfer": (),
    CONNECTORS: (),
    f"{CONNECTORS}.base": (
        ECConnectorBase,
        ECConnectorMetadata,
        ECConnectorRole,
        ECConnectorWorkerMetadata,
    ),
    f"{CONNECTORS}.metrics": (ECConnectorPromMetrics, ECConnectorStats),
    f"{CONNECTORS}.factory": (ECConnectorFactory,),
    f"{CONNECTORS}.utils": (PlaceholderMetadataResolver, collect_ec_item_metadata),
    "vllm.distributed.parallel_state": (get_tensor_model_parallel_rank, get_pcp_group),
    "vllm.platforms": (),
}


def install() -> None:
    """Put the stubs where vllm and vllm_omni would be, unless they are there."""
    if _install(MODULES):
        vars(sys.modules["vllm"])["__version__"] = VERSION
        vars(sys.modules["vllm.platforms"])["current_platform"] = Platform()
    _install(OMNI_MODULES)


def _install(modules: dict[str, tuple[Any, ...]]) -> bool:
    root = next(iter(modules))
    if root in sys.modules or importlib.util.find_spec(root) is not None:
        return False
    for name, members in modules.items():
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        for member in members:
            setattr(module, member.__name__, member)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    return True
