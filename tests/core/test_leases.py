"""From reserved to freed: published once, read under leases, freed by the last of them."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from shmblocks import (
    BlockHandle,
    BlockPool,
    InvalidStateError,
    Lease,
    StaleHandleError,
    State,
    TooManyLeasesError,
)
from tests.core import pools
from tests.core.conftest import require_right
from tests.support.children import Channel, Child, fork, run_in_fork, wait_until
from tests.support.inside import run_inside


def published(pool: BlockPool, num_tokens: int = 5, readers: int = 1) -> BlockHandle:
    return pool.publish(pools.take(pool, num_tokens), readers=readers)


def state(pool: BlockPool, handle: BlockHandle) -> State:
    """FREE also when the blocks are another's now."""
    for info in pool.allocations():
        if info.generation == handle.generation:
            return info.state
    return State.FREE


# --- publishing -------------------------------------------------------------------------------


def test_what_is_published_is_read_and_then_free(pool: BlockPool) -> None:
    handle = pools.take(pool, 5)
    assert state(pool, handle) is State.RESERVED
    assert pool.publish(handle) == handle
    assert state(pool, handle) is State.PUBLISHED
    with pool.open(handle) as lease:
        assert lease.handle == handle
        assert state(pool, handle) is State.LEASED
        was_released = lease.is_released
    assert (was_released, lease.is_released) == (False, True)
    assert state(pool, handle) is State.FREE
    with pytest.raises(StaleHandleError):
        pool.open(handle)


def test_what_is_not_published_cannot_be_read(pool: BlockPool) -> None:
    handle = pools.take(pool)
    with pytest.raises(InvalidStateError, match=r"open: expected .*published or leased.*reserved"):
        pool.open(handle)
    assert pool.stats().leases == 0


def test_what_is_published_cannot_be_published_or_written_or_viewed_again(
    pool: BlockPool,
) -> None:
    handle = published(pool)
    with pytest.raises(InvalidStateError, match="publish: expected"):
        pool.publish(handle)
    with pytest.raises(InvalidStateError, match="write: expected"):
        pool.open_for_write(handle)
    with pytest.raises(InvalidStateError, match="it is published and belongs to participant 0"):
        pool.view(handle)
    assert state(pool, handle) is State.PUBLISHED


def test_the_length_that_was_written_goes_with_the_handle(pool: BlockPool) -> None:
    landing = pool.alloc_default()
    assert landing is not None
    handle = pool.publish(landing, num_tokens=3)
    assert (handle.num_tokens, handle.num_blocks) == (3, 2)
    with pytest.raises(StaleHandleError, match="published with another length"):
        pool.open(landing)
    with pool.open(handle) as lease:
        assert lease.view.num_tokens == 3


def test_a_length_beyond_the_blocks_is_refused(pool: BlockPool) -> None:
    handle = pools.take(pool, 5)
    assert pool.publish(handle, num_tokens=8).num_tokens == 8
    another = pools.take(pool, 5)
    with pytest.raises(ValueError, match="num_tokens: expected at most 8 for"):
        pool.publish(another, num_tokens=9)
    with pytest.raises(ValueError, match="num_tokens: expected a whole number"):
        pool.publish(another, num_tokens=0)


@pytest.mark.parametrize("readers", [0, -1])
def test_what_nobody_will_read_is_not_published(pool: BlockPool, readers: int) -> None:
    handle = pools.take(pool)
    with pytest.raises(ValueError, match="readers: expected a whole number from 1 to"):
        pool.publish(handle, readers=readers)
    assert state(pool, handle) is State.RESERVED


def test_any_process_may_publish_what_another_reserved(pool: BlockPool) -> None:
    handle = pools.take(pool, 5)
    assert run_in_fork(pool.publish, handle) == handle
    with pool.open(handle):
        pass


# --- reading ----------------------------------------------------------------------------------


