"""SGLang's own `MMEncoder.send_with_url` and `_send`, with the plug-in, killed at every line.

    python -m sglang_cases.sending MODEL POOL      (POOL: what the names of its pools begin with)

A forked child is the encoder: its embedding is given, everything behind it is SGLang's and the
plug-in's. The parent is the rank that the embedding is announced to; it has a socket for messages.
After each death all blocks are free, or hold an embedding that was announced to the rank, whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from sglang_cases.handover import (
    ON_A_CPU,
    WIDTH,
    encoder_without_model,
    give_embedding,
    start,
    total_of,
)
from shmblocks import BlockHandle, BlockPool
from shmblocks.sglang_plugin import encoder as plugin
from shmblocks.sglang_plugin import gpu
from shmblocks.sglang_plugin.attachment import role_of
from shmblocks.sglang_plugin.settings import POOL, read_settings
from shmblocks.testing import Point, Scope, assert_survives, kill_at_every_line, within

ROWS = 4
# The least lines of a send; fewer: it went another way than through the hooks.
FEWEST = 60
PART = "request_local_part_0"
_numbers = itertools.count(1)


class Scene:
    """The rank's pool and address."""

    def __init__(self, pool: BlockPool, url: str) -> None:
        self.pool = pool
        self.url = url
        # Kept until death: what is dropped is given back.
        self.kept: list[object] = []


@contextlib.contextmanager
def scene(prefix: str) -> Iterator[Scene]:
    import zmq

    os.environ[POOL] = f"{prefix}-{next(_numbers)}"
    settings = read_settings()
    if settings is None:
        raise RuntimeError(f"{POOL} says nothing")
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        socket.linger = 0
        url = f"127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"
        role = role_of(url)
        with BlockPool.create(settings.pool, settings.config(), role=role, prefault="off") as pool:
            yield Scene(pool, url)


def embedding() -> object:
    import torch

    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, WIDTH, generator=generator).to(torch.bfloat16)


def real_send(scene: Scene) -> Callable[[], object]:
    """In the child: an encoder that has computed an embedding, and is asked for it."""
    import torch

    torch.set_num_threads(1)
    encoder = encoder_without_model()
    state = give_embedding(encoder, PART, embedding(), [scene.url])
    scene.kept += [encoder, state]
    return lambda: asyncio.run(encoder.send_with_url(PART))


def verify(scene: Scene, point: Point) -> None:
    import torch

    pool = scene.pool
    assert_survives(pool)
    pool.reap()
    announced = 0
    for info in pool.allocations():
        kinds = [lease.kind for lease in info.leases]
        if kinds != ["announced"]:
            raise AssertionError(f"{info}: expected a claim of the rank's, and nothing else")
        handle = BlockHandle(
            info.start_block, info.num_blocks, info.num_tokens, info.generation, pool.pool_id
        )
        with within(1.0, "opening what was announced"), pool.open(handle) as lease:
            read = lease.tensor(torch.bfloat16, (ROWS, WIDTH))
            if total_of(read) != total_of(embedding()):
                raise AssertionError(f"{handle}: other bytes than were sent")
        announced += 1
    if point.is_end and announced != 1:
        raise AssertionError(f"sent to its end: expected 1 embedding in the pool, got {announced}")
    if pool.available_blocks() != pool.config.total_blocks:
        raise AssertionError(f"left: {pool.allocations()}")


def main() -> int:
    """Kill it everywhere."""
    model, prefix = sys.argv[1:]
    os.environ |= ON_A_CPU | {
        POOL: prefix,
        "SHMBLOCKS_SGLANG_POOL_MB": "4",
        "SHMBLOCKS_SGLANG_MIN_BYTES": "0",
    }
    start(Path(model), "encoder", "--encoder-only")
    from sglang.srt.disaggregation.encoder import server

    scope = Scope([plugin, gpu, server], library=False)
    setup = functools.partial(scene, prefix)
    coverage = kill_at_every_line(setup, real_send, verify, scope=scope)
    files = {point.file for point in coverage.points}
    for module in (plugin, server):
        if module.__file__ not in files:
            raise AssertionError(f"no line of {module.__name__} was run")
    if len(coverage.points) < FEWEST:
        raise AssertionError(f"{coverage}: expected at least {FEWEST} lines")
    print(coverage)
    return 0


if __name__ == "__main__":
    sys.exit(main())
