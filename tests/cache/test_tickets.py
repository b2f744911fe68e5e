"""Tickets: leases that travel from process to process."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import cast

import pytest

from shmblocks import (
    BlockPool,
    ForeignHandleError,
    InvalidStateError,
    Lease,
    MalformedHandleError,
    StaleHandleError,
    TooManyLeasesError,
)
from tests.cache import kit
from tests.support.children import Channel, run_in_fork, spawn


def attach(name: str) -> BlockPool:
    return BlockPool.attach(name, prefault="off")


def lease_of(pool: BlockPool, name: object = "a") -> Lease:
    if not kit.is_there(pool, name):
        kit.put(pool, name)
    (lease,) = pool.get(kit.key(name)) or []
    return lease


def test_a_ticket_has_at_most_64_bytes(pool: BlockPool) -> None:
    ticket = lease_of(pool).ticket()
    assert isinstance(ticket, bytes)
    assert len(ticket) <= 64
    assert pool.revoke(ticket)


def test_whoever_adopts_a_ticket_has_the_lease(pool: BlockPool) -> None:
    lease = lease_of(pool)
    ticket = lease.ticket()
    with attach(pool.name) as other:
        adopted = other.adopt(ticket)
        assert adopted.handle == lease.handle
        (info,) = pool.allocations()
        assert [each.holder_id for each in info.leases] == [other.participant]
        adopted.release()
    assert pool.stats().leases == 0
    assert kit.is_there(pool, "a")


def test_the_lease_of_a_ticket_is_over_for_its_giver(pool: BlockPool) -> None:
    lease = lease_of(pool)
    ticket = lease.ticket()
    assert lease.is_released
    lease.release()
    assert pool.stats().leases == 1
    with pytest.raises(InvalidStateError):
        lease.ticket()
    pool.adopt(ticket).release()


def test_a_ticket_is_good_for_one_lease(pool: BlockPool) -> None:
    ticket = lease_of(pool).ticket()
    adopted = pool.adopt(ticket)
    with pytest.raises(StaleHandleError, match="it was used, or revoked"):
        pool.adopt(ticket)
    assert pool.stats().leases == 1
    adopted.release()
    with pytest.raises(StaleHandleError):
        pool.adopt(ticket)


def test_tickets_for_several_readers_are_taken_at_once(pool: BlockPool) -> None:
    handle = kit.put(pool, "a")
    given = pool.get_tickets(kit.key("a"), leases=3)
    assert given is not None
    assert given.handle == handle
    assert len(set(given.tickets)) == 3
    assert pool.stats().leases == 3
    with attach(pool.name) as other:
        adopted = [other.adopt(ticket) for ticket in given.tickets[:2]]
        assert pool.revoke(given.tickets[2])
        assert not pool.revoke(given.tickets[0])
        for lease in adopted:
            lease.release()
    stats = pool.cache_stats()
    assert (stats.lookups, stats.hits, pool.stats().leases) == (1, 1, 0)


def test_tickets_of_a_key_that_is_not_there_are_a_miss(pool: BlockPool) -> None:
    assert pool.get_tickets(kit.key("a")) is None
    assert pool.cache_stats().misses == 1


def test_an_entry_is_not_evicted_while_a_ticket_of_it_travels(pool: BlockPool) -> None:
    kit.put(pool, "a", 20)
    given = pool.get_tickets(kit.key("a"))
    assert given is not None
    assert pool.alloc(20 * kit.BLOCK_SIZE) is None
    assert pool.revoke(given.tickets[0])
    handle = pool.alloc(20 * kit.BLOCK_SIZE)
    assert handle is not None
    pool.free(handle)


def test_tickets_come_back_when_their_giver_leaves(pool: BlockPool) -> None:
    kit.put(pool, "a")
    with attach(pool.name) as other:
        given = other.get_tickets(kit.key("a"), leases=2)
        assert given is not None
        assert pool.stats().leases == 2
    assert pool.stats().leases == 0
    with pytest.raises(StaleHandleError):
        pool.adopt(given.tickets[0])


def test_an_adopted_lease_may_travel_on(pool: BlockPool) -> None:
    first = lease_of(pool).ticket()
    second = pool.adopt(first).ticket()
    assert first != second
    assert not pool.revoke(first)
    pool.adopt(second).release()
    assert pool.stats().leases == 0


def test_a_revoked_ticket_cannot_be_adopted(pool: BlockPool) -> None:
    ticket = lease_of(pool).ticket()
    assert pool.revoke(ticket)
    assert not pool.revoke(ticket)
    assert pool.stats().leases == 0
    with pytest.raises(StaleHandleError):
        pool.adopt(ticket)


def test_what_was_adopted_cannot_be_revoked(pool: BlockPool) -> None:
    ticket = lease_of(pool).ticket()
    with attach(pool.name) as other:
        adopted = other.adopt(ticket)
        assert not pool.revoke(ticket)
        adopted.release()


def test_only_its_giver_revokes_a_ticket(pool: BlockPool) -> None:
    ticket = lease_of(pool).ticket()
    with attach(pool.name) as other:
        assert not other.revoke(ticket)
    assert not run_in_fork(lambda: pool.revoke(ticket))
    assert pool.revoke(ticket)


def test_the_slot_of_an_old_ticket_may_be_used_again(pool: BlockPool) -> None:
    old = lease_of(pool).ticket()
    assert pool.revoke(old)
    new = lease_of(pool).ticket()
    with pytest.raises(StaleHandleError):
        pool.adopt(old)
    assert not pool.revoke(old)
    pool.adopt(new).release()


def test_a_ticket_ends_when_its_giver_closes(pool: BlockPool) -> None:
    kit.put(pool, "a")
    with attach(pool.name) as giver:
        ticket = lease_of(giver).ticket()
    assert pool.stats().leases == 0
    with pytest.raises(StaleHandleError):
        pool.adopt(ticket)


def _give_and_wait(channel: Channel, name: str) -> None:
    with attach(name) as pool:
        channel.say([lease_of(pool).ticket(), lease_of(pool).ticket()])
        channel.receive()


def test_a_ticket_ends_when_its_giver_dies_and_what_was_adopted_stays(pool: BlockPool) -> None:
    kit.put(pool, "a")
    with spawn(_give_and_wait, pool.name) as child:
        adopted, lost = cast("list[bytes]", child.receive())
        lease = pool.adopt(adopted)
        child.kill()
    pool.reap()
    with pytest.raises(StaleHandleError, match="the process that gave it has died or left"):
        pool.adopt(lost)
    assert pool.stats().leases == 1
    assert not lease.is_released
    lease.release()


def test_the_adopters_death_gives_the_lease_back(pool: BlockPool) -> None:
    ticket = lease_of(pool).ticket()
    with spawn(_adopt_and_wait, pool.name, ticket) as child:
        child.hear("adopted")
        child.kill()
    assert pool.reap().leases == 1
    assert kit.is_there(pool, "a")


def _adopt_and_wait(channel: Channel, name: str, ticket: bytes) -> None:
    with attach(name) as pool:
        lease = pool.adopt(ticket)
        channel.say("adopted")
        channel.receive()
        lease.release()


def test_a_dropped_entry_is_there_until_its_ticket_was_used(pool: BlockPool) -> None:
    ticket = lease_of(pool).ticket()
    pool.drop(kit.key("a"))
    assert pool.available_blocks() == 31
    pool.adopt(ticket).release()
    assert pool.available_blocks() == 32


def test_an_announced_readers_lease_may_travel(pool: BlockPool) -> None:
    handle = pool.publish(kit.reserve(pool), readers=1)
    ticket = pool.open(handle).ticket()
    pool.adopt(ticket).release()
    assert pool.available_blocks() == 32


def test_a_writers_lease_does_not_travel(pool: BlockPool) -> None:
    handle = kit.reserve(pool)
    with pool.open_for_write(handle) as lease:
        with pytest.raises(InvalidStateError, match="writer's"):
            lease.ticket()
        assert not lease.is_released
    pool.free(handle)


def test_adopting_takes_no_further_lease(pool: BlockPool) -> None:
    kit.put(pool, "a")
    leases = pool.get(kit.key("a"), leases=64)
    assert leases is not None
    with pytest.raises(TooManyLeasesError):
        pool.get(kit.key("a"))
    tickets = [lease.ticket() for lease in leases]
    for ticket in tickets:
        pool.adopt(ticket).release()


# ---- bytes that are no ticket --------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"SBT1", bytes(56), b"x" * 64])
def test_bytes_that_are_no_ticket_are_refused(pool: BlockPool, data: bytes) -> None:
    for call in (pool.adopt, pool.revoke):
        with pytest.raises(MalformedHandleError, match=r"Lease\.ticket"):
            call(data)


def _replaced(offset: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda ticket: ticket[:offset] + value + ticket[offset + len(value) :]


@pytest.mark.parametrize(
    "forge",
    [
        _replaced(4, struct.pack("<I", 0xFFFFFFFF)),
        _replaced(4, struct.pack("<I", 5)),
        _replaced(8, struct.pack("<I", 1 << 31)),
        _replaced(12, struct.pack("<I", 7)),
        _replaced(16, bytes(8)),
        _replaced(16, b"\1" * 8),
        _replaced(24, struct.pack("<Q", 3)),
        _replaced(32, struct.pack("<Q", 1 << 40)),
    ],
    ids=["slot out of range", "slot", "start", "blocks", "zero", "number", "tokens", "generation"],
)
def test_a_forged_ticket_opens_nothing(pool: BlockPool, forge: Callable[[bytes], bytes]) -> None:
    ticket = lease_of(pool).ticket()
    with pytest.raises((StaleHandleError, MalformedHandleError)):
        pool.adopt(forge(ticket))
    assert pool.stats().leases == 1
    assert pool.check() == []
    pool.adopt(ticket).release()


def test_a_ticket_of_no_number_does_not_open_a_lease_that_does_not_travel(pool: BlockPool) -> None:
    lease = lease_of(pool)
    ticket = lease.ticket()
    adopted = pool.adopt(ticket)  # its ticket word is 0 again
    with pytest.raises(StaleHandleError):
        pool.adopt(ticket[:16] + bytes(8) + ticket[24:])
    adopted.release()


def test_a_ticket_of_another_pool_is_refused(pool: BlockPool, pool_name: str) -> None:
    with BlockPool.create(pool_name + "-2", kit.config(), prefault="off") as other:
        ticket = lease_of(other).ticket()
        for call in (pool.adopt, pool.revoke):
            with pytest.raises(ForeignHandleError):
                call(ticket)
        other.revoke(ticket)
