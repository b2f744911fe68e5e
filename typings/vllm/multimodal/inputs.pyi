from typing import Any

class PlaceholderRange:
    offset: int
    length: int
    def get_num_embeds(self) -> int: ...

class MultiModalFeatureSpec:
    data: dict[str, Any] | None
    modality: str
    identifier: str
    mm_position: PlaceholderRange
