"""Readers by name: a claim is announced to one participant, who alone can take it up."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from shmblocks import (
    UNBOUNDED,
    BlockHandle,
    BlockPool,
    InvalidStateError,
    ParticipantId,
    PeerDiedError,
    StaleHandleError,
    State,
    TooManyLeasesError,
)
from shmblocks._state.layout import MOST_NAMED_READERS
from tests.core import pools
from tests.core.conftest import require_right
from tests.support.children import Channel, fork, wait_until


@pytest.fixture
def other(pool: BlockPool) -> Iterator[BlockPool]:
    with pools.attach(pool.name, role="127.0.0.1:5555") as attached:
        yield attached


def who(pool: BlockPool) -> ParticipantId:
    assert pool.participant is not None
    return pool.participant


def announced(pool: BlockPool, *readers: BlockPool) -> BlockHandle:
    return pool.publish(pools.take(pool, 5), readers=[who(reader) for reader in readers])


def kinds(pool: BlockPool) -> list[str]:
    require_right(pool)
    return sorted(lease.kind for info in pool.allocations() for lease in info.leases)


# --- opening ----------------------------------------------------------------------------------


def test_whoever_was_named_opens_and_the_last_one_frees(pool: BlockPool, other: BlockPool) -> None:
    handle = announced(pool, pool, other)
    assert kinds(pool) == ["announced", "announced"]
    with other.open(handle):
        assert kinds(pool) == ["announced", "reads"]
    with pool.open(handle):
        assert kinds(pool) == ["reads"]
    assert pool.available_blocks() == 16


def test_nobody_else_can_open_it(pool: BlockPool, other: BlockPool) -> None:
    handle = announced(pool, other)
    with pytest.raises(InvalidStateError, match="announced to others by name"):
        pool.open(handle)
    with other.open(handle), pytest.raises(InvalidStateError, match="there already"):
        other.open(handle)


def test_an_address_finds_who_is_to_be_named(pool: BlockPool, other: BlockPool) -> None:
    assert pool.find_participant("127.0.0.1:5555") == who(other)
    assert pool.find_participant("127.0.0.1:5556") is None


def test_one_participant_named_twice_opens_twice(pool: BlockPool, other: BlockPool) -> None:
    handle = announced(pool, other, other)
    with other.open(handle), other.open(handle):
        pass
    assert pool.available_blocks() == 16


def test_readers_are_named_one_after_the_other(pool: BlockPool, other: BlockPool) -> None:
    handle = announced(pool, pool)
    pool.add_reader(handle, who(other))
    with other.open(handle):
        pass
    assert kinds(pool) == ["announced"]
    pool.forgo(handle, reader=who(pool))
    assert pool.available_blocks() == 16


def test_a_named_reader_comes_beside_those_of_no_name(pool: BlockPool, other: BlockPool) -> None:
    handle = pool.publish(pools.take(pool, 5), readers=1)
    pool.add_reader(handle, who(other))
    with pool.open(handle):
        assert kinds(pool) == ["announced", "reads"]
    assert kinds(pool) == ["announced"]
    with other.open(handle):
        pass
    assert pool.available_blocks() == 16


def test_an_entry_for_any_number_may_be_announced_too(pool: BlockPool, other: BlockPool) -> None:
    handle = pool.publish(pools.take(pool, 5), readers=UNBOUNDED)
    pool.add_reader(handle, who(other))
    with other.open(handle):
        assert kinds(pool) == ["reads"]
    pool.free(handle)
    assert pool.available_blocks() == 16


# --- who does not come ------------------------------------------------------------------------


def test_the_claim_of_a_dead_one_comes_back_at_the_next_reap(
    pool: BlockPool, other: BlockPool
) -> None:
    reader = pools.attach(pool.name)
    handle = announced(pool, reader, other)
    pools.abandon(reader)
    assert pool.reap().leases == 1
    assert kinds(pool) == ["announced"]
    with other.open(handle):
        pass
    assert pool.available_blocks() == 16


def read_and_wait(channel: Channel, pool: BlockPool) -> None:
    pool.available_blocks()
    channel.say(who(pool))
    channel.hear("go on")


def test_the_claim_of_a_killed_process_comes_back(pool: BlockPool) -> None:
    with fork(read_and_wait, pool) as child:
        reader = child.receive()
        assert isinstance(reader, ParticipantId)
        pool.publish(pools.take(pool, 5), readers=[reader])
        assert kinds(pool) == ["announced"]
        child.kill()
        wait_until(pool.reap_if_due, "the child is seen to be dead")
    assert pool.available_blocks() == 16


def test_the_claim_of_one_who_leaves_ends_with_that(pool: BlockPool) -> None:
    reader = pools.attach(pool.name)
    announced(pool, reader)
    reader.close()
    assert pool.available_blocks() == 16


def test_a_dead_one_cannot_be_named(pool: BlockPool, other: BlockPool) -> None:
    handle = announced(pool, other)
    reader = pools.attach(pool.name)
    gone = who(reader)
    reader.close()
    reservation = pools.take(pool, 5)
    with pytest.raises(PeerDiedError, match="it has exited or left the pool"):
        pool.publish(reservation, readers=[gone])
    with pytest.raises(PeerDiedError, match="it has exited or left the pool"):
        pool.add_reader(handle, gone)
    assert kinds(pool) == ["announced"]


def test_what_nobody_opens_in_time_comes_back(pool_name: str) -> None:
    with pools.create(pool_name, pools.tiny(unclaimed_timeout=0.05)) as pool:
        announced(pool, pool)
        handle = announced(pool, pool)
        lease = pool.open(handle)
        wait_until(pool.reap_if_due, "the deadline of the first")
        assert kinds(pool) == ["reads"]
        lease.give_back()
        assert kinds(pool) == ["announced"]
        wait_until(
            lambda: pool.reap_if_due() and pool.available_blocks() == 16, "of the second, again"
        )


def test_whoever_is_not_to_come_is_taken_out(pool: BlockPool, other: BlockPool) -> None:
    handle = announced(pool, pool, other)
    assert pool.forgo(handle, reader=who(other))
    assert not pool.forgo(handle, reader=who(other))
    with pytest.raises(InvalidStateError):
        other.open(handle)
    assert other.forgo(handle, reader=who(pool))
    with pytest.raises(StaleHandleError):
        pool.forgo(handle, reader=who(pool))
    assert pool.available_blocks() == 16


def test_a_lease_that_is_given_back_is_its_readers_again(pool: BlockPool, other: BlockPool) -> None:
    handle = announced(pool, other)
    other.open(handle).give_back()
    assert kinds(pool) == ["announced"]
    with pytest.raises(InvalidStateError):
        pool.open(handle)
    with other.open(handle):
        pass
    assert pool.available_blocks() == 16


def test_what_is_freed_waits_only_for_those_who_have_come(
    pool: BlockPool, other: BlockPool
) -> None:
    handle = announced(pool, pool, other)
    lease = pool.open(handle)
    pool.free(handle)
    assert [info.state for info in pool.allocations()] == [State.DRAINING]
    assert kinds(pool) == ["reads"]
    with pytest.raises(InvalidStateError):
        other.open(handle)
    lease.give_back()
    assert pool.available_blocks() == 16
    pool.free(announced(pool, pool, other))
    assert pool.available_blocks() == 16


def test_a_ticket_carries_the_lease_of_a_named_reader(pool: BlockPool, other: BlockPool) -> None:
    handle = announced(pool, pool)
    ticket = pool.open(handle).ticket()
    with other.adopt(ticket):
        assert kinds(pool) == ["reads"]
    assert pool.available_blocks() == 16


# --- what is refused --------------------------------------------------------------------------


def test_no_reader_and_too_many_are_refused(pool: BlockPool) -> None:
    handle = pools.take(pool, 5)
    for count in (0, MOST_NAMED_READERS + 1):
        with pytest.raises(ValueError, match=r"readers: expected 1 to 32 participants, got"):
            pool.publish(handle, readers=[who(pool)] * count)
    with pytest.raises(ValueError, match="no readers by name"):
        pool.publish(handle, readers=[who(pool)], key=b"a key of 16 byte")


def test_as_many_as_may_be_named_fit_one_change(pool_name: str) -> None:
    config = pools.tiny(max_leases=2 * MOST_NAMED_READERS)
    with pools.create(pool_name, config) as pool:
        handle = pool.publish(pools.take(pool, 5), readers=[who(pool)] * MOST_NAMED_READERS)
        assert len(kinds(pool)) == MOST_NAMED_READERS
        pool.free(handle)
        assert pool.available_blocks() == 16


def test_without_slots_nothing_is_published(pool_name: str) -> None:
    config = msgspec.structs.replace(pools.tiny(), max_leases=2)
    with pools.create(pool_name, config) as pool:
        handle = pools.take(pool, 5)
        with pytest.raises(TooManyLeasesError):
            pool.publish(handle, readers=[who(pool)] * 3)
        dead = pools.attach(pool_name)
        announced(pool, dead, dead)
        pools.abandon(dead)
        pool.publish(handle, readers=[who(pool)] * 2)
        with pytest.raises(TooManyLeasesError):
            pool.add_reader(handle, who(pool))
        require_right(pool)


def test_what_is_not_published_has_no_readers(pool: BlockPool) -> None:
    handle = pools.take(pool, 5)
    with pytest.raises(InvalidStateError, match="expected published blocks, they are reserved"):
        pool.add_reader(handle, who(pool))
    pool.free(handle)
    with pytest.raises(StaleHandleError):
        pool.add_reader(handle, who(pool))
