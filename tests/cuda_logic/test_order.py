"""Publishing, opening, releasing and freeing on streams: nothing is early, nothing is lost."""

from __future__ import annotations

import warnings

import pytest

from shmblocks import (
    BlockHandle,
    BlockPool,
    CudaUnavailableError,
    InvalidStateError,
    PeerDiedError,
    PoolClosedError,
    StaleHandleError,
    State,
)
from shmblocks._state.layout import FAILED
from tests.core import pools
from tests.cuda_logic.fakes import OTHER_STREAM, STREAM, FakeGpu, Wait, Write
from tests.support.inside import run_inside


def published_on_stream(pool: BlockPool, readers: int = 1) -> BlockHandle:
    return pool.publish(pools.take(pool, 8), readers=readers, stream=STREAM)


def test_publishing_on_a_stream_returns_before_the_stream_gets_there(
    pool: BlockPool, gpu: FakeGpu
) -> None:
    handle = published_on_stream(pool)
    word = pool.state.layout.ready_word(handle.start_block)
    assert pools.word(pool, word) == 0
    assert gpu.run()
    assert pools.word(pool, word) == handle.generation
    pool.free(handle)


def test_a_readers_stream_waits_for_the_producers(pool: BlockPool, gpu: FakeGpu) -> None:
    handle = published_on_stream(pool)
    with pool.open(handle, stream=OTHER_STREAM) as lease:
        assert not lease.is_ready
        assert not gpu.run(OTHER_STREAM), "it must stop at the wait"
        gpu.run(STREAM)
        assert gpu.run(OTHER_STREAM)
        lease["rows"]
    gpu.run(OTHER_STREAM)


def test_what_is_ready_needs_no_wait(pool: BlockPool, gpu: FakeGpu) -> None:
    handle = published_on_stream(pool)
    gpu.run()
    with pool.open(handle, stream=OTHER_STREAM) as lease:
        assert lease.is_ready
        assert not gpu.streams.get(OTHER_STREAM)
    gpu.run(OTHER_STREAM)


def test_released_blocks_come_back_when_the_stream_gets_there(
    pool: BlockPool, gpu: FakeGpu
) -> None:
    handle = published_on_stream(pool)
    gpu.run()
    pool.open(handle, stream=OTHER_STREAM).release()
    assert pool.available_blocks() == 14
    stats = pool.stats()
    assert (stats.pending_leases, stats.leases) == (1, 1)
    assert pool.allocations()[0].leases[0].is_pending
    gpu.run(OTHER_STREAM)
    assert pool.available_blocks() == 16
    assert pool.stats().pending_leases == 0


def test_each_reader_has_a_word_of_its_own(pool: BlockPool, gpu: FakeGpu) -> None:
    handle = published_on_stream(pool, readers=2)
    gpu.run()
    first = pool.open(handle, stream=OTHER_STREAM)
    second = pool.open(handle, stream=99)
    first.release()
    second.release()
    gpu.run(OTHER_STREAM)
    assert pool.available_blocks() == 14
    gpu.run(99)
    assert pool.available_blocks() == 16


def test_an_allocation_takes_what_streams_have_given_back(pool: BlockPool, gpu: FakeGpu) -> None:
    handle = pool.publish(pools.take(pool, 64), stream=STREAM)
    pool.open(handle, stream=STREAM).release()
    assert pool.alloc(1) is None
    gpu.run()
    pool.free(pools.take(pool, 64))


def test_a_wait_for_blocks_ends_when_a_stream_gives_them_back(
    pool: BlockPool, gpu: FakeGpu
) -> None:
    import threading

    handle = pool.publish(pools.take(pool, 64), stream=STREAM)
    pool.open(handle, stream=STREAM).release()
    thread = threading.Timer(0.1, gpu.run)
    thread.start()
    got = pool.alloc(4, timeout=20)
    thread.join()
    assert got is not None
    pool.free(got)


def test_a_lease_slot_comes_back_from_a_stream_when_none_is_left(
    pool: BlockPool, gpu: FakeGpu
) -> None:
    handle = pool.publish(pools.take(pool, 1), readers=17, stream=STREAM)
    for _ in range(16):
        pool.open(handle, stream=STREAM).release()
    gpu.run()
    pool.open(handle, stream=STREAM).release()
    gpu.run()
    assert pool.available_blocks() == 16


