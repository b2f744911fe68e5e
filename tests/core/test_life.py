"""From attaching to leaving: who keeps a pool, who removes it, and what is left of it then."""

from __future__ import annotations

import gc
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import util
from pathlib import Path

import pytest

from shmblocks import (
    BlockHandle,
    BlockPool,
    HandleQueue,
    PoolClosedError,
    PoolExistsError,
    PoolInspector,
    PoolNotFoundError,
    list_pools,
    remove_pool,
)
from shmblocks._os.filelock import PLACE_BYTE
from shmblocks._os.segment import path_of
from shmblocks.pool import Prefault
from tests.core import pools
from tests.core.conftest import require_right
from tests.support import procfs
from tests.support.children import (
    Channel,
    fork,
    run_in_child,
    run_in_fork,
    run_program,
    wait_until,
)
from tests.support.inside import run_inside

ROOT = Path(__file__).resolve().parents[2]


def is_there(name: str) -> bool:
    return Path(path_of(name)).exists()


# --- attaching --------------------------------------------------------------------------------


def test_attaching_needs_only_the_name(pool: BlockPool) -> None:
    for name in (pool.name, pool.name[1:]):
        with pools.attach(name) as other:
            assert other.name == pool.name
            assert other.config == pool.config
            assert other.pool_id == pool.pool_id
            assert other.participant != pool.participant


def test_a_pool_that_is_not_there_is_told_at_once(pool_name: str) -> None:
    with pytest.raises(PoolNotFoundError, match=f"{pool_name}: there is no such pool.*start its"):
        pools.attach(pool_name)


def test_attaching_waits_no_longer_than_it_is_told_to(pool_name: str) -> None:
    begin = time.monotonic()
    with pytest.raises(PoolNotFoundError, match=r"\(waited 0\.1 s\)"):
        pools.attach(pool_name, timeout=0.1)
    assert time.monotonic() - begin >= 0.1


@pytest.mark.parametrize("timeout", [float("nan"), -1.0])
def test_attaching_refuses_a_timeout_that_is_no_time(pool_name: str, timeout: float) -> None:
    """Found: it looked for ever for a pool that is not there, with nan."""
    with pytest.raises(ValueError, match="timeout: expected seconds >= 0"):
        pools.attach(pool_name, timeout=timeout)
    with pytest.raises(ValueError, match="timeout: expected seconds >= 0"):
        HandleQueue.attach(pool_name, timeout=timeout)


@pytest.mark.parametrize("leftover", [False, True])
def test_attaching_waits_for_a_pool_that_is_yet_to_come(
    pool_name: str, monkeypatch: pytest.MonkeyPatch, leftover: bool
) -> None:
    if leftover:
        pools.abandon(pools.create(pool_name))
    made: list[BlockPool] = []

    def create_instead_of_sleeping(seconds: float) -> None:
        if not made:
            made.append(pools.create(pool_name))

    monkeypatch.setattr(time, "sleep", create_instead_of_sleeping)
    with pools.attach(pool_name, timeout=60) as pool:
        assert pool.pool_id == made[0].pool_id
    made[0].close()


def test_a_dead_pool_cannot_be_attached_and_attaching_leaves_it_as_it_is(pool_name: str) -> None:
    pools.abandon(pools.create(pool_name))
    with pytest.raises(PoolNotFoundError, match=r"all its processes are dead.*replaces it"):
        pools.attach(pool_name)
    assert is_there(pool_name)
    assert [pool.state for pool in list_pools() if pool.name[1:] == pool_name] == ["dead"]
    remove_pool(pool_name)
    assert not is_there(pool_name)


def test_an_unknown_prefault_is_refused_before_anything_is_made(pool_name: str) -> None:
    with pytest.raises(ValueError, match="prefault: expected one of background, now, off"):
        BlockPool.create(pool_name, pools.tiny(), prefault="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prefault: expected one of background, now, off"):
        BlockPool.attach(pool_name, prefault="yes")  # type: ignore[arg-type]
    assert not is_there(pool_name)


@pytest.mark.parametrize("prefault", ["background", "now", "off"])
def test_prefaulting_changes_no_byte_and_ends_with_the_pool(
    pool_name: str, prefault: Prefault
) -> None:
    with BlockPool.create(pool_name, pools.tiny(), prefault=prefault) as pool:
        pools.take(pool)
        with BlockPool.attach(pool_name, prefault=prefault) as other:
            assert other.stats().reserved_blocks == 1
    assert not [each for each in threading.enumerate() if "prefault" in each.name]


