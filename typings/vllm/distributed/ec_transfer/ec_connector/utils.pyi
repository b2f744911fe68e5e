from typing import Any

from vllm.config import ModelConfig
from vllm.multimodal.inputs import MultiModalFeatureSpec

class PlaceholderMetadataResolver:
    def __init__(self, model_config: ModelConfig) -> None: ...
    def fields_for(self, modality: str) -> set[str]: ...

def collect_ec_item_metadata(
    mm_features: list[MultiModalFeatureSpec], resolver: PlaceholderMetadataResolver
) -> dict[str, dict[str, Any]]: ...
