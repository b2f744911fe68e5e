"""Operations of the content cache, killed and interrupted at every line; what must be true after.

The functions here run in a fresh interpreter, away from pytest and torch.

After each: `check()` is clean, every key that the scene had or the operation published is there or
is not, as the case allows, and when all of it is dropped every block is free.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from shmblocks import BlockPool, KeyExistsError, Lease
from shmblocks._state.cache_state import ClaimAnswer
from shmblocks.testing import (
    Coverage,
    Point,
    abandon,
    assert_clean,
    assert_survives,
    interrupt_at_every_line,
    kill_at_every_line,
    within,
)
from tests.cache import kit
from tests.support.naming import new_pool_name
from tests.support.points import one_per_state

BLOCKS = 12
CONFIG = kit.config(BLOCKS, max_claims=3, max_leases=8, max_participants=6, lock_timeout=2.0)
# Keys of one chain: the first three are entries of every scene, oldest first.
KEYS = kit.same_bucket(4, BLOCKS)
THERE = KEYS[:3]
NEW = KEYS[3]
Call = Callable[[], object]
Keys = list[bytes]


class Scene:
    """A pool with three entries of one bucket, two blocks each; `mine`: of who is disturbed."""

    def __init__(self, pool: BlockPool) -> None:
        self.survivor = pool
        self.mine = pool
        self.kept: list[Lease] = []
        self.ticket = b""
        # Leases that `mine` gave away, and knows the tickets of.
        self.given = 0
        # A claim of the survivor that `mine` may end.
        self.answer: ClaimAnswer | None = None
        for key in THERE:
            kit.put(pool, key, 2)

    def joined(self) -> BlockPool:
        """The pool, with a forked child as a participant of its own."""
        self.mine.available_blocks()
        return self.mine

    def keep(self, leases: list[Lease] | None) -> None:
        """Hold them, until death or the end of the scene."""
        self.kept = leases or []


@contextlib.contextmanager
def three_entries() -> Iterator[Scene]:
    with BlockPool.create(new_pool_name(), CONFIG, prefault="off") as pool:
        yield Scene(pool)


@contextlib.contextmanager
def full() -> Iterator[Scene]:
    """No block is free, and the three entries lie side by side."""
    with three_entries() as scene:
        scene.survivor.publish(kit.reserve(scene.survivor, BLOCKS - 6), readers=1)
        yield scene


@contextlib.contextmanager
def given() -> Iterator[Scene]:
    """The survivor has given a ticket."""
    with three_entries() as scene:
        (lease,) = scene.survivor.get(THERE[1]) or []
        scene.ticket = lease.ticket()
        yield scene


@contextlib.contextmanager
def claimed_by_the_dead() -> Iterator[Scene]:
    with three_entries() as scene:
        other = BlockPool.attach(scene.survivor.name, prefault="off")
        assert other.claim(NEW).state == "mine"
        abandon(other)
        yield scene


class Case(NamedTuple):
    """An operation, its scene, and which keys may be there after a death and an interrupt."""

    operation: Callable[[Scene], Call]
    setup: Callable[[], contextlib.AbstractContextManager[Scene]]
    allowed: list[Keys]
    # Leases of somebody that may be open when the disturbed one is gone: a ticket's.
    leases: list[int]


CASES: dict[str, Case] = {}


def case(
    *allowed: Keys,
    setup: Callable[[], contextlib.AbstractContextManager[Scene]] = three_entries,
    leases: tuple[int, ...] = (0,),
) -> Callable[[Callable[[Scene], Call]], Callable[[Scene], Call]]:
    def register(operation: Callable[[Scene], Call]) -> Callable[[Scene], Call]:
        CASES[operation.__name__] = Case(operation, setup, list(allowed), list(leases))
        return operation

    return register


@case(THERE, [*THERE, NEW])
def publish_a_new_key(scene: Scene) -> Call:
    pool = scene.joined()

    def publish() -> None:
        with pool.reserve(5) as reservation:
            reservation.publish(readers=1 << 48, key=NEW)

    return publish


@case(THERE, [*THERE, NEW])
def publish_a_claimed_key(scene: Scene) -> Call:
    pool = scene.joined()
    pool.claim(NEW)

    def publish() -> None:
        with pool.reserve(5) as reservation:
            reservation.publish(readers=1 << 48, key=NEW, hold=1.0)

    return publish


@case(THERE)
def publish_a_key_that_is_there(scene: Scene) -> Call:
    pool = scene.joined()

    def publish() -> None:
        with contextlib.suppress(KeyExistsError), pool.reserve(5) as reservation:
            reservation.publish(readers=1 << 48, key=THERE[1])

    return publish


@case(THERE)
def get_three_leases(scene: Scene) -> Call:
    pool = scene.joined()
    return lambda: scene.keep(pool.get(THERE[1], leases=3))


@case(THERE)
def get_and_release(scene: Scene) -> Call:
    pool = scene.joined()

    def get() -> None:
        for lease in pool.get(THERE[0]) or []:
            lease.release()

    return get


@case(THERE)
def touch(scene: Scene) -> Call:
    pool = scene.joined()
    return lambda: pool.touch(THERE[0], hold=1.0)


@case(THERE)
def find(scene: Scene) -> Call:
    pool = scene.joined()
    return lambda: (pool.find(THERE[0]), pool.find(NEW))


@case(THERE)
def give_a_ticket(scene: Scene) -> Call:
    pool = scene.joined()
    (lease,) = pool.get(THERE[1]) or []
    scene.keep([lease])
    return lease.ticket


@case(THERE)
def get_two_tickets(scene: Scene) -> Call:
    pool = scene.joined()

    def get() -> None:
        given = pool.get_tickets(THERE[1], leases=2)
        scene.given = 0 if given is None else 2

    return get


@case(THERE, setup=given, leases=(0, 1))
def adopt(scene: Scene) -> Call:
    pool = scene.joined()
    return lambda: scene.keep([pool.adopt(scene.ticket)])


@case(THERE)
def revoke(scene: Scene) -> Call:
    pool = scene.joined()
    (lease,) = pool.get(THERE[1]) or []
    ticket = lease.ticket()
    scene.given = 1
    return lambda: pool.revoke(ticket)


@case(THERE)
def claim(scene: Scene) -> Call:
    pool = scene.joined()
    return lambda: pool.claim(NEW)


@case(THERE, setup=claimed_by_the_dead)
def take_a_claim_over(scene: Scene) -> Call:
    pool = scene.joined()
    return lambda: pool.claim(NEW)


@case(THERE, setup=claimed_by_the_dead)
def reap_a_claim(scene: Scene) -> Call:
    return scene.joined().reap


@case(THERE)
def end_a_claim(scene: Scene) -> Call:
    pool = scene.joined()
    pool.claim(NEW)
    return lambda: pool.end_claim(NEW)


@case(THERE, THERE[1:], THERE[2:], [], setup=full)
def evict_three_entries(scene: Scene) -> Call:
    pool = scene.joined()

    def alloc() -> None:
        with pool.reserve(6 * kit.BLOCK_SIZE):
            pass

    return alloc


@case(THERE, [THERE[0], THERE[2]])
def drop_the_link_between(scene: Scene) -> Call:
    pool = scene.joined()
    return lambda: pool.drop(THERE[1])


@case(THERE, [THERE[1], THERE[2]])
def drop_what_is_leased(scene: Scene) -> Call:
    pool = scene.joined()
    scene.keep(pool.get(THERE[0]))
    return lambda: pool.drop(THERE[0])


@case(THERE)
def end_the_claim_of_another(scene: Scene) -> Call:
    pool = scene.joined()
    scene.answer = answer = scene.survivor.claim(NEW)
    return lambda: (pool.claimant(NEW), pool.end_claim(NEW, answer))


@case(*([key for at, key in enumerate(THERE) if mask >> at & 1] for mask in range(8)))
def drop_all(scene: Scene) -> Call:
    return scene.joined().drop_all


@case(THERE)
def bump_the_epoch(scene: Scene) -> Call:
    return scene.joined().bump_epoch


@case(THERE)
def look_at_all(scene: Scene) -> Call:
    pool = scene.joined()
    return lambda: (pool.entries(), pool.cache_stats())


def _judge(scene: Scene, case: Case) -> None:
    pool = scene.survivor
    assert_survives(pool)
    with within(1.0, "the survivor's next operation"):
        pool.reap()
    assert_clean(pool, "after a reap")
    there = [key for key in KEYS if pool.find(key) is not None]
    assert there in case.allowed, f"{there} is none of {case.allowed}"
    if scene.answer is not None:
        pool.end_claim(NEW, scene.answer)
    stats = pool.cache_stats()
    assert stats.entries == len(there)
    assert stats.claims == 0
    leases = pool.stats().leases
    assert leases in case.leases, f"{leases} leases are open"
    if scene.ticket:
        pool.revoke(scene.ticket)
    assert pool.stats().leases == 0
    for key in there:
        (lease,) = pool.get(key) or []
        lease.release()
    assert pool.claim(kit.key("free")).state == "mine"
    assert pool.end_claim(kit.key("free"))
    pool.drop_all()
    for info in pool.allocations():
        pool.free(pool.handle_at(info.start_block))
    assert pool.available_blocks() == BLOCKS
    assert_clean(pool, "at the end")


def kill(name: str) -> Coverage:
    """Kill a case at every line."""
    case = CASES[name]

    def verify(scene: Scene, point: Point) -> None:
        _judge(scene, case)

    return kill_at_every_line(case.setup, case.operation, verify, one_per_state=one_per_state())


def interrupt(name: str) -> Coverage:
    """Interrupt a case at every line."""
    case = CASES[name]

    def operation(scene: Scene) -> Call:
        scene.mine = BlockPool.attach(scene.survivor.name, prefault="off")
        return case.operation(scene)

    operation.__name__ = name

    def verify(scene: Scene, point: Point) -> None:
        mine = scene.mine
        with within(1.0, "another participant's next operation"):
            scene.survivor.available_blocks()
        with within(1.0, "the next operation of the one who was interrupted"):
            mine.available_blocks()
        assert_clean(mine, "seen by the one who was interrupted")
        if not point.is_end:
            _has_given_back(scene)
        mine.close()
        scene.kept = []
        _judge(scene, case)

    return interrupt_at_every_line(case.setup, operation, verify)


def _has_given_back(scene: Scene) -> None:
    """Interrupted, it holds no blocks and no lease but those that the test still knows."""
    me = scene.mine.participant
    known = scene.given + sum(not lease.is_released for lease in scene.kept)
    for info in scene.mine.allocations():
        assert info.state != "reserved", f"{info} was not given back"
        known -= sum(lease.holder_id == me for lease in info.leases)
    assert known >= 0, f"{-known} leases were not given back"