# --- leaving ----------------------------------------------------------------------------------


def test_the_last_one_out_removes_the_segment(pool_name: str) -> None:
    first = pools.create(pool_name)
    second = pools.attach(pool_name)
    first.close()
    assert is_there(pool_name), "a pool outlives its creator"
    with pools.attach(pool_name) as third:
        second.close()
        assert is_there(pool_name)
        require_right(third)
    assert not is_there(pool_name)


def test_an_inspector_keeps_no_pool(pool_name: str) -> None:
    pool = pools.create(pool_name)
    with PoolInspector(pool_name) as inspector:
        was_alive = inspector.is_alive
        pool.close()
        assert not is_there(pool_name)
        assert (was_alive, inspector.is_alive) == (True, False)
        assert inspector.check() == []


def test_closing_gives_back_what_is_ones_own_and_nothing_else(pool: BlockPool) -> None:
    ours = pools.take(pool, 3)
    published = pool.publish(pools.take(pool, 5), readers=2)
    other = pools.attach(pool.name)
    theirs = other.publish(pools.take(other, 9))
    pools.take(other, 2)
    leases = [other.open(published), other.open_for_write(ours)]
    assert pool.stats().leases == 2
    other.close()
    assert all(lease.is_released for lease in leases)
    require_right(pool)
    states = {info.start_block: str(info.state) for info in pool.allocations()}
    assert states == {
        ours.start_block: "reserved",
        published.start_block: "published",
        theirs.start_block: "published",  # what is published belongs to its readers
    }
    with pool.open(theirs), pool.open(published):
        assert pool.stats().leased_blocks == 5


def test_closing_is_idempotent_and_says_so(pool_name: str) -> None:
    pool = pools.create(pool_name)
    was_closed = pool.is_closed
    assert "ParticipantId(slot=0" in repr(pool)
    pool.close()
    pool.close()
    assert (was_closed, pool.is_closed) == (False, True)
    assert pool.participant is None
    assert "closed" in repr(pool)
    assert pool.name == f"/{pool_name}"
    assert pool.config == pools.tiny()


OPERATIONS: list[Callable[[BlockPool, BlockHandle], object]] = [
    lambda pool, handle: pool.alloc(1),
    lambda pool, handle: pool.alloc_default(),
    lambda pool, handle: pool.alloc_blocks(1, 1),
    lambda pool, handle: pool.grow(handle, 2),
    lambda pool, handle: pool.free(handle),
    lambda pool, handle: pool.view(handle),
    lambda pool, handle: pool.open_for_write(handle),
    lambda pool, handle: pool.publish(handle),
    lambda pool, handle: pool.open(handle),
    lambda pool, handle: pool.available_blocks(),
    lambda pool, handle: pool.stats(),
    lambda pool, handle: pool.allocations(),
    lambda pool, handle: pool.participants(),
    lambda pool, handle: pool.check(),
    lambda pool, handle: pool.reap(),
    lambda pool, handle: pool.handle_at(0),
    lambda pool, handle: pool.field("aux"),
]


def test_no_operation_works_on_a_closed_pool(pool_name: str) -> None:
    pool = pools.create(pool_name)
    handle = pools.take(pool)
    pool.close()
    for operation in OPERATIONS:
        with pytest.raises(PoolClosedError, match=f"{pool_name}: closed in this process"):
            operation(pool, handle)


def test_a_thread_that_closes_ends_the_others_with_an_error(pool_name: str) -> None:
    pool = pools.create(pool_name)
    ended: list[str] = []
    running = threading.Barrier(4)

    def use() -> None:
        running.wait()
        try:
            while True:
                handle = pool.alloc(1)
                if handle is not None:
                    pool.free(handle)
        except PoolClosedError as error:
            ended.append(str(error))

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    running.wait()
    pool.close()
    for thread in threads:
        thread.join()
    assert len(ended) == 3
    assert not is_there(pool_name)


def test_a_pool_that_is_dropped_leaves_at_once(pool: BlockPool) -> None:
    other = pools.attach(pool.name)
    pools.take(other)
    del other
    assert [each.is_self for each in pool.participants()] == [True]
    assert pool.stats().reserved_blocks == 0


