"""One real engine in this process, driven by JSON lines; `engines.py` is the other side.

    {"ask": [["china"], ...], "serial": true}     answers {"answers": [...]}; also "max_tokens"
    {"metadata": [["china", PARAMETERS], ...]}    the same without media
    {"slow_saves": 60.0}                          each save sleeps first, after an event "saving"
    {"bump": true}                                raise the epoch of the pool
    {"quit": true}

The engine runs in this one process (VLLM_ENABLE_V1_MULTIPROCESSING=0), so that it dies at once and
its connector can be watched: everything that it counts is told as {"event": NAME, "amount": ...}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from vllm_cases.photos import photo

PROMPT = "<|im_start|>user\n{}Describe the image in a few words.<|im_end|>\n<|im_start|>assistant\n"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


class Actor:
    """The engine, and the pipe to the one who started this process."""

    def __init__(self, settings: dict[str, Any]) -> None:
        # What vLLM and its libraries print goes to the log.
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        from vllm import LLM

        self._connector = settings.get("ec_transfer_config") is not None
        self._max_tokens = 8
        self._llm = LLM(
            enforce_eager=True,
            max_model_len=1024,
            max_num_seqs=4,
            dtype="float32",
            seed=0,
            kv_cache_memory_bytes=64 << 20,
            limit_mm_per_prompt={"image": 2, "video": 0},
            disable_log_stats=True,
            **settings,
        )
        if self._connector and "ShmBlocks" in settings["ec_transfer_config"]["ec_connector"]:
            self._watch()
        self.say(ready=True)

    def say(self, **what: object) -> None:
        print(json.dumps(what), file=self._out, flush=True)

    def _scheduler(self) -> Any:  # noqa: ANN401  vLLM's own
        return self._llm.llm_engine.engine_core.engine_core.scheduler

    def _watch(self) -> None:
        """Tell everything that either side counts."""
        from vllm.distributed.ec_transfer import get_ec_transfer

        worker: Any = get_ec_transfer()
        for side in (self._scheduler().ec_connector.scheduler, worker.worker):
            side.tally.add = self._telling(side.tally.add)

    def _telling(self, add: Callable[..., None]) -> Callable[..., None]:
        def tell(name: str, amount: float = 1) -> None:
            add(name, amount)
            self.say(event=name, amount=amount)

        return tell

    def slow_saves(self, seconds: float) -> None:
        from vllm.distributed.ec_transfer import get_ec_transfer

        connector: Any = get_ec_transfer()
        save = connector.save_caches

        def slow(**arguments: object) -> None:
            self.say(event="saving", amount=1)
            time.sleep(seconds)
            save(**arguments)

        connector.save_caches = slow
        self.say(done=True)

    def bump(self) -> None:
        self._scheduler().ec_connector.scheduler._pool.bump_epoch()
        # What an operator who has changed the weights does as well.
        self._llm.llm_engine.engine_core.engine_core.reset_encoder_cache()
        self.say(done=True)

    def ask(self, command: dict[str, Any]) -> None:
        self._max_tokens = command.get("max_tokens", 8)
        requests = [self._with_media(each, command.get("uuid")) for each in command.get("ask", ())]
        requests += [self._without_media(*each) for each in command.get("metadata", ())]
        began = time.perf_counter()
        outputs = []
        for group in [[each] for each in requests] if command.get("serial", True) else [requests]:
            prompts, parameters = zip(*group, strict=True)
            outputs += self._llm.generate(list(prompts), list(parameters), use_tqdm=False)
        answers = [_answer(output) for output in outputs]
        left = len(self._scheduler().requests)
        self.say(answers=answers, seconds=time.perf_counter() - began, left=left)

    def _with_media(self, names: list[str], uuid: str | None) -> tuple[Any, Any]:
        prompt: dict[str, Any] = {
            "prompt": PROMPT.format(IMAGE * len(names)),
            "multi_modal_data": {"image": [photo(name) for name in names]},
        }
        if uuid is not None:
            prompt["multi_modal_uuids"] = {"image": [uuid] * len(names)}
        return prompt, self._sampling(None)

    def _without_media(self, name: str, parameters: dict[str, Any]) -> tuple[Any, Any]:
        import torch

        ((identifier, item),) = parameters.items()
        grid = torch.tensor([item["metadata"]["image_grid_thw"]])
        prompt = {
            "prompt": PROMPT.format(IMAGE),
            "multi_modal_data": {"image": {"image_grid_thw": grid}},
            "multi_modal_uuids": {"image": [identifier]},
        }
        return prompt, self._sampling(parameters)

    def _sampling(self, parameters: dict[str, Any] | None) -> Any:  # noqa: ANN401  vLLM's own
        from vllm import SamplingParams

        extra: dict[str, object] | None = (
            None if parameters is None else {"ec_transfer_params": parameters}
        )
        return SamplingParams(
            temperature=0.0,
            max_tokens=self._max_tokens,
            ignore_eos=True,
            logprobs=1,
            extra_args=extra,
        )


def _answer(output: Any) -> dict[str, object]:  # noqa: ANN401  vLLM's own
    first = output.outputs[0] if output.outputs else None
    return {
        "tokens": list(first.token_ids) if first is not None else None,
        "finish": first.finish_reason if first is not None else None,
        "parameters": output.ec_transfer_params,
    }


def main() -> None:
    actor = Actor(json.loads(sys.argv[1]))
    for line in sys.stdin:
        command = json.loads(line)
        if "quit" in command:
            break
        try:
            if "slow_saves" in command:
                actor.slow_saves(command["slow_saves"])
            elif "bump" in command:
                actor.bump()
            else:
                actor.ask(command)
        except Exception as error:  # noqa: BLE001  the other side decides what it means
            actor.say(error=repr(error)[:500])
    actor._llm.llm_engine.engine_core.shutdown()
    actor.say(bye=True)


if __name__ == "__main__":
    main()
