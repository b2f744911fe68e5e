"""Requests as vLLM's scheduler shows them to a connector. Imports no torch."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

WIDTH = 16
BLOCK = 4096
ROWS = 32  # an item takes a block: 32 x 16 fp32 is 2 KiB


def content(name: object) -> str:
    """An identifier as vLLM makes it of a content."""
    return hashlib.sha256(str(name).encode()).hexdigest()


class Position(NamedTuple):
    offset: int
    length: int

    def get_num_embeds(self) -> int:
        return self.length


class Element(NamedTuple):
    data: object


class Feature:
    """An item of a request. `media` False: its client sent the metadata alone."""

    modality = "image"

    def __init__(self, identifier: str, rows: int, offset: int, media: bool) -> None:
        self.identifier = identifier
        self.mm_position = Position(offset, rows)
        self.data: dict[str, Element] = {"image_grid_thw": Element([1, 2, 3])}
        self.data["pixel_values"] = Element([0.5] if media else None)


class Request:
    """One with some items, one behind the other."""

    def __init__(
        self, request_id: str, *names: object, rows: int = ROWS, media: bool = True
    ) -> None:
        self.request_id = request_id
        self.num_preemptions = 0
        identifiers = [name if isinstance(name, str) else content(name) for name in names]
        self.mm_features = [
            Feature(identifier, rows, at * rows, media) for at, identifier in enumerate(identifiers)
        ]
