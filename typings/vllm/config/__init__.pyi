from typing import Any

import torch

class ECTransferConfig:
    ec_connector: str | None
    engine_id: str | None
    ec_role: str | None
    ec_connector_extra_config: dict[str, object]
    @property
    def is_ec_producer(self) -> bool: ...
    @property
    def is_ec_consumer(self) -> bool: ...
    @property
    def is_encode_only(self) -> bool: ...

class MultiModalConfig:
    mm_processor_cache_gb: float

class ModelConfig:
    model: str
    revision: str | None
    dtype: torch.dtype
    quantization: str | None
    hf_config: Any
    multimodal_config: MultiModalConfig | None
    def get_inputs_embeds_size(self) -> int: ...

class CacheConfig:
    enable_prefix_caching: bool | None

class ParallelConfig:
    tensor_parallel_size: int
    prefill_context_parallel_size: int
    nnodes: int

class VllmConfig:
    ec_transfer_config: ECTransferConfig | None
    model_config: ModelConfig
    cache_config: CacheConfig
    parallel_config: ParallelConfig
