"""Eight pictures cut from the photographs inside scikit-image's wheel, and prompts about them.

No download: astronaut, rocket and hubble (NASA), chelsea, coffee, retina and motorcycle lie in
the wheel itself. They are found without importing skimage, and read with Pillow. Cut and scaled
to different sizes and shapes, so that an image is 100 to 1,225 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

WHAT_IS_MISSING = (
    "the photographs come with scikit-image, which is not installed here;"
    " install it with: pip install 'shmblocks[examples]'"
)
MEAN, DEVIATION = 127.5, 67.5
VISION_START, VISION_END, IMAGE = 1, 2, 3
QUESTION = (17, 29, 41, 53, 61, 73, 89, 97)  # some text behind the image: "what is this?"


class PhotosMissingError(Exception):
    """The package with the photographs is not installed."""


@dataclass(frozen=True)
class Photo:
    """A photograph, to be cut to this shape. Sizes in pixels, multiples of 28."""

    name: str
    file: str
    width: int
    height: int

    def shrunk(self, by: int) -> Photo:
        """The same picture with about 1 / `by` of each side, for runs that must be quick."""
        width, height = (max(1, side // 28 // by) * 28 for side in (self.width, self.height))
        return Photo(self.name, self.file, width, height)


PHOTOS = (
    Photo("chelsea", "chelsea.png", 280, 280),
    Photo("coffee", "coffee.png", 504, 336),
    Photo("retina", "retina.jpg", 980, 980),
    Photo("rocket, tall", "rocket.jpg", 224, 672),
    Photo("hubble", "hubble_deep_field.jpg", 980, 868),
    Photo("astronaut", "astronaut.png", 504, 504),
    Photo("motorcycle", "motorcycle_left.png", 616, 420),
    Photo("rocket, wide", "rocket.jpg", 700, 476),
)


def folder() -> Path:
    """Where the photographs lie."""
    package = find_spec("skimage")
    if package is None or not package.submodule_search_locations:
        raise PhotosMissingError(WHAT_IS_MISSING)
    return Path(package.submodule_search_locations[0]) / "data"


def load(photo: Photo) -> Tensor:
    """The picture as [3, height, width], float32, about -2 to 2."""
    from PIL import Image, ImageOps  # only the embedding side and the reference need Pillow

    with Image.open(folder() / photo.file) as image:
        cut = ImageOps.fit(image.convert("RGB"), (photo.width, photo.height))
    pixels = torch.frombuffer(bytearray(cut.tobytes()), dtype=torch.uint8)
    image_last = pixels.reshape(photo.height, photo.width, 3)
    return (image_last.permute(2, 0, 1) - MEAN) / DEVIATION


@dataclass(frozen=True)
class Prompt:
    """What the language model needs of a prompt with one image, every field per token."""

    input_embeddings: Tensor  # [n, hidden] float32
    fill_ids: Tensor  # [n] int32
    mrope_positions: Tensor  # [3, n] int32: time, height, width
    mrope_position_delta: int


def prompt_about(image: Tensor, rows: int, columns: int, table: Tensor) -> Prompt:
    """Put an image's embeddings [rows * columns, hidden] between the prompt's text tokens."""
    ids = torch.tensor([VISION_START, *[IMAGE] * len(image), VISION_END, *QUESTION])
    embeddings = table[ids]
    embeddings[1 : 1 + len(image)] = image
    positions, delta = mrope(rows, columns, before=1, after=1 + len(QUESTION))
    return Prompt(embeddings, ids.to(torch.int32), positions, delta)


def mrope(rows: int, columns: int, before: int, after: int) -> tuple[Tensor, int]:
    """3-d positions [3, n] of text, an image, text; and the mrope position delta.

    Text counts on all three axes alike. An image stands still in time and counts rows and
    columns from where the text left off; the text behind it goes on after the highest number
    that the image used. The delta is what to add to an index to get its position from there on.
    """
    image = torch.cartesian_prod(torch.tensor([0]), torch.arange(rows), torch.arange(columns))
    next_text = before + max(rows, columns)
    text = [torch.arange(before), torch.arange(next_text, next_text + after)]
    parts = [text[0].expand(3, -1), image.T + before, text[1].expand(3, -1)]
    positions = torch.cat(parts, dim=1).to(torch.int32)
    return positions, next_text + after - positions.shape[1]
