"""From a prompt of text, images and videos to what the model's forward takes.

    (Text, Image, Image, Text)  --Preparation-->  input_ids, pixel_values, image_grid_thw, ...

- Images and frames are encoded pictures (JPEG, PNG, ...), as they come over HTTP.
- Pixels go through the processor of `transformers` that works with Pillow alone. It resizes an
  image to a multiple of the merged patch, so the number of tokens depends on size and shape.
- A video is its frames, two of them to a patch, as the model's video processor does it.

What is not here: the models, or the position ids: they are computed by the model's own code.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from PIL import Image as Pillow
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qwen_vl.models import ModelSettings

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

FRAMES_PER_PATCH = 2  # `temporal_patch_size` of both families
MERGE = 2  # patches on each side of a token


class PromptError(ValueError):
    """The prompt cannot be used; the message says why."""


class Text(msgspec.Struct, frozen=True, tag="text"):
    """Some text."""

    text: str


class Image(msgspec.Struct, frozen=True, tag="image"):
    """An encoded picture."""

    data: bytes


class Video(msgspec.Struct, frozen=True, tag="video"):
    """Encoded frames, so many per second."""

    frames: tuple[bytes, ...]
    fps: float = 2.0


Part = Text | Image | Video


class Prompt(msgspec.Struct, frozen=True):
    """What a user said, in order."""

    parts: tuple[Text | Image | Video, ...]


@dataclass
class _Collected:
    """What the parts so far have come to."""

    ids: list[int] = field(default_factory=list)
    images: list[torch.Tensor] = field(default_factory=list)
    image_grids: list[tuple[int, int, int]] = field(default_factory=list)
    videos: list[torch.Tensor] = field(default_factory=list)
    video_grids: list[tuple[int, int, int]] = field(default_factory=list)
    seconds_per_grid: list[float] = field(default_factory=list)


class Preparation:
    """Turns prompts into the arguments of the model's forward, on the model's device."""

    def __init__(self, settings: ModelSettings) -> None:
        self._settings = settings
        self._tokens = settings.tokens
        self._is_qwen3 = settings.family == "qwen3-vl"
        fewest, most = settings.size.pixels
        more = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if self._is_qwen3 else {}
        self._patch = 16 if self._is_qwen3 else 14
        self._processor = Qwen2VLImageProcessorPil(
            patch_size=self._patch,
            merge_size=MERGE,
            size={"shortest_edge": fewest, "longest_edge": most},
            **more,
        )

    def __call__(self, prompt: Prompt) -> dict[str, Any]:
        """`input_ids`, `mm_token_type_ids` [1, n]; pixels [patches, values] and grids [images, 3].

        `PromptError` when a picture cannot be read or the prompt is longer than the pool.
        """
        tokens, got = self._tokens, _Collected()
        got.ids += [tokens.im_start, *tokens.encode("user\n")]
        for part in prompt.parts:
            if isinstance(part, Text):
                got.ids += tokens.encode(part.text)
            elif isinstance(part, Image):
                self._add_image(got, part)
            else:
                self._add_video(got, part)
        got.ids += [tokens.im_end, *tokens.encode("\n"), tokens.im_start]
        got.ids += tokens.encode("assistant\n")
        if len(got.ids) > self._settings.size.pool_tokens:
            raise PromptError(
                f"the prompt has {len(got.ids)} tokens, which is more than the pool's"
                f" {self._settings.size.pool_tokens}; send smaller or fewer images"
            )
        return self._arguments(got)

    def _add_image(self, got: _Collected, image: Image) -> None:
        pixels, (_, height, width) = self._pixels(_open(image.data))
        got.images.append(pixels)
        got.image_grids.append((1, height, width))
        got.ids += self._seen(self._tokens.image, height, width)

    def _add_video(self, got: _Collected, video: Video) -> None:
        if not video.frames or not video.fps > 0:
            raise PromptError("video: expected at least one frame and an fps above 0")
        frames = [self._pixels(_open(frame)) for frame in video.frames]
        _, height, width = frames[0][1]
        if any(grid != frames[0][1] for _, grid in frames):
            raise PromptError("video: expected frames of one size")
        patches = [pixels for pixels, _ in frames]
        if len(patches) % FRAMES_PER_PATCH:
            patches.append(patches[-1])
        pairs = list(zip(patches[::2], patches[1::2], strict=True))
        got.videos += [self._two_frames(*pair) for pair in pairs]
        got.video_grids.append((len(pairs), height, width))
        got.seconds_per_grid.append(FRAMES_PER_PATCH / video.fps)
        got.ids += self._seen_frames(len(pairs), height, width, video.fps)

    def _seen(self, token: int, height: int, width: int, grids: int = 1) -> list[int]:
        count = grids * height * width // MERGE**2
        return [self._tokens.vision_start, *[token] * count, self._tokens.vision_end]

    def _seen_frames(self, grids: int, height: int, width: int, fps: float) -> list[int]:
        """Qwen2.5-VL counts a video's time in its positions, Qwen3-VL says it in words."""
        if not self._is_qwen3:
            return self._seen(self._tokens.video, height, width, grids)
        ids: list[int] = []
        for grid in range(grids):
            middle = (FRAMES_PER_PATCH * grid + (FRAMES_PER_PATCH - 1) / 2) / fps
            ids += self._tokens.encode(f"<{middle:.1f} seconds>")
            ids += self._seen(self._tokens.video, height, width)
        return ids

    def _pixels(self, picture: Picture) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """Patches [n, 3 * frames * patch * patch] and the grid (1, rows, columns) of patches."""
        try:
            made = self._processor(images=[picture], return_tensors="pt")
        except ValueError as error:  # such as an image 200 times as wide as high
            raise PromptError(f"image: {error}") from error
        _, height, width = made["image_grid_thw"][0].tolist()
        return made["pixel_values"], (1, height, width)

    def _two_frames(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """The processor puts a still image into both frames of a patch; here they are two."""
        shape = (-1, 3, FRAMES_PER_PATCH, self._patch**2)
        pair = [each.reshape(shape)[:, :, 0] for each in (first, second)]
        return torch.stack(pair, dim=2).reshape(len(first), -1)

    def _arguments(self, got: _Collected) -> dict[str, Any]:
        ids = torch.tensor([got.ids])
        kinds = (ids == self._tokens.image).int() + 2 * (ids == self._tokens.video).int()
        made: dict[str, Any] = {"input_ids": ids, "mm_token_type_ids": kinds}
        if got.images:
            made["pixel_values"] = torch.cat(got.images)
            made["image_grid_thw"] = torch.tensor(got.image_grids)
        if got.videos:
            made["pixel_values_videos"] = torch.cat(got.videos)
            made["video_grid_thw"] = torch.tensor(got.video_grids)
            if not self._is_qwen3:
                made["second_per_grid_ts"] = torch.tensor(got.seconds_per_grid)
        return {name: each.to(self._settings.device) for name, each in made.items()}


def _open(data: bytes) -> Picture:
    try:
        with Pillow.open(io.BytesIO(data)) as picture:
            rgb: Picture = picture.convert("RGB")
            return rgb
    except (OSError, Pillow.DecompressionBombError) as error:
        raise PromptError(f"image: it cannot be read ({error})") from error


def prompt_of(*parts: Part | str) -> Prompt:
    """A prompt; strings are text."""
    return Prompt(tuple(Text(part) if isinstance(part, str) else part for part in parts))


def is_visual(fill_ids: torch.Tensor, visual: Sequence[int]) -> torch.Tensor:
    """Which tokens stand for a piece of an image or of a video, [n] bool."""
    return torch.isin(fill_ids, torch.tensor(visual, dtype=fill_ids.dtype, device=fill_ids.device))