def test_the_last_of_the_announced_readers_frees(pool: BlockPool) -> None:
    handle = published(pool, readers=3)
    first = pool.open(handle)
    second = pool.open(handle)
    first.release()
    assert state(pool, handle) is State.LEASED
    second.release()
    assert state(pool, handle) is State.PUBLISHED, "one is still to come"
    with pool.open(handle):
        pass
    assert state(pool, handle) is State.FREE


def test_more_readers_than_announced_are_refused(pool: BlockPool) -> None:
    handle = published(pool, readers=2)
    with pool.open(handle), pool.open(handle):
        with pytest.raises(InvalidStateError, match=r"every reader .* announced is there already"):
            pool.open(handle)
        assert pool.stats().leases == 2
    with pytest.raises(StaleHandleError):
        pool.open(handle)


def read_there(channel: Channel, pool: BlockPool, handle: BlockHandle) -> None:
    with pool.open(handle) as lease:
        channel.say(lease.view.num_tokens)
        channel.hear("release")


def test_readers_in_several_processes_share_and_the_last_frees(pool: BlockPool) -> None:
    handle = published(pool, 9, readers=3)
    children: list[Child] = []
    with (
        fork(read_there, pool, handle) as a,
        fork(read_there, pool, handle) as b,
        fork(read_there, pool, handle) as c,
    ):
        for child in (a, b, c):
            child.hear(9)
            children.append(child)
        (info,) = pool.allocations()
        assert {lease.holder.pid for lease in info.leases if lease.holder} == {
            child.pid for child in children
        }
        assert [lease.kind for lease in info.leases] == ["reads"] * 3
        for child in children:
            assert state(pool, handle) is State.LEASED
            child.say("release")
            child.result()
    assert state(pool, handle) is State.FREE


def test_releasing_twice_takes_nobody_elses_lease(pool: BlockPool) -> None:
    handle = published(pool, readers=3)
    first, second = pool.open(handle), pool.open(handle)
    first.release()
    first.release()
    third = pool.open(handle)  # in the slot that the first had
    first.release()
    assert pool.stats().leases == 2
    second.release()
    third.release()
    assert state(pool, handle) is State.FREE


def test_a_lease_is_released_when_its_block_of_code_raises(pool: BlockPool) -> None:
    handle = published(pool)
    with pytest.raises(LookupError), pool.open(handle):
        raise LookupError
    assert state(pool, handle) is State.FREE


def test_a_lease_that_was_dropped_is_released_at_once_with_a_warning(pool: BlockPool) -> None:
    handle = published(pool)
    kept = [pool.open(handle)]
    with pytest.warns(ResourceWarning, match="lease was not released"):
        kept.clear()
    assert state(pool, handle) is State.FREE


def test_a_lease_dropped_in_the_middle_of_an_operation_is_released_after_it(
    pool: BlockPool,
) -> None:
    kept = [pool.open(published(pool))]
    with pytest.warns(ResourceWarning, match="lease was not released"):
        run_inside(pool, kept.clear)  # as the collector may, under the lock
    wait_until(lambda: pool.stats().leases == 0, "another thread has released it")


def test_a_released_lease_shows_nothing_any_more(pool: BlockPool) -> None:
    lease = pool.open(published(pool))
    assert "open" in repr(lease)
    lease.release()
    assert "released" in repr(lease)
    with pytest.raises(InvalidStateError, match="the lease was released; read within it"):
        lease["input_embeddings"]
    with pytest.raises(InvalidStateError, match="the lease was released; read within it"):
        _ = lease.aux


