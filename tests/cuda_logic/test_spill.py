"""A CUDA pool that spills into host memory: what arrives lies where everything else does."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Literal, NamedTuple

import msgspec
import pytest
import torch

from shmblocks import BlockPool
from shmblocks.transfer import EmbeddingEndpoint, LanguageEndpoint, Status, TransferResult
from tests.core.conftest import require_right
from tests.cuda_logic.fakes import STREAM, FakeGpu
from tests.transfer.steps import no_blocks

Mode = Literal["landing", "push"]
MODES: tuple[Mode, ...] = ("landing", "push")


class Spilling(NamedTuple):
    """Both sides in this process."""

    pool: BlockPool
    spill: BlockPool
    embedding: EmbeddingEndpoint
    language: LanguageEndpoint
    gpu: FakeGpu


@pytest.fixture
def both(cuda_pool: BlockPool, pool_name: str, gpu: FakeGpu) -> Iterator[Spilling]:
    tx: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    rx: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    host = msgspec.structs.replace(cuda_pool.config, device="cpu")
    with (
        BlockPool.create(f"{pool_name}-spill", host, prefault="off") as spill,
        EmbeddingEndpoint(cuda_pool, tx, rx, spill=spill) as embedding,
        LanguageEndpoint(cuda_pool, rx, tx, spill=spill) as language,
    ):
        yield Spilling(cuda_pool, spill, embedding, language, gpu)
        assert spill.available_blocks() == spill.config.total_blocks
        require_right(spill)
        gpu.run(STREAM)


def tensors(num_tokens: int) -> dict[str, torch.Tensor]:
    rows = torch.arange(num_tokens * 4, dtype=torch.int32).view(num_tokens, 4)
    return {"rows": rows, "ids": torch.arange(num_tokens)}


def transfer(both: Spilling, num_tokens: int, mode: Mode) -> TransferResult:
    receiver = both.language.receive(1, mode)
    sender = both.embedding.send(1, tensors(num_tokens))
    for _ in range(10):
        for endpoint in (both.embedding, both.language):
            endpoint.poll()
            both.gpu.run(STREAM)
    assert sender.status is Status.Success, sender.failure
    return receiver.wait(0)


@pytest.mark.parametrize("mode", MODES)
def test_what_spilled_is_moved_to_the_gpu_and_leaves_the_spill_pool(
    both: Spilling, mode: Mode
) -> None:
    with no_blocks(both.pool), transfer(both, 20, mode) as result:
        assert not result.is_zero_copy
        assert both.spill.allocations() == []
        for name, sent in tensors(20).items():
            assert torch.equal(result[name], sent)
            assert result[name].device == both.pool.field(name).device
    assert (both.embedding.stats().spilled, both.language.stats().spilled) == (
        result.rounds,
        result.rounds,
    )


def test_a_landing_that_spilled_half_way_arrives_in_one_place(both: Spilling) -> None:
    landing = both.pool.config.default_num_blocks
    num_tokens = landing * both.pool.config.block_size + 4
    with no_blocks(both.pool, free_blocks=landing), transfer(both, num_tokens, "landing") as result:
        assert (result.rounds, both.language.stats().spilled) == (2, 1)
        assert len(result.parts("rows")) == 1
        assert both.spill.allocations() == []
        for name, sent in tensors(num_tokens).items():
            assert torch.equal(result[name], sent)


def test_a_pool_on_a_gpu_is_nothing_to_spill_to(both: Spilling) -> None:
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with pytest.raises(ValueError, match="expected a pool in host memory"):
        EmbeddingEndpoint(both.spill, messages, messages, spill=both.pool)
