"""Views: tensors over the shared memory itself, of the right bytes, for as long as one is held."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from shmblocks import (
    BlockHandle,
    BlockPool,
    Field,
    InvalidStateError,
    PoolClosedError,
    StaleHandleError,
    multimodal_fields,
)
from shmblocks._state.layout import RECORD, RECORD_HEAD
from shmblocks.config import DTYPES, dtype_name
from tests.core import pools
from tests.support import procfs
from tests.support.children import Channel, fork, run_in_fork

BLOCK = 8
FIELDS = (
    Field("input_embeddings", (6,), "bf16"),
    Field("fill_ids", (), "int32"),
    Field("mrope_positions", (3,), "int32", transposed=True),
    Field("grid", (2, 3), "fp32"),
    *(Field(f"one_{dtype}", (5,), dtype) for dtype in DTYPES),
)


@pytest.fixture
def pool(pool_name: str) -> Iterator[BlockPool]:
    """12 blocks of 8 tokens, with a field of every dtype."""
    with pools.create(pool_name, pools.tiny(12, block_size=BLOCK, fields=FIELDS)) as made:
        yield made
        if not made.is_closed:
            assert made.check() == []


def taken(pool: BlockPool, num_tokens: int) -> BlockHandle:
    """Not the first blocks, so that an offset of 0 would be seen."""
    pools.take(pool, 2 * BLOCK)
    return pools.take(pool, num_tokens)


def stored_bytes(pool: BlockPool, field: Field, handle: BlockHandle) -> bytes:
    """The field's bytes in the segment, found without torch and the library's arithmetic."""
    offset = pool.state.layout.fields[field.name]
    begin = offset + handle.start_block * BLOCK * field.token_bytes
    memory = pool.state.segment.memory
    return bytes(memory[begin : begin + handle.num_tokens * field.token_bytes])


def pattern(field: Field, num_tokens: int) -> torch.Tensor:
    """Bytes that differ everywhere; for bool only 0 and 1."""
    count = num_tokens * field.token_bytes
    data = (torch.arange(count, dtype=torch.int64) * 7 + 3) % (2 if field.dtype == "bool" else 251)
    dtype = getattr(torch, DTYPES[field.dtype][1])
    return data.to(torch.uint8).view(dtype).view(num_tokens, *field.shape)


def stored_bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as uint8, in the order in which it is stored."""
    stored = tensor if tensor.is_contiguous() else tensor.t()
    return stored.reshape(-1).view(torch.uint8)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())


# --- shapes and bytes -------------------------------------------------------------------------


def test_a_field_takes_torchs_dtypes() -> None:
    for name, (_, torch_name) in DTYPES.items():
        dtype = getattr(torch, torch_name)
        assert dtype_name(dtype) == name
        assert Field.of("x", (2,), dtype) == Field("x", (2,), name)
        assert torch.empty(0, dtype=dtype).element_size() == Field("x", (), name).token_bytes
    with pytest.raises(ValueError, match="expected one of uint8"):
        Field.of("x", (), torch.qint8)
    assert multimodal_fields(8, dtype=torch.float16)[0].dtype == "fp16"


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_what_is_written_through_a_view_stands_in_the_segment_bit_for_bit(
    pool: BlockPool, field: Field
) -> None:
    handle = taken(pool, 19)
    tensor = pool.view(handle)[field.name]
    written = pattern(field, 19)
    assert tensor.dtype == written.dtype
    tensor.copy_(written.t() if field.transposed else written)
    assert stored_bytes(pool, field, handle) == bytes_of(written)
    assert tensor.shape == ((3, 19) if field.transposed else (19, *field.shape))


def test_a_view_lies_where_its_blocks_lie_and_copies_nothing(pool: BlockPool) -> None:
    handle = taken(pool, 19)
    view = pool.view(handle)
    assert view.start_token == handle.start_block * BLOCK == 16
    for field in FIELDS:
        whole = pool.field(field.name)
        assert whole.shape == (96, *field.shape)
        expected = whole.data_ptr() + view.start_token * field.token_bytes
        assert view[field.name].data_ptr() == expected
        assert view[field.name].data_ptr() == view[field.name].data_ptr()
    assert view.aux.data_ptr() == pool.field("aux").data_ptr() + handle.start_block * 64
    assert view.aux.shape == (16,)
    assert view.aux.dtype == torch.int32