def test_as_many_leases_as_the_config_says_and_no_more(pool: BlockPool) -> None:
    handle = published(pool, readers=20)
    leases = [pool.open(handle) for _ in range(16)]
    before = pools.state_of(pool)
    with pytest.raises(TooManyLeasesError, match=r"all 16 leases are open; .*max_leases"):
        pool.open(handle)
    with pytest.raises(TooManyLeasesError):
        pool.open_for_write(pool.handle_at(pools.take(pool).start_block))
    pool.free(pool.handle_at(2))
    assert pools.state_of(pool)[:-40] == before[:-40] or pool.check() == []
    leases.pop(7).release()
    leases.append(pool.open(handle))
    for lease in leases:
        lease.release()
    assert state(pool, handle) is State.PUBLISHED
    pool.free(handle)


def test_the_lease_slots_of_the_dead_are_used_by_the_living(pool: BlockPool) -> None:
    handle = published(pool, readers=40)
    dead = pools.attach(pool.name)
    kept = [dead.open(handle) for _ in range(16)]
    pools.abandon(dead)
    with pool.open(handle):
        assert pool.stats().leases == 1
    assert all(lease.is_released for lease in kept)
    pool.free(handle)


# --- freeing under leases ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["reader", "writer"])
def test_what_is_freed_under_a_lease_drains_and_is_free_with_its_last_one(
    pool: BlockPool, kind: str
) -> None:
    handle, leases = leased(pool, kind)
    pool.free(handle)
    assert state(pool, handle) is State.DRAINING
    assert pool.available_blocks() == 14
    for use in (pool.open, pool.open_for_write, pool.publish, pool.view):
        with pytest.raises((InvalidStateError, StaleHandleError)):
            use(handle)
    leases[0].release()
    assert state(pool, handle) is State.DRAINING
    leases[1].release()
    assert state(pool, handle) is State.FREE
    assert pool.available_blocks() == 16


def leased(pool: BlockPool, kind: str) -> tuple[BlockHandle, list[Lease]]:
    if kind == "reader":
        handle = published(pool, readers=3)
        return handle, [pool.open(handle), pool.open(handle)]
    handle = pools.take(pool, 5)
    return handle, [pool.open_for_write(handle), pool.open_for_write(handle)]


@pytest.mark.parametrize("kind", ["reader", "writer"])
def test_freeing_twice_is_told_also_while_leases_are_open(pool: BlockPool, kind: str) -> None:
    handle, leases = leased(pool, kind)
    pool.free(handle)
    before = pools.state_of(pool)
    with pytest.raises(StaleHandleError):
        pool.free(handle)
    assert pools.state_of(pool) == before
    for lease in leases:
        lease.release()


# --- landing ----------------------------------------------------------------------------------


def test_a_writers_lease_keeps_the_blocks_whatever_their_owner_does(pool: BlockPool) -> None:
    landing = pool.alloc_default()
    assert landing is not None

    def write_there(channel: Channel) -> None:
        with pool.open_for_write(landing):
            channel.say("writing")
            channel.hear("done")

    with fork(write_there) as writer:
        writer.hear("writing")
        with pytest.raises(InvalidStateError, match=r"1 writer's lease\(s\) are open"):
            pool.publish(landing)
        pool.free(landing)
        assert pool.alloc(60) is None, "two blocks are being written to"
        writer.say("done")
        writer.result()
    assert pool.alloc(64) is not None


def test_a_writers_lease_ends_and_leaves_the_reservation(pool: BlockPool) -> None:
    landing = pools.take(pool)
    with pool.open_for_write(landing) as lease:
        assert [info.kind for info in pool.allocations()[0].leases] == ["writes"]
        assert lease.handle == landing
    assert state(pool, landing) is State.RESERVED
    pool.free(pool.publish(landing))


# --- the dead and the late --------------------------------------------------------------------


def abandoned(pool: BlockPool, act: Callable[[BlockPool], object]) -> object:
    """What `act` gave, done by a participant that is dead now. Leases in it are kept."""
    other = pools.attach(pool.name)
    kept = act(other)
    pools.abandon(other)
    return kept


