"""The model's two halves at work, and the whole model to compare them with.

    VisionHalf     Prompt -> Embedded      what crosses, in the pool's fields
    LanguageHalf   Embedded -> tokens      greedy, with a cache
    Whole          Prompt -> tokens        `generate` of transformers

- Given equal settings, `LanguageHalf` gives what `Whole` gives, token for token, and on the CPU bit
  for bit in the logits: it calls the language model with what `generate` calls it with.
- One thread, hence one order of additions: call `same_arithmetic_everywhere` first.

What is not here: pools, queues and processes.
"""

from __future__ import annotations

import gc
import hashlib
import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig

from qwen_vl.models import ModelSettings, make_language_half, make_vision_half, make_whole
from qwen_vl.prompts import Preparation, Prompt, is_visual


@dataclass(frozen=True)
class Embedded:
    """What crosses between the halves, and nothing else does.

    fields  as in the pool: `input_embeddings` [n, hidden], `fill_ids` [n] int32, `mrope_positions`
            [3, n] int32 and, for Qwen3-VL, `deepstack_embeddings` [n, layers * hidden]
    delta   mrope position delta: token i of the answer stands at position n + i + delta
    """

    fields: Mapping[str, torch.Tensor]
    delta: int

    @property
    def num_tokens(self) -> int:
        """n."""
        return len(self.fields["fill_ids"])

    @property
    def digest(self) -> str:
        """Differs when any bit of what crosses does."""
        names = sorted(self.fields)
        return " ".join([*(digest(self.fields[name]) for name in names), str(self.delta)])

    def copy(self) -> Embedded:
        """The same in memory of its own; on a GPU, as its stream comes to it."""
        return Embedded({name: self.fields[name].clone() for name in self.fields}, self.delta)


@dataclass(frozen=True)
class Step:
    """One generated token, and what it was chosen by."""

    token: int
    logits: torch.Tensor  # [vocab] float32, as `generate` gives them

    @property
    def digest(self) -> str:
        """Differs when any bit of the logits does."""
        return digest(self.logits)


def digest(tensor: torch.Tensor) -> str:
    """A short hash of a tensor's bytes."""
    data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def same_arithmetic_everywhere(settings: ModelSettings) -> None:
    """Equal sums in every process: one thread on the CPU; on a GPU as `settings.is_exact` says.

    Fast kernels of a GPU need not give the same bits twice: the unsplit 7b model's own logits
    differed from one run to the next, from the second token on. `is_exact` asks for those that do:
    attention by matrix products, and no algorithm whose order of additions is open. Call it first:
    cuBLAS reads its setting when it starts.
    """
    torch.set_num_threads(1)
    if settings.device == "cpu" or not settings.is_exact:
        return
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def return_memory(settings: ModelSettings) -> None:
    """To the GPU, after a model was dropped: torch keeps it for this process otherwise."""
    gc.collect()
    if settings.device != "cpu":
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------ vision half


class VisionHalf:
    """Images to embeddings, and the prompt around them."""

    def __init__(self, settings: ModelSettings) -> None:
        self.model = make_vision_half(settings)
        self.prepare = Preparation(settings)
        self._layers = settings.size.num_deepstack
        self._hidden = settings.size.hidden

    @torch.inference_mode()
    def __call__(self, prepared: Mapping[str, Any]) -> Embedded:
        """Run the model up to the call of its language model. `prepared`: of `self.prepare`."""
        self.model(**prepared, use_cache=False)
        given = self.model.language_model.given
        self.model.language_model.given = {}
        ids = prepared["input_ids"][0]
        fields = {
            "input_embeddings": given["inputs_embeds"][0],
            "fill_ids": ids.to(torch.int32),
            "mrope_positions": self._positions(given, len(ids)),
        }
        if self._layers:
            fields["deepstack_embeddings"] = self._deepstack(given, len(ids))
        delta = 0 if given["position_ids"] is None else int(self.model.rope_deltas)
        return Embedded(fields, delta)

    def _positions(self, given: Mapping[str, Any], count: int) -> torch.Tensor:
        positions = given["position_ids"]
        if positions is None:  # text alone: the model counts
            device = given["inputs_embeds"].device
            return torch.arange(count, dtype=torch.int32, device=device).expand(3, -1)
        three: torch.Tensor = positions[-3:, 0].to(torch.int32)
        return three

    def _deepstack(self, given: Mapping[str, Any], count: int) -> torch.Tensor:
        """[n, layers * hidden]: a visual token's row for each layer, zeros for text."""
        embeds, mask = given["deepstack_visual_embeds"], given["visual_pos_masks"]
        made = given["inputs_embeds"].new_zeros(count, self._layers, self._hidden)
        if embeds is not None:
            made[mask[0]] = torch.stack(list(embeds), dim=1).to(made.dtype)
        flat: torch.Tensor = made.flatten(1)
        return flat


