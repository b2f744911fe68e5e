"""What owns something: leases as mappings, given back, forgone, not copied, not written through."""

from __future__ import annotations

import copy
import pickle
import signal
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch

from shmblocks import (
    UNBOUNDED,
    BlockHandle,
    BlockPool,
    Field,
    HandleQueue,
    InvalidStateError,
    StaleHandleError,
    State,
)
from tests.core import pools
from tests.core.conftest import require_right
from tests.support.children import Channel, fork, run_in_fork


@pytest.fixture
def pool(pool_name: str) -> Iterator[BlockPool]:
    """16 blocks of 4 tokens, with two fields; checked and closed after the test."""
    fields = (Field("ids", (), "int64"), Field("m", (3,), "int32", transposed=True))
    with pools.create(pool_name, pools.tiny(fields=fields), role="tester") as made:
        yield made
        if not made.is_closed:
            require_right(made)


def put(pool: BlockPool, readers: int = 1) -> BlockHandle:
    return pool.put({"ids": torch.arange(5), "m": torch.ones(3, 5).int()}, readers=readers)


# --- a lease is a mapping ---------------------------------------------------------------------


def test_a_lease_is_a_mapping_of_its_fields(pool: BlockPool) -> None:
    with pool.open(put(pool)) as lease:
        assert list(lease) == ["ids", "m"]
        assert len(lease) == 2
        assert "ids" in lease
        assert lease["ids"].tolist() == list(range(5))
        assert {name: tuple(each.shape) for name, each in lease.items()} == {
            "ids": (5,),
            "m": (3, 5),
        }
        assert bytes(lease.memory("ids")[8:16]) == (1).to_bytes(8, "little")
        assert lease.memory("m").nbytes == 5 * 12
        assert lease.memory("aux").nbytes == 64
        assert int(lease.aux[0]) == 5
        with pytest.raises(KeyError, match="expected one of ids, m, got 'x'"):
            lease["x"]
        assert lease != dict(lease)
        assert {lease: 1}[lease] == 1