def test_the_leases_of_the_dead_are_released_and_the_readers_to_come_still_read(
    pool: BlockPool,
) -> None:
    handle = published(pool, readers=2)
    kept = abandoned(pool, lambda other: other.open(handle))
    assert kept is not None
    report = pool.reap()
    assert (report.leases, report.reservations, report.blocks) == (1, 0, 0)
    assert state(pool, handle) is State.PUBLISHED
    with pool.open(handle):
        pass
    assert state(pool, handle) is State.FREE


def test_the_last_reader_frees_also_by_dying(pool: BlockPool) -> None:
    handle = published(pool)
    kept = abandoned(pool, lambda other: other.open(handle))
    assert kept is not None
    report = pool.reap()
    assert (report.leases, report.blocks) == (1, 2)
    assert state(pool, handle) is State.FREE


def test_what_a_dead_writer_reserved_is_never_readable(pool: BlockPool) -> None:
    handle = abandoned(pool, lambda other: pools.take(other, 5))
    assert isinstance(handle, BlockHandle)
    with pytest.raises(InvalidStateError, match="reserved"):
        pool.open(handle)
    assert pool.reap().reservations == 1
    with pytest.raises(StaleHandleError):
        pool.open(handle)


def test_what_a_dead_writer_published_is_read(pool: BlockPool) -> None:
    handle = abandoned(pool, published)
    assert isinstance(handle, BlockHandle)
    assert pool.reap().blocks == 0
    with pool.open(handle):
        require_right(pool)


def test_a_dead_owners_landing_drains_until_its_writer_has_gone(pool: BlockPool) -> None:
    landing = abandoned(pool, lambda other: pools.take(other, 5))
    assert isinstance(landing, BlockHandle)
    lease = pool.open_for_write(landing)
    report = pool.reap()
    assert (report.reservations, report.blocks) == (1, 0)
    assert state(pool, landing) is State.DRAINING
    lease.release()
    assert state(pool, landing) is State.FREE


def test_a_dead_writers_lease_leaves_the_landing_to_its_owner(pool: BlockPool) -> None:
    landing = pools.take(pool, 5)
    kept = abandoned(pool, lambda other: other.open_for_write(landing))
    assert kept is not None
    assert pool.reap().leases == 1
    assert state(pool, landing) is State.RESERVED
    pool.free(landing)


def test_what_nobody_opens_in_time_is_taken_back_and_its_handle_is_stale(pool_name: str) -> None:
    with pools.create(pool_name, pools.tiny(unclaimed_timeout=1e-6)) as pool:
        handle = published(pool, 40)
        pools.take(pool, 12)
        time.sleep(1e-5)
        assert state(pool, handle) is State.PUBLISHED, "until somebody needs the blocks, or reaps"
        assert pool.alloc(40) is not None
        with pytest.raises(StaleHandleError):
            pool.open(handle)
        require_right(pool)


def test_what_was_opened_in_time_is_never_taken_from_its_reader(pool_name: str) -> None:
    with pools.create(pool_name, pools.tiny(unclaimed_timeout=1e-6)) as pool:
        handle = published(pool, readers=2)
        lease = pool.open(handle)
        time.sleep(1e-5)
        assert pool.reap().blocks == 0
        assert state(pool, handle) is State.LEASED
        lease.release()
        assert pool.reap().unclaimed == 1, "its second reader did not come"


def test_reaping_reports_everything_that_it_gave_back(pool_name: str) -> None:
    with pools.create(pool_name, pools.tiny(unclaimed_timeout=1e-6)) as pool:
        published(pool, 4)
        read = published(pool, 8)
        kept = abandoned(pool, lambda other: (pools.take(other, 12), other.open(read)))
        assert kept is not None
        time.sleep(1e-5)
        report = pool.reap()
        assert (report.reservations, report.leases, report.unclaimed) == (1, 1, 1)
        assert (report.blocks, report.participants) == (6, 1)
        assert pool.reap() == type(report)()
        assert pool.available_blocks() == 16