# ---------------------------------------------------------------------------- language half


class LanguageHalf:
    """Embeddings to tokens."""

    def __init__(self, settings: ModelSettings) -> None:
        self.model = make_language_half(settings)
        self._language = self.model.model.language_model
        self._device = settings.device
        self._visual = settings.tokens.visual
        self._layers, self._hidden = settings.size.num_deepstack, settings.size.hidden
        # Its name has changed between versions of transformers.
        names = inspect.signature(type(self._language).forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"

    @torch.inference_mode()
    def generate(self, embedded: Embedded, count: int) -> Iterator[Step]:
        """`count` tokens, one by one. The fields are read before the first one is given."""
        cache = DynamicCache(config=self._language.config)
        rows = embedded.fields["input_embeddings"].unsqueeze(0)
        positions = embedded.fields["mrope_positions"].long().unsqueeze(1)
        more = self._deepstack(embedded)
        index, delta = embedded.num_tokens, embedded.delta
        del embedded
        for _ in range(count):
            yield (step := self._step(rows, positions, cache, **more))
            rows = self._language.embed_tokens(torch.tensor([[step.token]], device=self._device))
            positions = torch.full((3, 1, 1), index + delta, device=self._device)
            index, more = index + 1, {}

    def _step(self, rows: torch.Tensor, positions: torch.Tensor, cache: Any, **more: Any) -> Step:  # noqa: ANN401
        more[self._cache_name] = cache
        out = self._language(inputs_embeds=rows, position_ids=positions, use_cache=True, **more)
        logits = self.model.lm_head(out.last_hidden_state[:, -1:])[0, -1].float()
        return Step(int(logits.argmax()), logits)

    def _deepstack(self, embedded: Embedded) -> dict[str, Any]:
        if not self._layers:
            return {}
        mask = is_visual(embedded.fields["fill_ids"], self._visual)
        rows = embedded.fields["deepstack_embeddings"][mask].view(-1, self._layers, self._hidden)
        return {
            "visual_pos_masks": mask.unsqueeze(0),
            "deepstack_visual_embeds": [rows[:, layer] for layer in range(self._layers)],
        }


# ------------------------------------------------------------------------------------ whole


class Whole:
    """The unsplit model, as its makers run it."""

    def __init__(self, settings: ModelSettings) -> None:
        self.model = make_whole(settings)
        self.prepare = Preparation(settings)

    @torch.inference_mode()
    def generate(self, prepared: Mapping[str, Any], count: int) -> list[Step]:
        """`count` tokens by `generate` of transformers."""
        greedy = GenerationConfig(
            do_sample=False,
            max_new_tokens=count,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        made = self.model.generate(**prepared, generation_config=greedy)
        tokens = made.sequences[0, prepared["input_ids"].shape[1] :].tolist()
        return [Step(token, logits[0]) for token, logits in zip(tokens, made.logits, strict=True)]

    def answer(self, prompt: Prompt, count: int) -> list[Step]:
        """From the prompt on."""
        return self.generate(self.prepare(prompt), count)
