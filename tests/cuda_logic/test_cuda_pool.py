"""A pool in CUDA memory, its creator, those who attach, and those who have no GPU."""

from __future__ import annotations

import pytest
import torch

from shmblocks import (
    BlockPool,
    CudaUnavailableError,
    PeerDiedError,
    PoolConfig,
    PoolInspector,
    PoolNotFoundError,
)
from shmblocks._state.layout import PAGE, Layout
from shmblocks.cuda import memory
from tests.core import pools
from tests.cuda_logic.conftest import FIELDS
from tests.cuda_logic.fakes import OTHER_STREAM, STREAM, FakeGpu


def test_the_segment_of_a_cuda_pool_ends_behind_aux_and_its_fields_lie_on_pages() -> None:
    host = Layout(pools.tiny(fields=FIELDS))
    cuda = Layout(PoolConfig(total_tokens=64, block_size=4, fields=FIELDS, device="cuda:3",
                             max_participants=8, max_leases=16))  # fmt: skip
    assert cuda.aux == host.aux
    assert cuda.segment_bytes == host.fields["rows"]
    assert cuda.fields == {"rows": 0, "ids": PAGE}
    assert cuda.device_bytes == 2 * PAGE
    assert host.device_bytes == 0


@pytest.mark.parametrize("device", ["cuda", "gpu:0", "cuda:-1", "cuda:0 ", ""])
def test_a_device_is_cpu_or_cuda_with_a_number(device: str) -> None:
    with pytest.raises(ValueError, match=r"expected 'cpu' or 'cuda:N'"):
        PoolConfig(total_tokens=64, block_size=4, device=device)


def test_views_lie_in_the_device_memory_and_aux_in_the_segment(
    cuda_pool: BlockPool, gpu: FakeGpu
) -> None:
    handle = pools.take(cuda_pool, 6)
    view = cuda_pool.view(handle)
    rows = view["rows"].fill_(9)
    view.aux[0] = 6
    (memory_of_pool,) = gpu.allocated.values()
    assert memory_of_pool.raw[: 6 * 16] == (9).to_bytes(4, "little") * 24
    with cuda_pool.open(cuda_pool.publish(handle)) as lease:
        gpu.run()
        assert torch.equal(lease["rows"], rows)
        assert int(lease.aux[0]) == 6
    gpu.run()


def test_streams_are_used_without_being_named(cuda_pool: BlockPool, gpu: FakeGpu) -> None:
    handle = cuda_pool.publish(pools.take(cuda_pool))
    lease = cuda_pool.open(handle)
    lease.release()
    assert len(gpu.streams[STREAM]) == 3
    assert cuda_pool.available_blocks() == 15
    gpu.run()
    assert cuda_pool.available_blocks() == 16


def test_each_call_keeps_order_on_the_stream_that_is_current_then(
    cuda_pool: BlockPool, gpu: FakeGpu
) -> None:
    first, second = (pools.take(cuda_pool) for _ in range(2))
    published = [cuda_pool.publish(first)]
    gpu.current = OTHER_STREAM
    published.append(cuda_pool.publish(second))
    assert [len(gpu.streams[stream]) for stream in (STREAM, OTHER_STREAM)] == [1, 1]
    lease = cuda_pool.open(published[0])
    gpu.current = STREAM
    lease.release()
    assert len(gpu.streams[OTHER_STREAM]) == 3, "waits and is released where it was opened"
    cuda_pool.open(published[1]).release()
    assert len(gpu.streams[STREAM]) == 3
    assert not gpu.run(STREAM), "it waits for the other"
    assert gpu.run(OTHER_STREAM)
    assert gpu.run(STREAM)
    assert cuda_pool.available_blocks() == 16


def test_a_viewed_reservation_is_freed_behind_the_current_stream(
    cuda_pool: BlockPool, gpu: FakeGpu
) -> None:
    seen, unseen = pools.take(cuda_pool), pools.take(cuda_pool)
    cuda_pool.view(seen)
    cuda_pool.free(seen)
    cuda_pool.free(unseen)
    assert cuda_pool.available_blocks() == 15
    gpu.run()
    assert cuda_pool.available_blocks() == 16


def test_a_second_attachment_of_the_process_opens_nothing(
    cuda_pool: BlockPool, gpu: FakeGpu
) -> None:
    handle = pools.take(cuda_pool)
    cuda_pool.view(handle)["rows"].fill_(3)
    handle = cuda_pool.publish(handle)
    with pools.attach(cuda_pool.name) as other, other.open(handle) as lease:
        gpu.run()
        assert int(lease["rows"].sum()) == 12
        assert gpu.ipc_opens == 0
    gpu.run()