def test_consecutive_blocks_are_one_contiguous_slice_of_every_field(pool: BlockPool) -> None:
    view = pool.view(taken(pool, 5 * BLOCK))
    for field in FIELDS:
        stored = view[field.name].t() if field.transposed else view[field.name]
        assert stored.is_contiguous()


def test_mrope_is_shown_transposed_and_stored_per_token(pool: BlockPool) -> None:
    handle = taken(pool, 19)
    mrope = pool.view(handle)["mrope_positions"]
    assert mrope.shape == (3, 19)
    assert mrope.stride() == (1, 3)
    mrope[1, 4] = 77
    assert pool.field("mrope_positions")[handle.start_block * BLOCK + 4].tolist() == [0, 77, 0]
    # So that a chunk of tokens is a slice of memory.
    chunk = mrope[:, 2:9].t()
    assert chunk.is_contiguous()


def test_the_aux_of_an_allocation_is_the_row_of_its_first_block(pool: BlockPool) -> None:
    handle = taken(pool, 19)
    view = pool.view(handle)
    view.aux[0], view.aux[1] = 2000, -3
    assert pool.field("aux")[handle.start_block, :2].tolist() == [2000, -3]
    assert pool.field("aux").sum() == 1997


def test_a_view_ends_with_its_tokens_and_not_with_its_blocks(pool: BlockPool) -> None:
    for num_tokens in (1, BLOCK - 1, BLOCK, BLOCK + 1):
        handle = pools.take(pool, num_tokens)
        view = pool.view(handle)
        assert view.num_tokens == num_tokens
        assert view["fill_ids"].shape == (num_tokens,)
        assert view["grid"].shape == (num_tokens, 2, 3)


def test_the_views_of_two_allocations_share_no_byte(pool: BlockPool) -> None:
    first, second = pool.view(pools.take(pool, 19)), pool.view(pools.take(pool, 9))
    for field in FIELDS:
        # By their bytes: not every dtype has a zero.
        stored_bytes_of(first[field.name]).fill_(1)
        stored_bytes_of(second[field.name]).fill_(0)
        assert bool((stored_bytes_of(first[field.name]) == 1).all())
        assert not bool(stored_bytes_of(second[field.name]).any())


def test_a_view_is_a_mapping_of_its_fields(pool: BlockPool) -> None:
    view = pool.view(pools.take(pool, 3))
    assert list(view) == [field.name for field in FIELDS]
    assert len(view) == len(FIELDS)
    assert {name: tensor.shape[0] for name, tensor in view.items()}["fill_ids"] == 3
    assert "fill_ids" in view
    assert "nothing" not in view
    with pytest.raises(KeyError, match=r"expected one of input_embeddings, .*got 'nothing'"):
        view["nothing"]


def test_an_offset_is_the_start_block_and_never_the_smallest_of_anything(pool: BlockPool) -> None:
    """The original took `min()` of its block list, which is wrong as soon as blocks wrap around."""
    filler = pools.take(pool, 10 * BLOCK)
    last = pools.take(pool, 2 * BLOCK)
    pool.free(filler)
    wrapped = pools.take(pool, 3 * BLOCK)
    assert (last.start_block, wrapped.start_block) == (10, 0)
    pool.free(last)
    assert pool.view(wrapped).start_token == 0
    again = pools.take(pool, 4 * BLOCK)
    assert again.start_block == 3
    assert pool.view(again).start_token == 3 * BLOCK


# --- shared -----------------------------------------------------------------------------------


def test_what_one_process_writes_another_sees_at_once_and_back(pool: BlockPool) -> None:
    landing = taken(pool, 19)
    here = pool.view(landing)

    def there(channel: Channel) -> None:
        with pool.open_for_write(landing) as lease:
            lease["grid"].fill_(2.5)
            lease["mrope_positions"][2] = torch.arange(19, dtype=torch.int32)
            lease.aux[0] = 19
            channel.say("written")
            channel.hear("changed")
            channel.say(lease["fill_ids"].tolist())

    with fork(there) as child:
        child.hear("written")
        assert here["grid"].sum() == 2.5 * 6 * 19
        assert here["mrope_positions"][2].tolist() == list(range(19))
        assert here.aux[0] == 19
        here["fill_ids"].copy_(torch.arange(19, dtype=torch.int32))
        child.say("changed")
        child.hear(list(range(19)))


