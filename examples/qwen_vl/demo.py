"""Qwen2.5-VL and Qwen3-VL split in two, compared with the same models unsplit.

    python -m qwen_vl.demo                            both models, small, on the CPU
    python -m qwen_vl.demo --size tiny                seconds
    python -m qwen_vl.demo --family qwen3-vl --size 8b --device cuda:0

Every prompt (images of several shapes, several images, videos) goes to the language processes in
every way: landing, push, and fan-out to both. Each answer is compared with `generate` of
transformers on the unsplit model: the same tokens and the same bits in the prefill's logits and,
without --fast, in those of every step. What each language process was given is compared with what
was sent. Exit code 1 when anything of that differs.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import get_args

from qwen_vl.cases import cases
from qwen_vl.children import ChildError
from qwen_vl.engine import Engine, NoAnswerError, Request
from qwen_vl.halves import Step, Whole, return_memory, same_arithmetic_everywhere
from qwen_vl.handoff import PoolTransport
from qwen_vl.messages import Crossed, Holding, Ready, Sent, Token, Way
from qwen_vl.models import ModelSettings
from qwen_vl.prompts import Prompt
from qwen_vl.sizes import FAMILIES, SIZE_NAMES, SIZES
from shmblocks import ShmBlocksError, list_pools

READERS = 2
WAYS: tuple[Way, ...] = get_args(Way)
HEADER = (
    "prompt         way      tokens  blocks  rounds  in place    MiB  embed ms  handoff ms"
    "  crossed  tokens  prefill  logits  answer"
)


@dataclass
class Reported:
    """What one attempt's processes have said."""

    sent: Sent | None = None
    holding: dict[int, Holding] = field(default_factory=dict)
    crossed: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, list[Token]] = field(default_factory=dict)


