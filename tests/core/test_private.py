"""Leases that end with an object, private memory over blocks, bytes as tensors, short waits."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator

import pytest
import torch

from shmblocks import (
    BlockHandle,
    BlockPool,
    Field,
    InvalidStateError,
    PoolTimeoutError,
    StaleHandleError,
)
from shmblocks.cache import ROW_BYTES, byte_config
from shmblocks.view import rows_as_tensor
from tests.core import pools
from tests.core.conftest import require_right
from tests.support.children import Channel, fork
from tests.support.inside import run_inside

SHAPE = (3, 5, 7)


@pytest.fixture
def pool(pool_name: str) -> Iterator[BlockPool]:
    """A byte pool of 16 blocks of one page."""
    config = byte_config(16 * ROW_BYTES, block_bytes=ROW_BYTES, max_leases=16)
    with pools.create(pool_name, config) as made:
        yield made
        if not made.is_closed:
            require_right(made)


def numbers() -> torch.Tensor:
    return torch.arange(105, dtype=torch.float32).view(SHAPE)


def put(pool: BlockPool, readers: int = 1, rows: int = 2) -> BlockHandle:
    with pool.reserve(rows) as reservation:
        reservation.tensor(torch.float32, SHAPE).copy_(numbers())
        return reservation.publish(readers=readers)


class Owner:
    """Something of an engine's that holds tensors."""


# --- bytes as tensors -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_bytes_are_a_tensor_of_any_dtype_and_shape(pool: BlockPool, dtype: torch.dtype) -> None:
    with pool.reserve(2) as reservation:
        reservation.tensor(dtype, (4, 6)).copy_(torch.ones(4, 6))
        handle = reservation.publish()
    with pool.open(handle) as lease:
        read = lease.tensor(dtype, [4, 6])
        assert read.is_contiguous()
        assert torch.equal(read, torch.ones(4, 6, dtype=dtype))
        assert lease.tensor(dtype, (0, 6)).shape == (0, 6)


def test_a_tensor_larger_than_its_blocks_is_refused(pool: BlockPool) -> None:
    with pool.reserve(1) as reservation:
        assert reservation.tensor(torch.float32, (1024,)).numel() == 1024
        with pytest.raises(ValueError, match="expected at most 4096 bytes"):
            reservation.tensor(torch.float32, (1025,))


def test_a_pool_of_fields_has_no_bytes(pool_name: str) -> None:
    config = pools.tiny(fields=(Field("ids", (), "int64"),))
    with (
        pools.create(pool_name, config) as pool,
        pool.reserve(1) as reservation,
        pytest.raises(InvalidStateError, match="expected a byte pool"),
    ):
        reservation.tensor(torch.int64, (1,))


# --- the end with an object -------------------------------------------------------------------


def test_a_lease_ends_with_an_object(pool: BlockPool) -> None:
    owner = Owner()
    pool.open(put(pool)).end_with(owner)
    assert pool.available_blocks() == 14
    del owner
    assert pool.available_blocks() == 16


def test_a_lease_that_was_released_before_ends_once(pool: BlockPool) -> None:
    owner = Owner()
    lease = pool.open(put(pool))
    lease.end_with(owner)
    lease.release()
    assert pool.available_blocks() == 16
    other = put(pool)
    del owner
    assert pool.available_blocks() == 14
    pool.free(other)
    with pytest.raises(InvalidStateError):
        lease.end_with(Owner())


def test_an_object_that_is_collected_inside_a_transaction_ends_its_lease(pool: BlockPool) -> None:
    owners = [Owner()]
    pool.open(put(pool)).end_with(owners[0])
    run_inside(pool, owners.clear)
    wait_for_blocks(pool)


def wait_for_blocks(pool: BlockPool) -> None:
    with pool.reserve(16, timeout=10.0):
        pass


# --- private memory ---------------------------------------------------------------------------


def test_private_memory_is_written_by_nobody_else(pool: BlockPool) -> None:
    handle = put(pool, readers=2)
    lease = pool.open(handle)
    mine = rows_as_tensor(lease.private("bytes"), torch.float32, SHAPE)
    assert lease.is_released
    assert torch.equal(mine, numbers())
    mine.fill_(9)
    with pool.open(handle) as other:
        assert torch.equal(other.tensor(torch.float32, SHAPE), numbers())
    assert pool.available_blocks() == 14, "its memory is there"
    del mine
    assert pool.available_blocks() == 16


def test_private_memory_begins_at_its_own_rows(pool_name: str) -> None:
    fields = (Field("ids", (), "int32"), Field("m", (3,), "int16", transposed=True))
    with pools.create(pool_name, pools.tiny(fields=fields)) as pool:
        before = pools.take(pool, 9)
        ids = torch.arange(100, 107, dtype=torch.int32)
        m = torch.arange(21, dtype=torch.int16).view(3, 7)
        handle = pool.put({"ids": ids, "m": m}, readers=2)
        for name, expected in (("ids", ids), ("m", m)):
            assert torch.equal(pool.open(handle).private(name), expected)
        gc.collect()
        with pytest.raises(StaleHandleError):
            pool.open(handle)
        pool.free(before)


def test_a_lease_that_has_ended_gives_no_private_memory(pool: BlockPool) -> None:
    lease = pool.open(put(pool))
    with pytest.raises(KeyError, match="expected one of bytes"):
        lease.private("ids")
    assert not lease.is_released
    lease.release()
    with pytest.raises(InvalidStateError, match="the lease was released"):
        lease.private("bytes")


# --- short waits ------------------------------------------------------------------------------


def hold_the_lock(channel: Channel, pool: BlockPool) -> None:
    def inside() -> None:
        channel.say("inside")
        signal.pause()

    pool.available_blocks()
    run_inside(pool, inside)


def test_a_call_waits_for_the_lock_as_long_as_its_caller_says(pool: BlockPool) -> None:
    with fork(hold_the_lock, pool) as child:
        child.hear("inside")
        with (
            pool.lock_timeout(0.01),
            pytest.raises(PoolTimeoutError, match=r"could not acquire the lock within 0\.01 s"),
        ):
            pool.available_blocks()
        with pool.lock_timeout(5.0):
            with pool.lock_timeout(0.02), pytest.raises(PoolTimeoutError, match=r"0\.02 s"):
                pool.available_blocks()
            assert pool.state.mutex._timeouts
        assert not pool.state.mutex._timeouts
        child.kill()
    assert pool.available_blocks() == 16


def test_a_wait_without_a_length_is_refused(pool: BlockPool) -> None:
    with pytest.raises(ValueError, match="seconds: expected seconds from 0"):
        pool.lock_timeout(-1)