def test_a_reader_reads_in_place_what_the_writer_wrote(pool: BlockPool) -> None:
    handle = taken(pool, 19)
    written = {field.name: pattern(field, 19) for field in FIELDS}
    view = pool.view(handle)
    for field in FIELDS:
        view[field.name].copy_(written[field.name].t() if field.transposed else written[field.name])
    handle = pool.publish(handle)

    def read() -> dict[str, bytes]:
        with pool.open(handle) as lease:
            fields = {field.name: lease[field.name] for field in FIELDS}
            fields["mrope_positions"] = fields["mrope_positions"].t()
            return {name: bytes_of(tensor) for name, tensor in fields.items()}

    assert run_in_fork(read) == {name: bytes_of(tensor) for name, tensor in written.items()}


def test_the_last_layer_of_an_encoder_writes_straight_into_the_pool(pool: BlockPool) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(19, 4, generator=generator)
    weight = torch.randn(4, 5, generator=generator)
    out = pool.view(taken(pool, 19))["one_fp32"]
    where = out.data_ptr()
    result = torch.mm(hidden, weight, out=out)
    assert result is out
    assert out.data_ptr() == where
    assert torch.equal(out, hidden @ weight)


def test_growing_keeps_what_was_written(pool: BlockPool) -> None:
    handle = taken(pool, 9)
    pool.view(handle)["fill_ids"].copy_(torch.arange(9, dtype=torch.int32))
    grown = pool.grow(handle, 30)
    assert grown is not None
    assert pool.view(grown)["fill_ids"].shape == (30,)
    assert pool.view(grown)["fill_ids"][:9].tolist() == list(range(9))


# --- as long as one is held -------------------------------------------------------------------


def test_a_tensor_stays_readable_when_its_pool_is_closed_under_it(pool: BlockPool) -> None:
    view = pool.view(taken(pool, 19))
    ids = view["fill_ids"]
    ids.copy_(torch.arange(19, dtype=torch.int32))
    pool.close()
    gc.collect()
    assert ids.tolist() == list(range(19))
    ids.fill_(4)
    assert ids.tolist() == [4] * 19
    with pytest.raises(PoolClosedError, match="closed in this process"):
        view["fill_ids"]


def test_the_mapping_goes_with_the_last_tensor(pool_name: str) -> None:
    pool = pools.create(pool_name, pools.tiny(fields=multimodal_fields(8)))
    kept = [pool.view(pools.take(pool))["fill_ids"]]
    pool.close()
    del pool
    # A segment that was made without a name shows none in the list of mappings.
    mapped = set(procfs.mapped_segments("(deleted)"))
    assert mapped
    kept.clear()
    gc.collect()
    assert set(procfs.mapped_segments("(deleted)")) < mapped


def test_a_view_keeps_its_pool_attached(pool: BlockPool) -> None:
    other = pools.attach(pool.name)
    view = other.view(pools.take(other, 5))
    del other
    assert len(pool.participants()) == 2
    view["fill_ids"].fill_(3)
    assert pool.stats().reserved_blocks == 1
    del view
    assert len(pool.participants()) == 1


# --- what gives no view -----------------------------------------------------------------------


def test_only_a_reservation_of_ones_own_is_viewed(pool: BlockPool) -> None:
    with pools.attach(pool.name) as other:
        handle = pools.take(other, 5)
        with pytest.raises(InvalidStateError, match="expected a reservation of this process"):
            pool.view(handle)
        with pool.open_for_write(handle) as lease:
            assert lease["fill_ids"].shape == (5,)


def test_a_pool_without_fields_has_aux(pool_name: str) -> None:
    with pools.create(pool_name) as pool:
        view = pool.view(pools.take(pool))
        assert dict(view) == {}
        view.aux.fill_(5)
        with pytest.raises(KeyError, match="the pool has none"):
            view["x"]


def test_a_start_block_below_zero_is_no_way_around_the_table(pool: BlockPool) -> None:
    """Found: without the lock it was looked up from the end of the segment, in a field's bytes."""
    me = pool.participant
    assert me is not None
    layout = pool.state.layout
    start = -(layout.records // RECORD.size) - 2
    forged = RECORD_HEAD.pack(1, 77, 1, BLOCK, me.word, 0, 0, 0, 0)
    offset = layout.segment_bytes + layout.records + start * RECORD.size
    pool.state.segment.memory[offset : offset + len(forged)] = forged
    with pytest.raises(StaleHandleError, match="start block"):
        pool.view(BlockHandle(start, 1, BLOCK, 77, pool.pool_id))
