"""Tiny Qwen2.5-VL and Qwen3-VL with random weights: made offline, in some seconds each.

python -m vllm_cases.models qwen25 FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

KINDS = ("qwen25", "qwen3")
# As qwen25, with an encoder that takes longer than the rest, and pictures of up to 512 tokens.
LARGE = "large"
LARGE_VISION = {
    "depth": 8,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_heads": 8,
    "fullatt_block_indexes": [3, 7],
}
HIDDEN = 128
VOCABULARY = 512
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CORPUS = [
    "Describe the image in a few words.",
    "What is in this picture? A temple, a person, a flower.",
    "system user assistant You are a helpful assistant.",
] * 50
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] in ['image','image_url'] %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Kind(NamedTuple):
    """What differs between the two."""

    config: str
    model: str
    processor: str
    video_processor: str
    patch: int
    mean: list[float]
    std: list[float]
    vision: dict[str, Any]
    text: dict[str, Any]
    most_tokens: int = 64


def kind_of(name: str) -> Kind:
    common = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": HIDDEN,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "initializer_range": 0.15,
    }
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6}
    if name == LARGE:
        small = kind_of("qwen25")
        return small._replace(vision=small.vision | LARGE_VISION, most_tokens=512)
    if name == "qwen25":
        return Kind(
            "Qwen2_5_VLConfig",
            "Qwen2_5_VLForConditionalGeneration",
            "Qwen2_5_VLProcessor",
            "Qwen2VLVideoProcessor",
            14,
            [0.48145466, 0.4578275, 0.40821073],
            [0.26862954, 0.26130258, 0.27577711],
            common
            | {
                "patch_size": 14,
                "window_size": 112,
                "fullatt_block_indexes": [1],
                "tokens_per_second": 2,
            },
            {"rope_parameters": rope | {"mrope_section": [4, 6, 6]}},
        )
    return Kind(
        "Qwen3VLConfig",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLProcessor",
        "Qwen3VLVideoProcessor",
        16,
        [0.5] * 3,
        [0.5] * 3,
        common
        | {"patch_size": 16, "num_position_embeddings": 256, "deepstack_visual_indexes": [0]},
        {
            "head_dim": 32,
            "rope_parameters": rope | {"mrope_section": [6, 5, 5], "mrope_interleaved": True},
        },
    )


def make_tokenizer(folder: Path) -> Any:  # noqa: ANN401  transformers has no types here
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL[1:]),
        model_max_length=32768,
        chat_template=CHAT,
    )
    fast.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=1))
    (folder / "chat_template.jinja").write_text(CHAT)
    return fast


def make(name: str, folder: Path) -> None:
    """Write a model, its tokenizer and its processor into `folder`; the same weights each time."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = kind_of(name)
    tokenizer = make_tokenizer(folder)
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in SPECIAL}
    text = kind.text | {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.15,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    torch.manual_seed(1234)
    config = getattr(transformers, kind.config)(
        text_config=text,
        vision_config=kind.vision,
        tie_word_embeddings=False,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    model = getattr(transformers, kind.model)(config).float()
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    model.save_pretrained(folder)
    config.architectures = [kind.model]
    config.dtype = "float32"
    config.save_pretrained(folder)
    write_processors(kind, folder)


def write_processors(kind: Kind, folder: Path) -> None:
    side = kind.patch * 2
    smallest, largest = 4 * side * side, kind.most_tokens * side * side
    image = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": kind.processor,
        "patch_size": kind.patch,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "min_pixels": smallest,
        "max_pixels": largest,
        "size": {"shortest_edge": smallest, "longest_edge": largest},
        "image_mean": kind.mean,
        "image_std": kind.std,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
    }
    video = {key: value for key, value in image.items() if key != "image_processor_type"}
    video["video_processor_type"] = kind.video_processor
    (folder / "preprocessor_config.json").write_text(json.dumps(image, indent=1))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=1))


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
