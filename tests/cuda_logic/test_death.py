"""What becomes of the work of those who died with a GPU: kept apart, failed, told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from shmblocks import (
    BlockHandle,
    BlockPool,
    DamagedPoolError,
    InvalidStateError,
    PeerDiedError,
    PoolTimeoutError,
    remove_pool,
)
from shmblocks._os.filelock import GPU_BYTE
from shmblocks._state.layout import FAILED
from shmblocks.cuda import driver
from tests.core import pools
from tests.cuda_logic.conftest import FIELDS
from tests.cuda_logic.fakes import OTHER_STREAM, STREAM, FakeGpu
from tests.support.children import Channel, spawn, wait_until
from tests.support.inside import run_inside


def with_fake_gpu() -> FakeGpu:
    fake = FakeGpu()
    driver.load = lambda: fake  # type: ignore[assignment]
    return fake


def publish_on_a_stream_that_stands(channel: Channel, name: str) -> None:
    with_fake_gpu()
    with pools.attach(name) as pool:
        pool.pin()
        channel.say(pool.publish(pools.take(pool, 8), stream=STREAM).encode())
        channel.receive(600)


def test_a_stream_goes_on_soon_after_the_death_of_what_it_waits_for(
    pool: BlockPool, gpu: FakeGpu
) -> None:
    with spawn(publish_on_a_stream_that_stands, pool.name) as child:
        handle = BlockHandle.decode(child.receive())  # type: ignore[arg-type]
        lease = pool.open(handle, stream=OTHER_STREAM)
        assert watchers()
        assert not gpu.run(OTHER_STREAM)
        child.kill()
    wait_until(lambda: gpu.run(OTHER_STREAM), "the stream went on")
    with pytest.raises(PeerDiedError, match="release the lease and retry the request"):
        lease["rows"]
    with pytest.raises(PeerDiedError):
        _ = lease.is_ready
    lease.release()
    gpu.run(OTHER_STREAM)
    report = pool.reap()
    assert report.participants == 1
    assert pool.available_blocks() == 16
    with pytest.raises(PeerDiedError):
        pool.open(handle, stream=OTHER_STREAM)


def test_a_cpu_reader_is_told_of_the_death_it_waits_through(pool: BlockPool) -> None:
    with spawn(publish_on_a_stream_that_stands, pool.name) as child:
        handle = BlockHandle.decode(child.receive())  # type: ignore[arg-type]
        timer = threading.Timer(0.2, child.kill)
        timer.start()
        with pytest.raises(PeerDiedError):
            pool.open(handle)
        timer.join()
    pool.reap()


def hold_much(channel: Channel, name: str) -> None:
    with_fake_gpu()
    with pools.attach(name) as pool:
        pool.pin()
        pools.take(pool, 8)
        handle = BlockHandle.decode(channel.receive())  # type: ignore[arg-type]
        lease = pool.open(handle)
        channel.say("holds")
        channel.receive(600)
        lease.release()


def test_what_a_gpu_user_held_is_kept_apart_until_its_second_byte_falls(
    pool: BlockPool,
) -> None:
    handle = pool.publish(pools.take(pool, 8))
    with spawn(hold_much, pool.name) as child:
        child.say(handle.encode())
        child.hear("holds")
        slot = next(info.slot for info in pool.participants() if not info.is_self)
        child.kill()
    strange = pools.locks_of(pool.name)
    try:
        # As if its GPU still worked: somebody has the byte.
        assert strange.try_lock(GPU_BYTE + slot)
        report = pool.reap()
        assert (report.blocks, report.leases, report.participants) == (0, 0, 0)
        assert pool.available_blocks() == 12
        assert pool.stats().dead_participants == 1
        assert pool.check() == []
        with pools.attach(pool.name) as newcomer:
            assert newcomer.participant is not None
            assert newcomer.participant.slot != slot, "its slot is not given to another"
    finally:
        strange.close()
    report = pool.reap()
    assert (report.reservations, report.leases, report.participants) == (1, 1, 1)
    assert pool.available_blocks() == 16


def test_a_stream_goes_on_even_if_the_end_of_the_dead_cannot_be_seen(
    pool: BlockPool, gpu: FakeGpu
) -> None:
    with spawn(publish_on_a_stream_that_stands, pool.name) as child:
        handle = BlockHandle.decode(child.receive())  # type: ignore[arg-type]
        slot = next(info.slot for info in pool.participants() if not info.is_self)
        lease = pool.open(handle, stream=OTHER_STREAM)
        child.kill()
    strange = pools.locks_of(pool.name)
    try:
        if strange.try_lock(GPU_BYTE + slot):
            wait_until(lambda: gpu.run(OTHER_STREAM), "the stream went on")
            lease.release()
            gpu.run(OTHER_STREAM)
            pool.reap()
            assert pool.available_blocks() == 14, "and the blocks are still kept apart"
    finally:
        strange.close()
    lease.release()
    gpu.run(OTHER_STREAM)
    pool.reap()
    assert pool.available_blocks() == 16


def test_the_watcher_ends_when_there_is_nothing_to_watch(
    pool: BlockPool, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shmblocks.cuda import watcher

    monkeypatch.setattr(watcher, "IDLE", 0.1)
    handle = pool.publish(pools.take(pool, 8), stream=STREAM)
    pool.open(handle, stream=OTHER_STREAM).release()
    assert watchers()
    gpu.run()
    gpu.run(OTHER_STREAM)
    wait_until(lambda: not watchers(), "the thread has ended")


def test_a_publisher_that_dies_after_it_was_ready_takes_nothing_with_it(
    gpu: FakeGpu, pool_name: str
) -> None:
    with pools.create(pool_name, pools.tiny(fields=FIELDS)) as pool:
        pool.pin()
        other = pools.attach(pool_name)
        other.pin()
        handle = other.publish(pools.take(other, 8), stream=STREAM)
        gpu.run()
        pools.abandon(other)
        gpu.registered.popitem()
        pool.reap()
        with pool.open(handle, stream=STREAM) as lease:
            assert lease.is_ready
        gpu.run()
        assert pool.available_blocks() == 16


def test_failing_what_is_late_ready_after_all_does_no_harm(pool: BlockPool, gpu: FakeGpu) -> None:
    handle = pool.publish(pools.take(pool, 8), stream=STREAM)
    lease = pool.open(handle, stream=OTHER_STREAM)
    blocks = pool.state.blocks
    run_inside(pool, blocks.fail, handle.start_block, blocks.record(handle.start_block))
    word = pool.state.layout.ready_word(handle.start_block)
    assert pools.word(pool, word) == FAILED | handle.generation
    gpu.run()
    gpu.run(OTHER_STREAM)
    assert lease.is_ready, "it came before the mark was looked at, and is whole"
    lease.release()
    gpu.run(OTHER_STREAM)
    started = time.monotonic()
    assert pool.available_blocks() == 16
    assert time.monotonic() - started < 60


def test_a_pool_that_came_through_a_fork_must_be_attached_anew_for_a_gpu(
    pool: BlockPool, gpu: FakeGpu
) -> None:
    from shmblocks import CudaUnavailableError
    from tests.support.children import fork

    def in_child(channel: Channel) -> str:
        try:
            pool.pin()
        except CudaUnavailableError as error:
            return str(error)
        finally:
            pool.close()
        return ""

    with fork(in_child) as child:
        assert "attach the pool in this process" in str(child.result())
    assert len(gpu.registered) == 1


class Gated(FakeGpu):
    """Its `synchronize` lasts until the gate is open, and tells whether it was in time."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.came_through: list[bool] = []

    def synchronize(self, device: int) -> None:
        self.came_through.append(self.gate.wait(20))
        super().synchronize(device)