def test_a_pool_that_is_dropped_inside_an_operation_on_its_segment_leaves_too(
    pool: BlockPool,
) -> None:
    """Found: it waited for the lock of the operation that it had interrupted."""
    other = pools.attach(pool.name)
    pools.take(other)
    kept = [other]
    del other
    run_inside(pool, kept.clear)
    wait_until(lambda: len(pool.participants()) == 1, "it left from another thread")
    assert pool.stats().reserved_blocks == 0


def test_a_pool_that_is_dropped_inside_an_operation_and_cannot_leave_lets_go(
    pool_name: str,
) -> None:
    with pools.create(pool_name, pools.tiny(lock_timeout=0.2)) as pool:
        other = pools.attach(pool.name)
        pools.take(other)
        kept = [other]
        del other
        stranger = pools.locks_of(pool.name)

        def drop() -> None:
            kept.clear()
            wait_until(lambda: not stranger.is_locked_by_others(PLACE_BYTE + 1), "its slot fell")

        run_inside(pool, drop)
        stranger.close()
        assert pool.reap().participants == 1
        assert pool.stats().reserved_blocks == 0


def test_nothing_is_kept_of_pools_that_were_closed(new_pool_name: Callable[[], str]) -> None:
    registry: dict[object, object] = vars(util)["_finalizer_registry"]
    gc.collect()
    before = set(registry)
    for _ in range(3):
        pools.create(new_pool_name()).close()
        HandleQueue.create(new_pool_name(), 4).close()
    gc.collect()
    assert set(registry) <= before


def test_closing_lets_go_of_the_memory_without_the_garbage_collector(pool_name: str) -> None:
    def used() -> tuple[set[str], set[str]]:
        return set(procfs.mapped_segments("")), {each.target for each in procfs.descriptors()}

    before = used()
    gc.disable()
    try:
        first = pools.create(pool_name)
        second = pools.attach(pool_name)
        for pool in (first, second):
            pool.free(pools.take(pool))
            pool.close()
        assert used() == before
    finally:
        gc.enable()


def test_a_forked_process_that_ends_leaves_what_it_had_attached(pool: BlockPool) -> None:
    def use() -> int:
        other = pools.attach(pool.name)
        return pools.take(other).start_block + pools.take(pool).start_block

    assert run_in_fork(use) == 1
    assert pool.stats().participants == 1
    assert pool.stats().dead_participants == 0
    assert pool.stats().reserved_blocks == 0


