"""Transfers between two processes over a CUDA pool that is full and spills into host memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal, NamedTuple, cast

import msgspec
import pytest
import torch

from shmblocks import BlockPool, HandleQueue
from shmblocks.transfer import EmbeddingEndpoint, LanguageEndpoint
from tests.gpu import kit
from tests.support.children import Channel, spawn
from tests.transfer.steps import no_blocks

Mode = Literal["landing", "push"]
ROUNDS = 12
MESSAGE_BYTES = 4096
PATIENCE = 120.0


class Names(NamedTuple):
    """What both processes meet by."""

    pool: str
    spill: str
    there: str
    back: str


def names(pool_name: str) -> Names:
    return Names(pool_name, f"{pool_name}-spill", f"{pool_name}-there", f"{pool_name}-back")


@contextlib.contextmanager
def created(name: Names) -> Iterator[EmbeddingEndpoint]:
    """The embedding side, on a CUDA pool and a host pool."""
    with (
        kit.create(name.pool) as pool,
        BlockPool.create(
            name.spill, msgspec.structs.replace(pool.config, device="cpu"), prefault="off"
        ) as spill,
        HandleQueue.create(name.there, message_bytes=MESSAGE_BYTES) as there,
        HandleQueue.create(name.back, message_bytes=MESSAGE_BYTES) as back,
        EmbeddingEndpoint(pool, there, back, spill=spill) as endpoint,
    ):
        yield endpoint
        spill.reap()
        assert spill.available_blocks() == spill.config.total_blocks
        assert spill.check() == []


def rows(num_tokens: int, seed: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randint(
        -(2**31), 2**31 - 1, (num_tokens, kit.WIDTH), dtype=torch.int32, device="cuda",
        generator=generator,
    )  # fmt: skip


def tokens_of(seed: int) -> int:
    return 1 + seed * 7919 % (4 * kit.TOKENS)


def receive_all(channel: Channel, name: Names, mode: Mode) -> tuple[int, int, str]:
    """Rounds that spilled, results that were wrong, and where the last one lay."""
    wrong = 0
    with (
        BlockPool.attach(name.pool, prefault="off") as pool,
        BlockPool.attach(name.spill, prefault="off") as spill,
        HandleQueue.attach(name.back) as tx,
        HandleQueue.attach(name.there) as rx,
        LanguageEndpoint(pool, tx, rx, spill=spill) as endpoint,
    ):
        where = ""
        for seed in range(ROUNDS):
            with endpoint.receive(seed, mode).wait(PATIENCE) as result:
                got = result["rows"]
                wrong += not torch.equal(got, rows(tokens_of(seed), seed))
                where = str(got.device)
                torch.cuda.synchronize()
        return endpoint.stats().spilled, wrong, where


@pytest.mark.parametrize("mode", ["landing", "push"])
@pytest.mark.parametrize("is_full", [True, False], ids=["full", "with room"])
def test_a_full_cuda_pool_spills_and_the_results_are_the_same(
    pool_name: str, mode: Mode, is_full: bool
) -> None:
    name = names(pool_name)
    with created(name) as endpoint:
        with (
            no_blocks(endpoint.pool) if is_full else contextlib.nullcontext(),
            spawn(receive_all, name, mode) as child,
        ):
            for seed in range(ROUNDS):
                endpoint.send(seed, {"rows": rows(tokens_of(seed), seed)}).wait(PATIENCE)
            spilled, wrong, where = cast("tuple[int, int, str]", child.result(PATIENCE))
        print(f"{mode}: {spilled} rounds spilled")
        assert (wrong, where) == (0, "cuda:0")
        assert spilled >= ROUNDS if is_full else spilled == 0
        assert endpoint.stats().spilled == spilled
        torch.cuda.synchronize()
        assert endpoint.pool.available_blocks() == endpoint.pool.config.total_blocks
