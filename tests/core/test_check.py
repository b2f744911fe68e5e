"""`check()` names every violation that is planted, by the number of its invariant."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from shmblocks import BlockPool, PoolInspector, Violation
from shmblocks._state.layout import (
    H_CURSOR,
    H_FREE_BLOCKS,
    H_LIVE,
    H_NEXT_GENERATION,
    H_PENDING,
    H_UNCLAIMED,
    H_WAITERS,
    LEASE_WORDS,
    RECORD_WORDS,
    Record,
)
from tests.core import pools

Plant = Callable[[BlockPool], None]


@pytest.fixture
def populated(pool_name: str) -> Iterator[BlockPool]:
    """Reserved at 0 (2 blocks), published at 2 (2), leased at 4 (2), draining at 6 (2)."""
    with pools.create(pool_name) as pool:
        pools.take(pool, 8)
        pool.publish(pools.take(pool, 8), readers=2)
        leased = pool.publish(pools.take(pool, 8), readers=2)
        draining = pools.take(pool, 8)
        leases = [pool.open(leased), pool.open_for_write(draining)]
        pool.free(draining)
        assert pool.check() == []
        before = bytes(pool.state.segment.memory)
        yield pool
        pool.state.segment.memory[:] = before  # what was planted goes
        assert pool.check() == []
        for lease in leases:
            lease.release()


def record_word(block: int, field: str) -> Callable[[BlockPool], int]:
    return lambda pool: pool.state.layout.record_word(block) + Record._fields.index(field)


def lease_word(slot: int, word: int) -> Callable[[BlockPool], int]:
    return lambda pool: pool.state.layout.leases // 8 + slot * LEASE_WORDS + word


def header_word(index: int) -> Callable[[BlockPool], int]:
    return lambda pool: index


def bitmap(pool: BlockPool) -> int:
    return pool.state.layout.bitmap // 8


def plant(where: Callable[[BlockPool], int], value: int) -> Plant:
    return lambda pool: pools.set_word(pool, where(pool), value)


def flip(where: Callable[[BlockPool], int], bit: int) -> Plant:
    def planted(pool: BlockPool) -> None:
        pools.set_word(pool, where(pool), pools.word(pool, where(pool)) ^ 1 << bit)

    return planted


def list_the_copy(pool: BlockPool) -> None:
    """The allocation of block 0 once more, at block 1, and in the list."""
    copy_record(pool)
    pools.set_word(pool, pool.state.layout.live_word(4), 1)
    pools.set_word(pool, H_LIVE, 5)


def list_twice(pool: BlockPool) -> None:
    """The allocation of block 0 in the place of that of block 2."""
    pools.set_word(pool, pool.state.layout.live_word(1), 0)


def copy_record(pool: BlockPool) -> None:
    """The allocation of block 0 once more, at block 1."""
    first = pool.state.layout.record_word(0)
    words = pool.state.segment.words
    words[first + RECORD_WORDS : first + 2 * RECORD_WORDS] = words[first : first + RECORD_WORDS]


PLANTED: dict[str, tuple[int, Plant, str]] = {
    "a block that is used and marked free": (1, flip(bitmap, 3), "the first is 3.*says free"),
    "a block that is free and marked used": (1, flip(bitmap, 15), "the first is 15.*says used"),
    "a block in two allocations": (1, list_the_copy, "block 1 is in two allocations"),
    "an allocation that is not in the list": (1, copy_record, "names 4: they differ at block 1"),
    "an allocation that is listed twice": (1, list_twice, "names 4: they differ at block 2"),
    "a wrong count of free blocks": (1, plant(header_word(H_FREE_BLOCKS), 9), "8 blocks are free"),
    "an allocation past the end": (2, plant(record_word(6, "num_blocks"), 11), "block 6"),
    "an allocation of no blocks": (2, plant(record_word(6, "num_blocks"), 0), "block 6"),
    "an allocation of an unknown state": (2, plant(record_word(6, "state"), 6), "block 6"),
    "more tokens than blocks hold": (2, plant(record_word(0, "num_tokens"), 9), "block 0"),
    "no tokens": (2, plant(record_word(0, "num_tokens"), 0), "claims 0 tokens"),
    "a cursor outside of the pool": (2, plant(header_word(H_CURSOR), 16), "cursor"),
    "a reservation of nobody": (3, plant(record_word(0, "owner"), 0), "belongs to nobody"),
    "a reservation of another time": (
        3, plant(record_word(0, "owner"), 7 << 16), "block 0 belongs to nobody.*incarnation=7",
    ),
    "published without a deadline": (
        3, plant(header_word(H_UNCLAIMED), 0), "block 2 has neither readers to come nor a deadline",
    ),
    "leased without a lease": (
        3, plant(record_word(4, "leases"), 0), "leased allocation at block 4 has no lease",
    ),
    "a lease that nobody counts": (
        3, plant(record_word(0, "state"), 4), "draining allocation at block 0 has no lease",
    ),
    "settling for no stream": (
        3, plant(record_word(0, "state"), 5), "0 leases and 1 allocations wait for a stream",
    ),
    "a stream that nothing waits for": (3, plant(header_word(H_PENDING), 1), "say 1 and 0"),
    "a waiter that is not there": (5, plant(header_word(H_WAITERS), 1), "0 wait, the count says 1"),
    "more leases counted than open": (
        3, plant(record_word(4, "leases"), 2), "counts 2 leases, 1 are open",
    ),
    "a lease of another generation": (3, plant(lease_word(0, 0), 77), "generation 77"),
    "a lease of a free block": (3, plant(lease_word(0, 1), 12), "lease 0 is of generation"),
    "a lease outside of the pool": (3, plant(lease_word(0, 1), 2**60), "lease 0"),
    "a lease of nobody": (3, plant(lease_word(0, 2), 9 << 16), "lease 0 belongs to nobody"),
    "a lost lease": (3, plant(lease_word(0, 0), 0), "counts 1 leases, 0 are open"),
    "one generation twice": (4, plant(record_word(2, "generation"), 1), "block 2.*not its own"),
    "a generation of the future": (
        4, plant(record_word(0, "generation"), 99), "block 0: its generation is not its own",
    ),
    "no generation": (4, plant(record_word(0, "generation"), 0), "block 0.*not its own"),
    "generations that begin again": (4, plant(header_word(H_NEXT_GENERATION), 2), "not its own"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_violation_is_named_with_its_invariant(populated: BlockPool, name: str) -> None:
    import re

    number, planted, said = PLANTED[name]
    planted(populated)
    found = populated.check()
    assert any(each.invariant == number and re.search(said, each.message) for each in found), (
        f"expected invariant {number}: {said}; got {found}"
    )
    with PoolInspector(populated.name) as inspector:
        assert inspector.check() == found


def test_several_violations_are_all_named(populated: BlockPool) -> None:
    for name in (
        "a block that is free and marked used",
        "a reservation of nobody",
        "no generation",
    ):
        PLANTED[name][1](populated)
    assert {each.invariant for each in populated.check()} == {1, 3, 4}


def test_checking_changes_nothing(populated: BlockPool) -> None:
    for _, planted, _ in PLANTED.values():
        planted(populated)
        before = pools.state_of(populated)
        populated.check()
        assert pools.state_of(populated) == before


def test_a_violation_is_a_number_and_a_sentence() -> None:
    assert Violation(1, "so").invariant == 1