def test_a_view_of_a_lease_ends_with_it(pool: BlockPool) -> None:
    lease = pool.open(put(pool))
    view = lease.view
    lease.release()
    uses: list[Callable[[], object]] = [
        lambda: view["ids"], lambda: view.aux, lambda: view.memory("ids"), lambda: lease["ids"],
        lambda: list(lease), lambda: lease.is_ready,
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(InvalidStateError, match="the lease was released"):
            use()


# --- given back -------------------------------------------------------------------------------


def test_what_is_given_back_is_still_to_be_read(pool: BlockPool) -> None:
    handle = put(pool, readers=2)
    lease = pool.open(handle)
    lease.give_back()
    assert lease.is_released
    (info,) = pool.allocations()
    assert (info.state, info.readers_left, info.leases) == (State.PUBLISHED, 2, [])
    lease.give_back()
    lease.release()
    assert pool.allocations()[0].readers_left == 2
    for _ in range(2):
        pool.open(handle).release()
    assert pool.allocations() == []


def test_giving_back_after_the_release_changes_nothing(pool: BlockPool) -> None:
    handle = put(pool, readers=2)
    lease = pool.open(handle)
    lease.release()
    lease.give_back()
    assert pool.allocations()[0].readers_left == 1
    pool.free(handle)


def test_what_was_freed_meanwhile_is_free_when_it_is_given_back(pool: BlockPool) -> None:
    handle = put(pool)
    lease = pool.open(handle)
    pool.free(handle)
    assert pool.allocations()[0].state is State.DRAINING
    lease.give_back()
    assert pool.allocations() == []


# --- forgone ----------------------------------------------------------------------------------


def test_the_last_forgone_claim_frees(pool: BlockPool) -> None:
    handle = put(pool, readers=3)
    pool.forgo(handle)
    assert pool.allocations()[0].readers_left == 2
    pool.forgo(handle, 2)
    assert pool.available_blocks() == 16
    with pytest.raises(StaleHandleError):
        pool.forgo(handle)


def test_what_is_forgone_under_a_lease_is_free_with_its_release(pool: BlockPool) -> None:
    handle = put(pool, readers=2)
    with pool.open(handle) as lease:
        pool.forgo(handle)
        assert lease["ids"].tolist() == list(range(5))
        assert pool.allocations()[0].state is State.LEASED
        with pytest.raises(InvalidStateError, match=r"at most the 0 reader\(s\)"):
            pool.forgo(handle)
    assert pool.available_blocks() == 16


def test_more_claims_than_are_to_come_are_not_forgone(pool: BlockPool) -> None:
    handle = put(pool, readers=2)
    before = pools.state_of(pool)
    with pytest.raises(InvalidStateError, match=r"at most the 2 reader\(s\) .* got 3"):
        pool.forgo(handle, 3)
    with pytest.raises(ValueError, match="claims: expected a whole number from 1"):
        pool.forgo(handle, 0)
    assert pools.state_of(pool) == before
    reserved = pools.take(pool)
    with pytest.raises(InvalidStateError, match="expected published blocks, they are reserved"):
        pool.forgo(reserved)
    pool.free(handle)


# --- any number of readers --------------------------------------------------------------------


def test_any_number_may_read_what_is_published_without_bound(pool_name: str) -> None:
    with pools.create(pool_name, pools.tiny(unclaimed_timeout=1e-6)) as pool:
        handle = pool.publish(pools.take(pool, 5), readers=UNBOUNDED)
        for _ in range(3):
            with pool.open(handle), pool.open(handle):
                assert pool.allocations()[0].state is State.LEASED
            assert pool.allocations()[0].state is State.PUBLISHED
        pool.open(handle).give_back()
        assert pool.allocations()[0].readers_left == UNBOUNDED
        assert pool.reap().blocks == 0, "nobody's deadline passes"
        assert pool.check() == []
        with pytest.raises(InvalidStateError, match="any number of readers may come; free it"):
            pool.forgo(handle)
        pool.free(handle)
        assert pool.available_blocks() == 16


# --- not copied -------------------------------------------------------------------------------


def test_what_owns_something_refuses_to_be_copied(pool: BlockPool, pool_name: str) -> None:
    """Found: the copy's end released the original's claim, which went on reading."""
    handle = put(pool, readers=2)
    with (
        pool.open(handle) as lease,
        pool.reserve(4) as reservation,
        HandleQueue.create(f"{pool_name}-q", 4) as queue,
    ):
        for owner in (lease, reservation, pool, queue):
            for how in (copy.copy, copy.deepcopy):
                with pytest.raises(TypeError, match="cannot be copied"):
                    how(owner)
        assert pool.stats().leases == 1
        assert not lease.is_released
    pool.free(handle)


def test_leases_and_reservations_refuse_to_be_pickled(pool: BlockPool) -> None:
    handle = put(pool, readers=2)
    with pool.open(handle) as lease, pool.reserve(4) as reservation:
        for owner in (lease, reservation):
            with pytest.raises(TypeError, match="cannot be pickled; send its `handle`"):
                pickle.dumps(owner)
    pool.free(handle)


def test_a_queue_unpickled_in_its_own_process_is_the_same_object(pool_name: str) -> None:
    with HandleQueue.create(pool_name, 4) as queue:
        assert pickle.loads(pickle.dumps(queue)) is queue


def test_a_lease_that_a_forked_child_drops_is_its_parents_still(pool: BlockPool) -> None:
    """Found: the child warned of it."""
    handle = put(pool)
    kept = [pool.open(handle)]

    def in_child() -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            kept.clear()
        pool.available_blocks()
        return [str(each.message) for each in caught]

    assert run_in_fork(in_child) == []
    assert pool.stats().leases == 1
    kept.pop().release()


# --- not written through ----------------------------------------------------------------------


def test_a_stray_write_through_a_lease_is_a_fault(pool: BlockPool) -> None:
    handle = put(pool, readers=2)

    def write(channel: Channel) -> None:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        lease = pool.open(handle)
        assert lease["ids"].tolist() == list(range(5))
        channel.say("read")
        lease["ids"].fill_(9)

    with fork(write) as child:
        child.hear("read")
        assert child.wait() == -signal.SIGSEGV
        child.kill()
    assert pool.reap().leases == 1
    assert pool.take(handle)["ids"].tolist() == list(range(5))


def test_the_bytes_of_a_lease_are_read_only_and_those_of_a_reservation_are_not(
    pool: BlockPool,
) -> None:
    with pool.open(put(pool)) as lease:
        assert lease.memory("ids").readonly
        assert lease.memory("aux").readonly
        with pytest.raises(TypeError):
            lease.memory("ids")[0] = 1
    with pool.reserve(4) as reservation:
        assert not reservation.memory("ids").readonly


def test_a_lease_sees_what_is_written_after_it_was_opened(pool: BlockPool) -> None:
    """The read-only mapping is of the same memory, not a copy of it."""
    with pool.open(put(pool)) as lease:
        ids = lease["ids"]
        pool.field("ids").fill_(7)
        assert ids.tolist() == [7] * 5


def test_a_pool_attached_for_it_gives_leases_that_can_be_written_to(pool: BlockPool) -> None:
    handle = put(pool)
    with (
        BlockPool.attach(pool.name, prefault="off", read_only_leases=False) as other,
        other.open(handle) as lease,
    ):
        lease["ids"].fill_(3)
        assert not lease.memory("ids").readonly
        assert pool.field("ids")[:5].tolist() == [3] * 5


def test_a_writers_lease_can_be_written_to(pool: BlockPool) -> None:
    with pool.reserve(4) as reservation, pool.open_for_write(reservation.handle) as lease:
        lease["ids"].fill_(3)
        assert reservation["ids"].tolist() == [3] * 4


def test_read_only_leases_are_sent_with_the_pool(pool: BlockPool) -> None:
    with BlockPool.attach(pool.name, prefault="off", read_only_leases=False) as other:
        data = pickle.dumps(other)
    with pickle.loads(data) as again, again.open(put(pool)) as lease:
        assert not lease.memory("ids").readonly
