"""Time to the first token: unsplit, split over the pool, and split over torch's queue.

    python -m qwen_vl.latency --family qwen2.5-vl --size small --json latency.json
    python -m qwen_vl.plot latency.json --out qwen_vl/latency.png

From the prompt (encoded pictures) to the first token, in the launcher for the split ones. All kinds
run alternately, so that a busy moment of the machine hits each of them; medians are printed. The
parts:

    prepare   decoding, resizing and normalising the pictures
    vision    the vision tower, and the merging of its embeddings with the text's
    handoff   from the embeddings in the embedding process's memory, until the language process
              holds them as tensors
    prefill   the language model over the prompt, up to the first token's choice
    rest      messages between launcher and processes
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import torch

from qwen_vl.cases import cases
from qwen_vl.engine import Engine, Request
from qwen_vl.halves import Whole, same_arithmetic_everywhere
from qwen_vl.handoff import PoolTransport
from qwen_vl.messages import Holding, Sent, Token, Way
from qwen_vl.models import ModelSettings
from qwen_vl.prompts import Prompt
from qwen_vl.sizes import FAMILIES, SIZE_NAMES
from qwen_vl.torch_queue import TorchQueueTransport

KINDS = ("unsplit", "pool, push", "pool, landing", "torch queue")
PARTS = ("prepare", "vision", "handoff", "prefill", "rest")
PROMPTS = ("one image", "three images", "large", "video")


class Parts(msgspec.Struct, frozen=True):
    """One request, in ms. `prefill` of the unsplit model has its vision tower in it."""

    total: float
    prepare: float = 0.0
    vision: float = 0.0
    handoff: float = 0.0
    prefill: float = 0.0

    @property
    def rest(self) -> float:
        """What is in none of the parts."""
        return self.total - self.prepare - self.vision - self.handoff - self.prefill


class Series(msgspec.Struct, frozen=True):
    """All rounds of one prompt by one kind."""

    prompt: str
    kind: str
    num_tokens: int
    num_bytes: int
    rounds: list[Parts]

    def median(self, part: str) -> float:
        """Of one part or of `total`, in ms."""
        return statistics.median(float(getattr(parts, part)) for parts in self.rounds)


class Results(msgspec.Struct, frozen=True):
    """One run."""

    family: str
    size: str
    device: str
    dtype: str
    torch_version: str
    series: list[Series]


async def measure(settings: ModelSettings, args: argparse.Namespace) -> Results:
    """All kinds, alternately."""
    whole = Whole(settings)
    async with AsyncExitStack() as stack:
        pool_transport = PoolTransport(f"qwen-latency-{os.getpid()}", 1)
        stack.enter_context(pool_transport.created(settings))
        pool = await stack.enter_async_context(Engine(settings, pool_transport, 1))
        plain = await stack.enter_async_context(Engine(settings, TorchQueueTransport.create(1), 1))
        await pool.wait_ready()
        await plain.wait_ready()
        prompts = cases(8 if args.size == "tiny" else 1)
        series = []
        for name in PROMPTS:
            series += await _prompt(name, prompts[name], whole, pool, plain, args.rounds)
    device = "cpu" if settings.device == "cpu" else torch.cuda.get_device_name(settings.device)
    return Results(
        settings.family,
        settings.size_name,
        device,
        str(settings.dtype).removeprefix("torch."),
        str(torch.__version__),
        series,
    )


async def _prompt(
    name: str, prompt: Prompt, whole: Whole, pool: Engine, plain: Engine, rounds: int
) -> list[Series]:
    got: dict[str, list[Parts]] = {kind: [] for kind in KINDS}
    size = (0, 0)
    for _ in range(1 + rounds):  # the first one warms up
        got["unsplit"].append(_unsplit(whole, prompt))
        for kind, engine, way in _split_kinds(pool, plain):
            parts, size = await _split(engine, prompt, way)
            got[kind].append(parts)
    return [Series(name, kind, *size, parts[1:]) for kind, parts in got.items()]


def _split_kinds(pool: Engine, plain: Engine) -> list[tuple[str, Engine, Way]]:
    ways: tuple[tuple[Engine, Way], ...] = ((pool, "push"), (pool, "landing"), (plain, "push"))
    return [(kind, *way) for kind, way in zip(KINDS[1:], ways, strict=True)]


def _unsplit(whole: Whole, prompt: Prompt) -> Parts:
    started = time.perf_counter()
    prepared = whole.prepare(prompt)
    done = time.perf_counter()
    whole.generate(prepared, 1)
    ended = time.perf_counter()
    return Parts(
        (ended - started) * 1e3, prepare=(done - started) * 1e3, prefill=(ended - done) * 1e3
    )


async def _split(engine: Engine, prompt: Prompt, way: Way) -> tuple[Parts, tuple[int, int]]:
    started = time.monotonic_ns()
    sent, holding, token_ns = None, None, 0
    async for _, event in engine.ask(Request(prompt, 1, way, is_timed=True)):
        if isinstance(event, Sent):
            sent = event
        elif isinstance(event, Holding):
            holding = event
        elif isinstance(event, Token):
            token_ns = time.monotonic_ns()
    if sent is None or holding is None:
        raise RuntimeError("the engine gave no times")
    ns = (
        token_ns - started,
        sent.prepared_ns - sent.started_ns,
        sent.ready_ns - sent.prepared_ns,
        holding.at_ns - sent.ready_ns,
        token_ns - holding.at_ns,
    )
    return Parts(*(each / 1e6 for each in ns)), (holding.num_tokens, holding.num_bytes)


def table(results: Results, say: Callable[[str], None]) -> None:
    """Medians, one row for each prompt and kind."""
    say(f"{results.family} {results.size}, {results.dtype}, {results.device}, medians in ms")
    say(f"{'prompt':13} {'kind':14} tokens    MiB  first token  handoff  " + " ".join(PARTS))
    for each in results.series:
        parts = "  ".join(f"{part} {each.median(part):.2f}" for part in PARTS)
        say(
            f"{each.prompt:13} {each.kind:14} {each.num_tokens:6} {each.num_bytes / 2**20:6.2f}"
            f"  {each.median('total'):11.1f}  {each.median('handoff'):7.2f}  {parts}"
        )


def main() -> int:
    args = parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave through every `with`
    settings = ModelSettings(args.family, args.size, args.seed, args.device)
    same_arithmetic_everywhere(settings)
    try:
        results = asyncio.run(measure(settings, args))
    except KeyboardInterrupt:
        print("latency: stopped", file=sys.stderr)
        return 130
    table(results, print)
    if args.json:
        Path(args.json).write_bytes(msgspec.json.format(msgspec.json.encode(results)))
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=FAMILIES, default="qwen2.5-vl")
    parser.add_argument("--size", choices=SIZE_NAMES, default="small")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N; the pool lies there too")
    parser.add_argument("--rounds", type=int, default=7, help="of each kind (default 7)")
    parser.add_argument("--seed", type=int, default=0, help="of the models' weights")
    parser.add_argument("--json", help="write all times to this file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