@pytest.mark.parametrize("where", ["the same pool", "another pool"])
def test_a_users_pool_that_is_dropped_inside_an_operation_leaves_from_another_thread(
    new_pool_name: Callable[[], str], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Its streams may wait for a watcher, and that for the operation that was interrupted."""
    gpu = Gated()
    monkeypatch.setattr(driver, "load", lambda: gpu)
    with pools.create(new_pool_name()) as first, pools.create(new_pool_name()) as second:
        dropped = pools.attach(first.name)
        dropped.pin()
        handle = dropped.publish(pools.take(dropped, 8), stream=STREAM)
        dropped.open(handle, stream=OTHER_STREAM).release()
        kept = [dropped]
        del dropped

        def drop() -> None:
            kept.clear()
            gpu.gate.set()

        run_inside(first if where == "the same pool" else second, drop)
        wait_until(lambda: len(first.participants()) == 1, "it left")
        assert gpu.came_through == [True]
        assert not gpu.registered
        assert first.available_blocks() == first.config.total_blocks
        wait_until(lambda: not watchers(), "nobody watches for it any more")


def watchers() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "shmblocks-watcher"]


def test_closing_a_users_pool_inside_an_operation_is_refused_and_changes_nothing(
    pool: BlockPool, gpu: FakeGpu
) -> None:
    before = gpu.synchronized
    with pytest.raises(InvalidStateError, match="set a flag there and close it later"):
        run_inside(pool, pool.close)
    assert gpu.synchronized == before
    pool.open(pool.publish(pools.take(pool), stream=STREAM), stream=STREAM).release()
    gpu.run()
    assert pool.available_blocks() == 16


def test_a_users_pool_that_cannot_leave_has_unregistered(gpu: FakeGpu, pool_name: str) -> None:
    """What is still registered must stay mapped."""
    with pools.create(pool_name, pools.tiny(fields=FIELDS, lock_timeout=0.1)) as pool:
        other = pools.attach(pool_name)
        other.pin()
        stranger = pools.locks_of(pool_name)
        assert stranger.try_enter()
        with pytest.raises(PoolTimeoutError):
            other.close()
        assert not gpu.registered
        stranger.close()
        other.close()
        assert len(pool.participants()) == 1


def test_a_users_pool_that_is_damaged_closes(gpu: FakeGpu, pool_name: str) -> None:
    pool = pools.create(pool_name, pools.tiny(fields=FIELDS))
    pool.pin()
    pools.set_word(pool, pool.state.journal.head, 1 << 40)
    with pytest.raises(DamagedPoolError, match="journal is damaged"):
        pool.close()
    assert pool.is_closed
    assert not gpu.registered
    remove_pool(pool_name, force=True)
