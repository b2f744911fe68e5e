"""Which items may be shared between instances, and under which key.

vLLM names an item by a hash of its content and of how it is processed, by a uuid that the client
has chosen, or, when nothing in the process needs hashes, by a number. Numbers are the same in every
process, for other pictures: they are refused.

Contract
- Two instances find each other's encodings only when everything that shapes them is the same:
  vLLM, model, revision, dtype, quantization, the configs of the encoders, the operator's
  `namespace`, and the epoch of the pool.
- A client's uuid is taken on trust, as vLLM takes it: who reuses one for another picture of the
  same size is served the wrong one. `only_content_hashes` shares none of them.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from shmblocks.keys import Namespace, content_key

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# blake3 or sha256, or sha512; with tower LoRA the adapter's name stands before it.
_CONTENT_HASH = re.compile(r"(?:.*:)?(?:[0-9a-f]{64}|[0-9a-f]{128})", re.DOTALL)
# vllm/renderers: "renderer0-mm-7-image-0".
_NUMBERED = re.compile(r"(?:.*:)?renderer\d+-mm-\d+-", re.DOTALL)
# The parts of a Hugging Face config that shape what an encoder makes.
_ENCODER_CONFIGS = ("vision_config", "audio_config")


class Identity:
    """The keys of one instance."""

    def __init__(self, namespace: Namespace, *, only_content_hashes: bool) -> None:
        self._digest = namespace.digest()
        self._only_content_hashes = only_content_hashes

    @property
    def name(self) -> str:
        """A short name of the namespace, for log lines."""
        return self._digest.hex()[:8]

    def may_share(self, identifier: str) -> bool:
        """Whether an item of that name is the same for every instance."""
        if self._only_content_hashes:
            return _CONTENT_HASH.fullmatch(identifier) is not None
        return _NUMBERED.match(identifier) is None

    def key(self, identifier: str, epoch: int) -> bytes:
        """The key of an item; `epoch`: the pool's."""
        return content_key(self._digest + epoch.to_bytes(8, "little"), identifier)


def namespace_of(vllm_config: VllmConfig, version: str, salt: str) -> Namespace:
    """What has to be equal for encodings to be equal. `version`: vLLM's."""
    model = vllm_config.model_config
    encoders = {
        name: found.to_dict()
        for name in _ENCODER_CONFIGS
        if (found := getattr(model.hf_config, name, None)) is not None
    }
    rest = [version, str(model.quantization), model.get_inputs_embeds_size(), encoders]
    return Namespace(
        model=model.model,
        revision=model.revision or "",
        dtype=str(model.dtype),
        config=json.dumps(rest, sort_keys=True, default=str),
        salt=salt,
    )


def refuse_what_cannot_be_shared(vllm_config: VllmConfig) -> None:
    """ValueError for settings under which items would be mixed up, or promises be broken."""
    multimodal = vllm_config.model_config.multimodal_config
    if (
        multimodal is not None
        and multimodal.mm_processor_cache_gb == 0
        and not vllm_config.cache_config.enable_prefix_caching
    ):
        raise ValueError(
            "ShmBlocksECConnector needs content hashes: with mm_processor_cache_gb=0 and prefix "
            "caching off, vLLM numbers the items of each process instead, and pictures would be "
            "mixed up between instances; set --mm-processor-cache-gb above 0, or enable prefix "
            "caching"
        )
    nodes = getattr(vllm_config.parallel_config, "nnodes", 1)
    if nodes > 1:
        raise ValueError(
            f"ShmBlocksECConnector: expected an instance whose workers run on one node, got "
            f"nnodes={nodes}: a promise of the scheduler could not be kept on another node"
        )
