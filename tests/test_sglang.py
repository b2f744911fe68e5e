"""`shmblocks.sglang`: an engine that has the original changes an import; two processes agree."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from shmblocks import IncompatiblePoolError, StaleHandleError
from shmblocks.sglang import (
    MetadataAllocation,
    MultimodalDataBuffers,
    ReqToMetadataBlockAllocator,
)
from tests.support.children import Channel, fork, run_in_fork

HIDDEN = 48


@dataclass
class Inputs:
    mrope_positions: torch.Tensor | None
    mrope_position_delta: torch.Tensor | None


@dataclass
class Request:
    embedding: torch.Tensor
    fill_ids: list[int]
    multimodal_inputs: Inputs | None
    deepstack_embedding: torch.Tensor | None = None


def a_request(tokens: int, seed: int, deepstack: int = 0) -> Request:
    generator = torch.Generator().manual_seed(seed)
    return Request(
        embedding=torch.randn(tokens, HIDDEN, generator=generator).bfloat16(),
        fill_ids=torch.randint(0, 1000, (tokens,), generator=generator).tolist(),
        multimodal_inputs=Inputs(
            torch.randint(0, 99, (3, tokens), generator=generator), torch.tensor([[-seed]])
        ),
        deepstack_embedding=torch.randn(tokens, deepstack, HIDDEN, generator=generator).bfloat16()
        if deepstack
        else None,
    )


@pytest.fixture
def allocator(pool_name: str) -> Iterator[ReqToMetadataBlockAllocator]:
    allocator = ReqToMetadataBlockAllocator(8192, 128, name=pool_name)
    yield allocator
    allocator.close()


@pytest.fixture
def buffers(pool_name: str) -> Iterator[MultimodalDataBuffers]:
    buffers = MultimodalDataBuffers(8, 1024, HIDDEN, 128, 2, name=pool_name)
    yield buffers
    buffers.close()


def test_the_trace_of_the_original_with_its_two_sides_in_two_processes(
    allocator: ReqToMetadataBlockAllocator, pool_name: str
) -> None:
    def language_side(channel: Channel) -> None:
        mine = ReqToMetadataBlockAllocator(8192, 128, name=pool_name)
        landing = mine.alloc_default(req_id="r1")
        assert landing == MetadataAllocation(0, 8, 1024)
        mine.free(landing, "r1")
        channel.say("landing freed")
        channel.hear("976 allocated")
        channel.say(mine.available_blocks())
        mine.close()

    with fork(language_side) as language:
        language.hear("landing freed")
        assert allocator.alloc(976) == MetadataAllocation(8, 8, 976)
        language.say("976 allocated")
        language.hear(64 - 8)
    assert allocator.alloc(2000) == MetadataAllocation(16, 16, 2000)


def test_a_fake_allocation_touches_nothing(allocator: ReqToMetadataBlockAllocator) -> None:
    fake = allocator.alloc(300, req_id="warm-up", fake=True)
    assert fake == MetadataAllocation(0, 3, 300)
    allocator.free(fake)
    allocator.free(fake, fake=True)
    assert allocator.alloc_default(fake=True) == MetadataAllocation(0, 8, 1024)
    assert allocator.available_blocks() == 64


def test_what_can_never_be_served_is_none(allocator: ReqToMetadataBlockAllocator) -> None:
    assert allocator.alloc(8193) is None
    assert allocator.available_blocks() == 64


def test_tokens_are_rounded_up_to_whole_blocks(pool_name: str) -> None:
    allocator = ReqToMetadataBlockAllocator(1000, 128, name=pool_name)
    assert allocator.num_blocks == allocator.available_blocks() == 8
    allocator.close()


def test_an_allocation_is_freed_by_its_numbers_and_not_twice(
    allocator: ReqToMetadataBlockAllocator,
) -> None:
    first, second = allocator.alloc(976), allocator.alloc(100)
    assert first is not None
    assert second is not None
    allocator.free(MetadataAllocation(first.start_block, first.num_blocks, first.num_tokens))
    with pytest.raises(StaleHandleError):
        allocator.free(first)
    with pytest.raises(StaleHandleError):
        allocator.free(MetadataAllocation(first.start_block, first.num_blocks, first.num_tokens))
    allocator.free(second)
    assert allocator.available_blocks() == 64


def test_an_allocation_crosses_a_pickle_and_still_proves_itself(
    allocator: ReqToMetadataBlockAllocator,
) -> None:
    allocation = allocator.alloc(128)
    copied = pickle.loads(pickle.dumps(allocation))
    allocator.free(copied)
    with pytest.raises(StaleHandleError):
        allocator.free(copied)


def test_environment_variables_set_the_defaults(
    pool_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_MULTIMODAL_BLOCK_SIZE", "64")
    monkeypatch.setenv("SGLANG_DEFAULT_MULTIMODAL_BLOCKS", "4")
    allocator = ReqToMetadataBlockAllocator(8192, name=pool_name)
    assert (allocator.block_size, allocator.default_num_blocks) == (64, 4)
    assert allocator.alloc_default() == MetadataAllocation(0, 4, 256)
    allocator.close()
    monkeypatch.setenv("SGLANG_MULTIMODAL_BLOCK_SIZE", "many")
    with pytest.raises(ValueError, match="SGLANG_MULTIMODAL_BLOCK_SIZE: expected a whole number"):
        ReqToMetadataBlockAllocator(8192, name=pool_name)


def test_processes_that_disagree_on_the_sizes_are_told(
    allocator: ReqToMetadataBlockAllocator, pool_name: str
) -> None:
    with pytest.raises(IncompatiblePoolError, match="other sizes"):
        ReqToMetadataBlockAllocator(4096, 128, name=pool_name)


@pytest.mark.parametrize("named", [True, False])
def test_what_one_process_sets_another_gets_bit_for_bit(named: bool, pool_name: str) -> None:
    name = pool_name if named else None
    allocator = ReqToMetadataBlockAllocator(8192, 128, name=name)
    buffers = MultimodalDataBuffers(8, 1024, HIDDEN, 128, 2, name=name)
    allocator.alloc(200)
    allocation = allocator.alloc(300)
    assert allocation is not None
    request = a_request(300, seed=7, deepstack=2)

    def embedding_side() -> None:
        buffers.set_buf(request, allocation)

    run_in_fork(embedding_side)
    embeddings, fill_ids, mrope, aux, deepstack = buffers.get_buf(allocation)
    assert request.multimodal_inputs is not None
    assert request.multimodal_inputs.mrope_positions is not None
    assert request.deepstack_embedding is not None
    assert torch.equal(embeddings, request.embedding)
    assert fill_ids.tolist() == request.fill_ids
    assert torch.equal(mrope, request.multimodal_inputs.mrope_positions.int())
    assert aux.tolist() == [300, -7, *[0] * 14]
    assert torch.equal(deepstack, request.deepstack_embedding.reshape(300, -1))
    buffers.close()
    allocator.close()


def test_infos_and_chunks_are_in_the_order_of_get_buf(
    allocator: ReqToMetadataBlockAllocator, buffers: MultimodalDataBuffers
) -> None:
    allocator.alloc(128)
    allocation = allocator.alloc(1000)
    assert allocation is not None
    pointers, lengths, per_block = buffers.get_buf_infos()
    first = buffers.get_buf(allocation)
    chunk = buffers.get_buf_chunk_info(allocation, offset_tokens=0)
    for tensor, pointer, length, (offset, size), item in zip(
        first, pointers, lengths, chunk, per_block, strict=True
    ):
        assert tensor.data_ptr() == pointer + offset
        assert tensor.nbytes == size
        assert offset + size <= length
        assert length == item * buffers.num_blocks


def test_a_chunk_is_a_slice_of_every_field(
    allocator: ReqToMetadataBlockAllocator, buffers: MultimodalDataBuffers
) -> None:
    allocation = allocator.alloc(1000)
    assert allocation is not None
    sizes = [HIDDEN * 2, 4, 12, None, 2 * HIDDEN * 2]
    assert buffers.get_buf_chunk_info(allocation, 600, 1024) == [
        (0, 64) if size is None else (600 * size, 400 * size) for size in sizes
    ]
    assert buffers.get_buf_chunk_info(allocation, 100, 0)[0] == (100 * HIDDEN * 2, 0)
    with pytest.raises(ValueError, match="offset_tokens: expected 0 to 1000, got 1001"):
        buffers.get_buf_chunk_info(allocation, 1001)
    with pytest.raises(ValueError, match="max_tokens: expected at least 0, got -1"):
        buffers.get_buf_chunk_info(allocation, 0, -1)


def test_numbers_that_leave_the_buffers_are_refused(buffers: MultimodalDataBuffers) -> None:
    for wrong in [(63, 2, 200), (-1, 1, 10), (0, 1, 129)]:
        with pytest.raises(ValueError, match="allocation: expected blocks below 64"):
            buffers.get_buf(MetadataAllocation(*wrong))
    with pytest.raises(ValueError, match="expected at most the 128 tokens"):
        buffers.set_buf(a_request(129, seed=1), MetadataAllocation(0, 1, 128))


def test_without_deepstack_there_are_four_buffers(pool_name: str) -> None:
    buffers = MultimodalDataBuffers(2, 128, HIDDEN, 128, name=pool_name)
    assert buffers.deepstack_embeddings is None
    assert len(buffers.get_buf(MetadataAllocation(0, 1, 5))) == len(buffers.get_buf_infos()[0]) == 4
    buffers.close()


def test_the_dead_owner_of_an_allocation_does_not_keep_it(
    allocator: ReqToMetadataBlockAllocator, pool_name: str
) -> None:
    def hold_all(channel: Channel) -> None:
        mine = ReqToMetadataBlockAllocator(8192, 128, name=pool_name)
        assert mine.alloc(8192) is not None
        channel.say("taken")
        channel.hear("never said")

    with fork(hold_all) as holder:
        holder.hear("taken")
        assert allocator.alloc(1) is None
        holder.kill()
    assert allocator.alloc(8192) is not None
    assert allocator.pool.check() == []
    assert os.getpid() == allocator.pool.participants()[0].pid