def test_an_attacher_opens_once_and_closes_with_its_last_tensor(
    cuda_pool: BlockPool, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = cuda_pool.publish(pools.take(cuda_pool))
    gpu.run()
    # As another process would see it: it has not made the memory.
    monkeypatch.setattr(memory, "_living", type(memory._living)())
    other, again = pools.attach(cuda_pool.name), pools.attach(cuda_pool.name)
    kept = other.field("rows")
    again.field("rows")
    assert gpu.ipc_opens == 1
    assert other.stats().device_openers == 3
    again.close()
    other.close()
    assert list(gpu.opened.values()) == [1]
    del kept
    assert list(gpu.opened.values()) == [0]
    cuda_pool.free(handle)


def test_the_last_to_leave_frees_the_memory(gpu: FakeGpu, pool_name: str) -> None:
    BlockPool.create(pool_name, pools.tiny(fields=FIELDS), device="cuda:0").close()
    assert not gpu.allocated


def test_a_creator_that_leaves_before_others_keeps_the_memory_and_says_so(
    gpu: FakeGpu, pool_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_kept", [])
    creator = BlockPool.create(pool_name, pools.tiny(fields=FIELDS), device="cuda:0")
    with pools.attach(pool_name) as other:
        rows = other.field("rows")
        rows.fill_(5)
        creator.close()
        assert gpu.allocated
        assert other.stats().device_state == "creator left"
        assert int(rows[0, 0]) == 5
        monkeypatch.setattr(memory, "_living", type(memory._living)())
        with pools.attach(pool_name) as late:
            handle = pools.take(late)
            with pytest.raises(PeerDiedError, match="create the pool anew"):
                late.view(handle)
            late.free(handle)
    del rows


def test_a_dead_creator_is_told_to_those_who_come_later(
    gpu: FakeGpu, pool_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    creator = BlockPool.create(pool_name, pools.tiny(fields=FIELDS), device="cuda:0")
    with pools.attach(pool_name) as other:
        other.field("rows")
        pools.abandon(creator)
        assert other.stats().device_state == "creator dead"
        monkeypatch.setattr(memory, "_living", type(memory._living)())
        with pools.attach(pool_name) as late, pytest.raises(PeerDiedError):
            late.field("rows")


def test_a_process_without_a_gpu_does_all_but_view(
    cuda_pool: BlockPool, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shmblocks.cuda import driver

    def none_here() -> FakeGpu:
        raise CudaUnavailableError("torch finds no GPU in this process")

    handle = cuda_pool.publish(pools.take(cuda_pool))
    monkeypatch.setattr(driver, "load", none_here)
    with pools.attach(cuda_pool.name) as other:
        reserved = pools.take(other)
        assert other.grow(reserved, 8) is not None
        assert other.available_blocks() == 13
        assert len(other.allocations()) == 2
        for call in (other.view, other.publish):
            with pytest.raises(CudaUnavailableError, match="no GPU"):
                call(other.handle_at(reserved.start_block))
        with pytest.raises(CudaUnavailableError, match="no GPU"):
            other.open(handle)
        other.free(other.handle_at(reserved.start_block))
        other.free(handle)
        assert other.check() == []
    gpu.run()


def test_without_a_gpu_no_cuda_pool_is_made_and_nothing_is_left(pool_name: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(CudaUnavailableError, match="shmblocks doctor"):
        BlockPool.create(pool_name, pools.tiny(fields=FIELDS), device="cuda:0")
    with pytest.raises(PoolNotFoundError):
        pools.attach(pool_name)


def test_a_gpu_that_the_process_does_not_see_is_named(
    cuda_pool: BlockPool, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_living", type(memory._living)())
    gpu.is_blind = True
    with (
        pools.attach(cuda_pool.name) as other,
        pytest.raises(CudaUnavailableError, match="CUDA_VISIBLE_DEVICES"),
    ):
        other.field("rows")


def test_inspectors_see_the_device(cuda_pool: BlockPool) -> None:
    inspector = PoolInspector(cuda_pool.name)
    stats = inspector.stats()
    inspector.close()
    assert (stats.device, stats.device_state, stats.device_openers) == ("cuda:0", "exported", 1)
    assert stats.device_bytes == 2 * PAGE
    assert stats.pinned_bytes == stats.size_bytes
    assert stats.gpu_users == 1