def main() -> int:
    args = parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave through every `with`
    try:
        right = [asyncio.run(show(settings, args)) for settings in chosen(args)]
    except KeyboardInterrupt:
        print("demo: stopped", file=sys.stderr)
        return 130
    except (ShmBlocksError, ChildError, NoAnswerError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0 if all(right) else 1


def chosen(args: argparse.Namespace) -> list[ModelSettings]:
    """The models to show: of each family, the size if it has it."""
    families = [args.family] if args.family else FAMILIES
    return [
        ModelSettings(family, args.size, args.seed, args.device, is_exact=not args.fast)
        for family in families
        if args.size in SIZES[family] or args.family
    ]


async def show(settings: ModelSettings, args: argparse.Namespace) -> bool:
    """One model; whether all of it was as it must be."""
    print(f"\n{settings.family}, size {settings.size_name}, {settings.dtype}, {settings.device}")
    same_arithmetic_everywhere(settings)
    prompts = cases(shrink=8 if settings.size_name == "tiny" else 1)
    names = Names()
    expected = reference(settings, prompts, args.tokens, names)
    name = f"qwen-{os.getpid()}"
    transport = PoolTransport(name, READERS)
    with transport.created(settings) as pool:
        async with Engine(settings, transport, READERS) as engine:
            ok = names.compare(await engine.wait_ready())
            print(HEADER)
            for case, prompt in prompts.items():
                for way in WAYS:
                    request = Request(prompt, args.tokens, way, True, with_digests=True)
                    reported = await collect(engine, request)
                    ok = row(case, way, reported, expected[case], settings) and ok
        violations, free, total = pool.check(), pool.available_blocks(), pool.config.total_blocks
        print(f"pool after: {free} of {total} blocks free, {len(violations)} violations by check()")
    left = [each.name for each in list_pools() if each.name == pool.name]
    print(f"segments left: {len(left)}")
    return ok and free == total and not violations and not left


def reference(
    settings: ModelSettings, prompts: dict[str, Prompt], count: int, names: Names
) -> dict[str, list[Step]]:
    """What the unsplit model answers, in this process; it is gone afterwards."""
    started = time.perf_counter()
    whole = Whole(settings)
    names.whole = {name for name, _ in whole.model.named_parameters()}
    answers = {}
    for case, prompt in prompts.items():
        answers[case] = [Step(s.token, s.logits.cpu()) for s in whole.answer(prompt, count)]
    print(f"unsplit: {len(prompts)} prompts in {time.perf_counter() - started:.1f} s")
    if settings.device != "cpu":
        again = {case: whole.answer(prompt, count) for case, prompt in prompts.items()}
        equal = sum(_same_bits(answers[case], again[case]) for case in prompts)
        print(f"unsplit, once more: {equal} of {len(prompts)} with the same bits in all logits")
    del whole
    return_memory(settings)
    return answers


def _same_bits(one: list[Step], other: list[Step]) -> bool:
    return [step.digest for step in one] == [step.digest for step in other]


async def collect(engine: Engine, request: Request) -> Reported:
    """One attempt to its end."""
    reported = Reported()
    async for who, what in engine.ask(request):
        if isinstance(what, Sent):
            reported.sent = what
        elif isinstance(what, Holding):
            reported.holding[who] = what
        elif isinstance(what, Crossed):
            reported.crossed[who] = what.digest
        else:
            reported.tokens.setdefault(who, []).append(what)
    return reported


def row(
    case: str, way: Way, reported: Reported, expected: list[Step], settings: ModelSettings
) -> bool:
    """Print one attempt; whether it is right."""
    wanted = [step.token for step in expected]
    digests = [step.digest for step in expected]
    answers = list(reported.tokens.values())
    same_tokens = all([token.token for token in answer] == wanted for answer in answers)
    same_first = all(answer[0].digest == digests[0] for answer in answers)
    same_logits = all([token.digest for token in answer] == digests for answer in answers)
    same_crossed = len(set(reported.crossed.values())) == 1 and len(reported.crossed) == 1 + len(
        answers
    )
    if reported.sent is None or not answers:
        return False
    held = max(reported.holding.values(), key=lambda holding: holding.at_ns)
    embed_ms = (reported.sent.ready_ns - reported.sent.started_ns) / 1e6
    handoff_ms = (held.at_ns - reported.sent.ready_ns) / 1e6
    first = settings.tokens.decode(wanted[:4])
    print(
        f"{case:13}  {way:7}  {held.num_tokens:6}  {held.num_blocks:6}  {held.rounds:6}"
        f"  {'yes' if held.is_zero_copy else 'no ':8}  {held.num_bytes / 2**20:5.2f}"
        f"  {embed_ms:8.0f}  {handoff_ms:10.2f}  {_word(same_crossed)}   {_word(same_tokens)}"
        f"  {_word(same_first)}   {_word(same_logits)}  {first}... x{len(answers)}",
        flush=True,
    )
    is_right = same_crossed and same_tokens and same_first
    return is_right and (same_logits or not settings.is_reproducible)


def _word(is_same: bool) -> str:
    return "same  " if is_same else "DIFFER"


class Names:
    """Proof that each process holds its half: parameter names, and memory of its own."""

    def __init__(self) -> None:
        self.whole: set[str] = set()

    def compare(self, ready: list[Ready]) -> bool:
        """Print what each process holds; whether it is what it must be."""
        embedding, *languages = ready
        held = [set(each.parameters) for each in ready]
        for who, each in zip(self._who(len(ready)), ready, strict=True):
            grown = (each.own_after - each.own_before) / 2**20
            print(
                f"{who}: {len(each.parameters)} parameters, {each.parameter_bytes / 2**20:.1f} MiB;"
                f" memory of its own grew by {grown:.1f} MiB: {summary(each.parameters)}"
            )
        shared = held[0] & held[1]
        print(
            f"together they are the unsplit model's {len(self.whole)} parameters;"
            f" on both sides: {', '.join(sorted(shared))}"
        )
        return (
            all(held[0] | each == self.whole for each in held[1:])
            and not any("visual" in name for each in languages for name in each.parameters)
            and not any(".layers." in name or "lm_head" in name for name in embedding.parameters)
        )

    def _who(self, count: int) -> list[str]:
        return ["embedding process", *(f"language process {i}" for i in range(count - 1))]


def summary(names: Iterable[str]) -> str:
    """Parameter names by their first parts."""
    counts: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        start = ".".join(parts[:3]) if parts[1] == "language_model" else ".".join(parts[:2])
        counts[start] = counts.get(start, 0) + 1
    return ", ".join(f"{start}.* ({count})" for start, count in counts.items())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=FAMILIES, help="one of them (default: both)")
    parser.add_argument("--size", choices=SIZE_NAMES, default="small")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N; the pool lies there too")
    parser.add_argument("--tokens", type=int, default=16, help="to generate (default 16)")
    parser.add_argument(
        "--fast", action="store_true", help="on a GPU: kernels that may give other bits each time"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the models' weights")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
