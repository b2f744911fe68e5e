"""Prompts with real photographs: several sizes and shapes, several images, a short video.

The photographs come inside scikit-image's wheel (see ../_photos.py), cut and scaled with Pillow and
handed on as JPEG, as a client would send them.
"""

from __future__ import annotations

import io
from functools import lru_cache

from PIL import Image as Pillow
from PIL import ImageOps

from _photos import folder
from qwen_vl.prompts import Image, Prompt, Video, prompt_of

FRAMES = 6  # of the video: a window that moves over a photograph


def cases(shrink: int = 1) -> dict[str, Prompt]:
    """Named prompts. `shrink` divides each side, for runs that must be quick."""

    def image(file: str, width: int, height: int) -> Image:
        return Image(_jpeg(file, max(32, width // shrink), max(32, height // shrink)))

    return {
        "one image": prompt_of("What is ", image("chelsea.png", 448, 300), "?"),
        "wide": prompt_of(image("rocket.jpg", 1280, 256), "Describe it."),
        "tall": prompt_of(image("rocket.jpg", 224, 800), "Describe it."),
        "three images": prompt_of(
            image("astronaut.png", 512, 512),
            image("coffee.png", 600, 400),
            " and ",
            image("motorcycle_left.png", 740, 500),
            "What do these have in common?",
        ),
        "large": prompt_of(image("retina.jpg", 1411, 1411), "What is ill here?"),
        "video": prompt_of(_video(shrink), "What happens?"),
        "video + image": prompt_of(
            _video(shrink), image("hubble_deep_field.jpg", 500, 436), "Is it there?"
        ),
    }


def _video(shrink: int) -> Video:
    frames = tuple(
        _jpeg("coffee.png", 320 // shrink, 240 // shrink, move=i / (FRAMES - 1))
        for i in range(FRAMES)
    )
    return Video(frames, fps=2.0)


@lru_cache(maxsize=64)
def _jpeg(file: str, width: int, height: int, move: float = 0.5) -> bytes:
    """A photograph cut to this size; `move`: 0 from its left or upper edge, 1 from the other."""
    with Pillow.open(folder() / file) as picture:
        cut = ImageOps.fit(picture.convert("RGB"), (width, height), centering=(move, move))
    out = io.BytesIO()
    cut.save(out, "JPEG", quality=90)
    return out.getvalue()
