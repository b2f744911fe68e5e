"""One model of `transformers` three ways: whole, its vision half, its language half.

    whole          Qwen..ForConditionalGeneration as it is
    vision half    Qwen..Model, its language model replaced by `Seam`: the model's own forward does
                   all up to the call of the language model, and `Seam` keeps what that is given
    language half  the language model and the head

- Every parameter is seeded by its name in the whole model, so a process fills what it holds, and
  equal names have equal bits everywhere (on processors of one kind).
- A half never has memory for what it does not hold: the outline it is cut from lies on the meta
  device.

What is not here: what to feed them (prompts.py), or how to generate (halves.py).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from qwen_vl.sizes import Family, Size, size_of
from qwen_vl.text import Tokens

# Of random weights, in units of 1 / sqrt(inputs). At 1 attention is nearly the same for all tokens,
# and no single one changes the answer.
SPREAD = 2.0


@dataclass(frozen=True)
class ModelSettings:
    """Which model, and where it lies. Equal settings give equal models in every process."""

    family: Family
    size_name: str
    seed: int = 0
    device: str = "cpu"
    is_exact: bool = False  # on a GPU: kernels that give the same bits each time, and are slower

    @property
    def is_reproducible(self) -> bool:
        """Whether equal inputs give equal bits each time."""
        return self.device == "cpu" or self.is_exact

    @property
    def size(self) -> Size:
        """Its numbers."""
        return size_of(self.family, self.size_name)

    @property
    def tokens(self) -> Tokens:
        """Its vocabulary."""
        return Tokens(self.size.special)

    @property
    def dtype(self) -> torch.dtype:
        """bf16 on a GPU; float32 on the CPU, where bf16 is slow."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16


def make_whole(settings: ModelSettings) -> Any:  # noqa: ANN401  # transformers has no types for us
    """The unsplit model."""
    with _on(settings):
        model = _model_class(settings)(_config(settings))
    return _filled(model, "", settings)


def make_vision_half(settings: ModelSettings) -> Any:  # noqa: ANN401
    """The vision tower and the table of the text tokens' embeddings, ending in a `Seam`.

    The table is here because `input_embeddings` holds the text's rows too: the language processes
    read one tensor as it lies.
    """
    outline = _outline(settings)
    model = outline.model
    with _on(settings):
        model.visual = type(model.visual)(outline.config.vision_config)
        table = nn.Embedding(settings.size.text["vocab_size"], settings.size.hidden)
    model.language_model = Seam(table)
    return _filled(model, "model.", settings)


def make_language_half(settings: ModelSettings) -> Any:  # noqa: ANN401
    """The language model and its head: a whole model without a vision tower."""
    outline = _outline(settings)
    with _on(settings):
        language = type(outline.model.language_model)(outline.config.text_config)
        head = nn.Linear(settings.size.hidden, settings.size.text["vocab_size"], bias=False)
    outline.model.visual = None
    outline.model.language_model = language
    outline.lm_head = head
    return _filled(outline, "", settings)


class Seam(nn.Module):
    """Stands where the language model was, and keeps what it would have been given."""

    def __init__(self, embed_tokens: nn.Embedding) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.given: dict[str, Any] = {}

    def get_input_embeddings(self) -> nn.Embedding:
        """Where the model takes its text tokens' embeddings from."""
        return self.embed_tokens

    def forward(self, **given: Any) -> Any:  # noqa: ANN401
        """The call of the language model."""
        self.given = given
        return BaseModelOutputWithPast(last_hidden_state=given["inputs_embeds"])


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(each.numel() * each.element_size() for each in model.parameters())


# ---------------------------------------------------------------------------------- weights


def _filled(model: Any, prefix: str, settings: ModelSettings) -> Any:  # noqa: ANN401
    """Give every parameter the values that its name and the seed say. `prefix`: of the names."""
    model.requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        _fill(parameter, prefix + name, settings.seed)
    return model


def _fill(parameter: torch.Tensor, name: str, seed: int) -> None:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    random = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest, "little"))
    if parameter.ndim > 1:
        is_table = "embed_tokens" in name
        parameter.normal_(std=1.0 if is_table else _spread(parameter), generator=random)
    else:
        parameter.normal_(std=0.02, generator=random)
        if name.endswith("weight"):  # a norm's scale
            parameter.add_(1.0)


def _spread(weight: torch.Tensor) -> float:
    inputs: int = weight[0].numel()
    return SPREAD / math.sqrt(inputs)


# ------------------------------------------------------------------------------------ making


def _outline(settings: ModelSettings) -> Any:  # noqa: ANN401
    """All of the model's modules and names, and none of its memory."""
    with torch.device("meta"):
        return _model_class(settings)(_config(settings))


@contextmanager
def _on(settings: ModelSettings) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(settings.dtype)
    try:
        with torch.device(settings.device):
            yield
    finally:
        torch.set_default_dtype(before)


def _model_class(settings: ModelSettings) -> Any:  # noqa: ANN401
    if settings.family == "qwen2.5-vl":
        return Qwen2_5_VLForConditionalGeneration
    return Qwen3VLForConditionalGeneration


def _config(settings: ModelSettings) -> Any:  # noqa: ANN401
    size, tokens = settings.size, settings.tokens
    text = {
        **size.text,
        "rope_parameters": _rope(settings.family, size),
        "bos_token_id": None,
        "eos_token_id": None,  # answers are as long as they are asked to be
    }
    made = Qwen2_5_VLConfig if settings.family == "qwen2.5-vl" else Qwen3VLConfig
    return made(
        text_config=text,
        vision_config=dict(size.vision),
        image_token_id=tokens.image,
        video_token_id=tokens.video,
        vision_start_token_id=tokens.vision_start,
        vision_end_token_id=tokens.vision_end,
    )


def _rope(family: Family, size: Size) -> dict[str, Any]:
    """The checkpoints' parameters, with the sections scaled when a head is narrower than 128."""
    if family == "qwen2.5-vl":
        head = size.hidden // size.text["num_attention_heads"]
        sections, more = (16, 24, 24), {"rope_theta": 1e6}
    else:
        head = size.text["head_dim"]
        sections, more = (24, 20, 20), {"rope_theta": 5e6, "mrope_interleaved": True}
    scaled = [section * head // 128 for section in sections]
    scaled[0] += head // 2 - sum(scaled)
    return {"rope_type": "default", "mrope_section": scaled, **more}