def test_freeing_what_the_producers_stream_still_writes_keeps_the_blocks(
    pool: BlockPool, gpu: FakeGpu
) -> None:
    handle = published_on_stream(pool)
    pool.free(handle)
    assert pool.available_blocks() == 14
    assert pool.stats().settling_allocations == 1
    assert pool.check() == []
    assert pool.allocations()[0].state is State.SETTLING
    gpu.run()
    assert pool.available_blocks() == 16
    assert pool.stats().settling_allocations == 0


def test_what_is_unclaimed_in_time_is_kept_while_its_stream_works(
    gpu: FakeGpu, pool_name: str
) -> None:
    with pools.create(pool_name, pools.tiny(unclaimed_timeout=1e-3)) as pool:
        pool.pin()
        published_on_stream(pool)
        import time

        time.sleep(2e-3)
        pool.reap()
        assert pool.available_blocks() == 14
        gpu.run()
        assert pool.available_blocks() == 16


def test_a_reservation_is_freed_behind_the_stream_that_works_on_it(
    pool: BlockPool, gpu: FakeGpu
) -> None:
    handle = pools.take(pool, 8)
    pool.free(handle, stream=STREAM)
    assert pool.available_blocks() == 14
    with pytest.raises(StaleHandleError):
        pool.free(handle)
    gpu.run()
    assert pool.available_blocks() == 16


def test_a_late_word_of_an_earlier_generation_makes_nothing_ready(
    pool: BlockPool, gpu: FakeGpu
) -> None:
    handle = published_on_stream(pool)
    word = pool.state.layout.ready_word(handle.start_block)
    pools.set_word(pool, word, handle.generation - 1)
    with pool.open(handle, stream=OTHER_STREAM) as lease:
        assert not lease.is_ready
        assert not gpu.run(OTHER_STREAM)
        gpu.run()
        gpu.run(OTHER_STREAM)
    gpu.run(OTHER_STREAM)


def test_a_cpu_reader_waits_until_the_copy_is_there(pool: BlockPool, gpu: FakeGpu) -> None:
    import threading

    handle = pools.take(pool, 8)
    rows = pool.view(handle)["rows"]
    gpu.work(lambda: rows.fill_(5))
    pool.publish(handle, stream=STREAM)
    thread = threading.Timer(0.1, gpu.run)
    thread.start()
    with pool.open(handle) as lease:
        assert int(lease["rows"].sum()) == 5 * 8 * 4
    thread.join()


def test_a_writers_lease_on_a_stream_holds_a_landing_allocation(
    pool: BlockPool, gpu: FakeGpu
) -> None:
    import threading

    handle = pools.take(pool, 8)
    lease = pool.open_for_write(handle, stream=STREAM)
    rows = lease["rows"]
    gpu.work(lambda: rows.fill_(3))
    lease.release()
    thread = threading.Timer(0.1, gpu.run)
    thread.start()
    assert int(pool.view(handle)["rows"].sum()) == 3 * 8 * 4, "the owner must wait for the stream"
    thread.join()
    pool.free(handle)
    assert pool.available_blocks() == 16


def test_a_stream_needs_a_pinned_pool(gpu: FakeGpu, pool_name: str) -> None:
    with pools.create(pool_name) as pool:
        handle = pools.take(pool)
        with pytest.raises(InvalidStateError, match=r"call `pool\.pin"):
            pool.publish(handle, stream=STREAM)
        pool.free(handle)


def test_nothing_of_a_pool_can_be_captured_into_a_graph(pool: BlockPool, gpu: FakeGpu) -> None:
    reserved = pools.take(pool)
    handle = pool.publish(pools.take(pool), stream=STREAM)
    gpu.run()
    lease = pool.open(handle, stream=STREAM)
    other = pool.publish(pools.take(pool), stream=STREAM)
    gpu.run()
    gpu.capturing.add(STREAM)
    for call in (
        lambda: pool.publish(reserved, stream=STREAM),
        lambda: pool.open(other, stream=STREAM),
        lambda: pool.free(reserved, stream=STREAM),
        lease.release,
    ):
        with pytest.raises(InvalidStateError, match="CUDA graph"):
            call()
    gpu.capturing.clear()
    lease.release()
    gpu.run()
    pool.free(reserved)
    pool.free(other)
    assert pool.available_blocks() == 16


