"""The models' sizes: made for tests, made for two processor cores, and those of the checkpoints.

Every size is a config of `transformers`; the code that runs is its code. What differs is widths and
numbers of layers. The sizes named like checkpoints (`7b`, `8b`, ...) have their widths and layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

Family = Literal["qwen2.5-vl", "qwen3-vl"]
FAMILIES: tuple[Family, ...] = get_args(Family)


@dataclass(frozen=True)
class Size:
    """One model's numbers, as far as they differ between sizes.

    Widths are values per token, `pixels` is (fewest, most) pixels of an image after resizing. The
    landing allocation is `landing_blocks` blocks of `block_size` tokens.
    """

    text: dict[str, Any]
    vision: dict[str, Any]
    pixels: tuple[int, int]
    block_size: int = 128
    landing_blocks: int = 8
    pool_tokens: int = 32_768
    special: int = 151_643  # the first of the special token ids (see text.py)

    @property
    def hidden(self) -> int:
        """Values of one row of `input_embeddings`."""
        return int(self.text["hidden_size"])

    @property
    def num_deepstack(self) -> int:
        """How many layers of the vision tower go to the language model's first layers."""
        return len(self.vision.get("deepstack_visual_indexes", ()))


def _text(
    hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocab: int, head: int = 128
) -> dict[str, Any]:
    """`head` is heeded by Qwen3-VL only; Qwen2.5-VL takes hidden / heads."""
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "head_dim": head,
    }


def _vision(hidden: int, mlp: int, depth: int, heads: int, out: int, **more: Any) -> dict[str, Any]:  # noqa: ANN401
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "depth": depth,
        "num_heads": heads,
        "out_hidden_size": out,
        **more,
    }


TINY_PIXELS = (32 * 32 * 4, 32 * 32 * 64)  # 4 to 64 tokens of 32 x 32 pixels
SMALL_PIXELS = (32 * 32 * 16, 32 * 32 * 1280)
TRUE_PIXELS = (32 * 32 * 16, 32 * 32 * 2048)

SIZES: dict[Family, dict[str, Size]] = {
    "qwen2.5-vl": {
        "tiny": Size(
            _text(64, 128, 2, 4, 2, vocab=320, head=16),
            _vision(64, 96, 2, 4, out=64, fullatt_block_indexes=[1]),
            TINY_PIXELS,
            block_size=16,
            landing_blocks=4,
            pool_tokens=1024,
            special=256,
        ),
        "small": Size(
            _text(1024, 1408, 2, 8, 2, vocab=4096),
            _vision(320, 864, 3, 8, out=1024, fullatt_block_indexes=[2]),
            SMALL_PIXELS,
            special=256,
        ),
        "3b": Size(
            _text(2048, 11008, 36, 16, 2, vocab=151_936),
            _vision(1280, 3420, 32, 16, out=2048, fullatt_block_indexes=[7, 15, 23, 31]),
            TRUE_PIXELS,
        ),
        "7b": Size(
            _text(3584, 18944, 28, 28, 4, vocab=152_064),
            _vision(1280, 3420, 32, 16, out=3584, fullatt_block_indexes=[7, 15, 23, 31]),
            TRUE_PIXELS,
        ),
    },
    "qwen3-vl": {
        "tiny": Size(
            _text(64, 128, 3, 4, 2, vocab=320, head=16),
            _vision(64, 96, 3, 4, out=64, deepstack_visual_indexes=[0, 1]),
            TINY_PIXELS,
            block_size=16,
            landing_blocks=4,
            pool_tokens=1024,
            special=256,
        ),
        "small": Size(
            _text(1024, 1408, 3, 8, 2, vocab=4096),
            _vision(320, 864, 4, 8, out=1024, deepstack_visual_indexes=[0, 1, 2]),
            SMALL_PIXELS,
            special=256,
        ),
        "2b": Size(
            _text(2048, 6144, 28, 16, 8, vocab=151_936),
            _vision(1024, 4096, 24, 16, out=2048, deepstack_visual_indexes=[5, 11, 17]),
            TRUE_PIXELS,
        ),
        "8b": Size(
            _text(4096, 12288, 36, 32, 8, vocab=151_936),
            _vision(1152, 4304, 27, 16, out=4096, deepstack_visual_indexes=[8, 16, 24]),
            TRUE_PIXELS,
        ),
    },
}


def size_of(family: Family, name: str) -> Size:
    """A size by its name; ValueError when the family has none of that name."""
    try:
        return SIZES[family][name]
    except KeyError:
        known = ", ".join(SIZES[family])
        raise ValueError(f"size of {family}: expected one of {known}, got {name!r}") from None


SIZE_NAMES = sorted({name for sizes in SIZES.values() for name in sizes})