PROGRAM = """
import sys
from shmblocks import BlockPool, PoolConfig
name, how = sys.argv[1:]
pool = BlockPool.create(name, PoolConfig(total_tokens=64, block_size=4))
pool.alloc(5)
if how == "error":
    raise SystemExit(3)
if how == "attach":
    sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["end", "error"])
def test_a_program_that_ends_without_closing_leaves_nothing(pool_name: str, how: str) -> None:
    command = [sys.executable, "-c", PROGRAM, pool_name, how]
    run_program(command, returncode=3 if how == "error" else 0, directory=ROOT)
    assert not is_there(pool_name)


def test_a_program_that_is_told_the_name_joins(pool: BlockPool) -> None:
    handle = pool.publish(pools.take(pool, 7))
    code = (
        "import sys; from shmblocks import *\n"
        "assert 'torch' not in sys.modules\n"
        "pool = BlockPool.attach(sys.argv[1], role='program')\n"
        "handle = BlockHandle.decode(bytes.fromhex(sys.argv[2]))\n"
        "lease = pool.open(handle); print(pool.stats().leased_blocks); lease.release()\n"
    )
    told = run_program(
        [sys.executable, "-c", code, pool.name, handle.encode().hex()], directory=ROOT
    )
    assert told.stdout == "2\n"
    assert pool.stats().allocations == 0


# --- everybody dies ---------------------------------------------------------------------------


def hold_and_wait(channel: Channel, name: str) -> None:
    pool = pools.attach(name)
    handle = pool.publish(pools.take(pool, 6), readers=2)
    channel.say(handle.encode())
    channel.receive()


def test_a_pool_outlives_its_creators_death_with_all_that_is_published(pool_name: str) -> None:
    def create(channel: Channel) -> None:
        pool = pools.create(pool_name)
        pools.take(pool, 9)
        channel.say(pool.publish(pools.take(pool, 6), readers=2).encode())
        channel.receive()

    with fork(create) as creator:
        data = creator.receive()
        assert isinstance(data, bytes)
        with pools.attach(pool_name) as pool:
            creator.kill()
            assert pool.stats().dead_participants == 1
            with pool.open(BlockHandle.decode(data)):
                report = pool.reap()
                assert (report.reservations, report.blocks, report.participants) == (1, 3, 1)
                require_right(pool)
                with pools.attach(pool_name) as newcomer:
                    assert newcomer.stats().leased_blocks == 2
    assert not is_there(pool_name)


def test_after_the_death_of_all_the_next_create_begins_anew(pool_name: str) -> None:
    with pools.create(pool_name) as creator, fork(hold_and_wait, pool_name) as one:
        one.receive()
        old = creator.pool_id
        pools.abandon(creator)
        with pytest.raises(PoolExistsError):
            pools.create(pool_name)
        one.kill()
        with pools.create(pool_name) as pool:
            assert pool.pool_id != old
            assert pool.available_blocks() == 16
            require_right(pool)
        creator.close()


# --- taken away under its users ---------------------------------------------------------------


def test_a_segment_removed_under_its_users_works_on_for_them(pool_name: str) -> None:
    first = pools.create(pool_name)
    second = pools.attach(pool_name)
    os.unlink(path_of(pool_name))
    handle = first.publish(pools.take(first, 5))
    with second.open(handle):
        assert first.stats().leased_blocks == 2
    with pytest.raises(PoolNotFoundError):
        pools.attach(pool_name)
    # Another may take the name, and is not touched when the old ones leave.
    with pools.create(pool_name) as new:
        first.close()
        second.close()
        assert is_there(pool_name)
        with pools.attach(pool_name) as other:
            assert other.pool_id == new.pool_id
    assert not is_there(pool_name)


def test_a_pool_removed_by_force_is_joined_by_nobody_and_used_by_those_inside(
    pool: BlockPool,
) -> None:
    with pytest.raises(PoolExistsError, match=rf"participant 0 \(pid {os.getpid()}, tester\)"):
        remove_pool(pool.name)
    assert is_there(pool.name)
    remove_pool(pool.name, force=True)
    with pytest.raises(PoolNotFoundError):
        pools.attach(pool.name)
    pool.free(pools.take(pool))


# --- sent elsewhere ---------------------------------------------------------------------------


def use_sent_pool(sent: BlockPool, data: bytes) -> tuple[int, int, bool]:
    """Runs in a spawned process, to which the pool was pickled."""
    lease = sent.open(BlockHandle.decode(data))
    leased = sent.stats().leased_blocks
    lease.release()
    is_self = [each.pid for each in sent.participants() if each.is_self] == [os.getpid()]
    sent.close()
    return sent.pool_id, leased, is_self


def test_a_pool_is_sent_to_a_spawned_process_and_is_the_same_there(pool: BlockPool) -> None:
    handle = pool.publish(pools.take(pool, 5))
    assert run_in_child(use_sent_pool, pool, handle.encode()) == (pool.pool_id, 2, True)
    assert pool.stats().allocations == 0
    assert pool.stats().participants == 1


def test_a_pool_unpickled_in_its_own_process_is_the_same_object(pool: BlockPool) -> None:
    """Found: each unpickling took a slot of its own, until there were none."""
    assert pickle.loads(pickle.dumps(pool)) is pool
    assert [each.role for each in pool.participants()] == ["tester"]


def test_a_pool_unpickled_after_it_was_closed_here_attaches_again(pool: BlockPool) -> None:
    with pools.attach(pool.name, role="late") as other:
        data = pickle.dumps(other)
    with pickle.loads(data) as again:
        assert again is not other
        assert [each.role for each in pool.participants()] == ["tester", "late"]
    with pools.attach(pool.name) as another:
        # Whichever of the open ones it is, it is none more.
        assert pickle.loads(data) in (pool, another)
        assert len(pool.participants()) == 2


def test_a_pool_that_was_replaced_on_the_way_is_not_mistaken_for_its_successor(
    pool_name: str,
) -> None:
    with pools.create(pool_name) as old:
        data = pickle.dumps(old)
    with pytest.raises(PoolNotFoundError):
        pickle.loads(data)
    with pools.create(pool_name) as new:
        with pytest.raises(PoolNotFoundError, match="the pool that was sent is gone"):
            pickle.loads(data)
        assert new.stats().participants == 1