def test_a_publish_that_cannot_be_enqueued_fails_for_its_readers_too(
    pool: BlockPool, gpu: FakeGpu
) -> None:
    handle = pools.take(pool)
    gpu.fails_to_enqueue = True
    with pytest.raises(CudaUnavailableError, match="ILLEGAL_ADDRESS"):
        pool.publish(handle, stream=STREAM)
    gpu.fails_to_enqueue = False
    with pytest.raises(PeerDiedError):
        pool.open(handle, stream=STREAM)


def test_a_stale_handle_writes_no_word(pool: BlockPool, gpu: FakeGpu) -> None:
    handle = pools.take(pool)
    pool.free(handle)
    with pytest.raises(StaleHandleError):
        pool.publish(handle, stream=STREAM)
    assert not gpu.streams.get(STREAM)


def test_the_bit_that_says_failed_satisfies_a_stream_that_waits(
    pool: BlockPool, gpu: FakeGpu
) -> None:
    handle = published_on_stream(pool)
    lease = pool.open(handle, stream=OTHER_STREAM)
    record = pool.state.blocks.record(handle.start_block)
    run_inside(pool, pool.state.blocks.fail, handle.start_block, record)
    assert gpu.run(OTHER_STREAM)
    with pytest.raises(PeerDiedError, match="release the lease and retry the request"):
        lease["rows"]
    lease.release()
    gpu.run()
    gpu.run(OTHER_STREAM)
    assert FAILED < 1 << 63


def test_a_lease_that_was_dropped_is_released_on_its_stream(pool: BlockPool, gpu: FakeGpu) -> None:
    handle = published_on_stream(pool)
    gpu.run()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        lease = pool.open(handle, stream=OTHER_STREAM)
        del lease
    assert pool.available_blocks() == 14
    gpu.run(OTHER_STREAM)
    assert pool.available_blocks() == 16


def test_closing_waits_for_the_streams_and_unregisters(gpu: FakeGpu, pool_name: str) -> None:
    with pools.create(pool_name) as other, pools.attach(pool_name) as pool:
        pool.pin()
        handle = published_on_stream(pool)
        lease = pool.open(handle, stream=STREAM)
        assert gpu.streams[STREAM]
        pool.close()
        assert lease.is_released
        assert not gpu.streams[STREAM]
        assert gpu.synchronized == 1
        assert not gpu.registered
        assert other.available_blocks() == 16
        with pytest.raises(PoolClosedError):
            pool.publish(handle, stream=STREAM)


def test_pinning_twice_registers_once_and_is_told(pool: BlockPool, gpu: FakeGpu) -> None:
    pool.pin()
    assert len(gpu.registered) == 1
    assert pool.is_pinned
    assert pool.pinned_bytes == pool.stats().pinned_bytes == pool.state.segment.size_bytes
    me = next(info for info in pool.participants() if info.is_self)
    assert me.uses_gpu
    assert me.pinned_bytes == pool.pinned_bytes


def test_what_cannot_be_pinned_is_said_plainly(gpu: FakeGpu, pool_name: str) -> None:
    gpu.refuses_to_register = True
    with pools.create(pool_name) as pool:
        with pytest.raises(CudaUnavailableError, match="ulimit -l"):
            pool.pin()
        assert not pool.is_pinned


def test_the_steps_on_the_streams_are_exactly_these(pool: BlockPool, gpu: FakeGpu) -> None:
    handle = published_on_stream(pool)
    lease = pool.open(handle, stream=OTHER_STREAM)
    slot = lease._key.slot if lease._key else -1
    lease.release()
    layout = pool.state.layout
    base = next(iter(gpu.registered))
    ready = base + 8 * layout.ready_word(handle.start_block)
    acknowledged = base + 8 * layout.acknowledged_word(slot)
    assert gpu.streams[STREAM] == [Write(ready, handle.generation)]
    assert gpu.streams[OTHER_STREAM] == [
        Wait(ready, handle.generation),
        Write(acknowledged, handle.generation),
    ]
    gpu.run()
    gpu.run(OTHER_STREAM)
