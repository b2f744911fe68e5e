from vllm.multimodal.inputs import MultiModalFeatureSpec

class Request:
    request_id: str
    num_preemptions: int
    mm_features: list[MultiModalFeatureSpec]
