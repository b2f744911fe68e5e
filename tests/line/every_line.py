"""Blocking allocation, killed and interrupted at every line; what must be true after each.

The functions here run in a fresh interpreter, away from pytest. One place of the line belongs to
the survivor, which sleeps: so that whoever leaves the line rings for somebody.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from shmblocks import BlockPool, PoolTimeoutError
from shmblocks.line import Ticket
from shmblocks.testing import (
    Coverage,
    Point,
    assert_accounted_for,
    assert_clean,
    assert_survives,
    interrupt_at_every_line,
    kill_at_every_line,
    within,
)
from tests.core import pools
from tests.core.pools import BLOCK_SIZE
from tests.line.kit import reserve, waiting
from tests.support.naming import new_pool_name

TOTAL = 4
HELD = 3
# Seconds. Longer: each of some hundred runs takes that much longer.
IN_VAIN = 0.002

Call = Callable[[], object]


class Scene:
    """A pool of which the survivor holds three blocks of four, and waits for more of them."""

    def __init__(self, survivor: BlockPool, sleeps: bool) -> None:
        self.survivor = survivor
        self.mine: BlockPool | None = None
        self._tickets: list[Ticket] = []
        self.held = reserve(survivor, HELD)
        self.waiters = 0
        if sleeps:
            self.sleep()

    def sleep(self) -> None:
        """The survivor joins the line; it looks just now."""
        me = self.survivor.participant
        assert me is not None
        line, now = self.survivor._ledger.line, time.monotonic_ns()
        self.survivor._ledger.run(line.join, me.word, HELD, b"survivor", now, self._tickets)
        self.waiters = 1

    def wake_up(self) -> None:
        for ticket in self._tickets:
            self.survivor._ledger.run(self.survivor._ledger.line.leave, ticket)


def _scene(sleeps: bool) -> Iterator[Scene]:
    config = pools.tiny(TOTAL, max_participants=4, lock_timeout=2.0)
    with pools.create(new_pool_name(), config, role="survivor") as pool:
        scene = Scene(pool, sleeps)
        yield scene
        if scene.mine is not None:
            scene.mine.close()


@contextlib.contextmanager
def survivor_sleeps() -> Iterator[Scene]:
    yield from _scene(sleeps=True)


@contextlib.contextmanager
def nobody_sleeps() -> Iterator[Scene]:
    yield from _scene(sleeps=False)


def mine(scene: Scene) -> BlockPool:
    """A pool object of its own for the one that is killed or interrupted."""
    scene.mine = pools.attach(scene.survivor.name, role="victim")
    return scene.mine


# ---- operations ------------------------------------------------------------------------------


def wait_in_vain(scene: Scene) -> Call:
    """Joins the line, looks, sleeps to the deadline, says who is in the way, leaves and rings."""
    pool = mine(scene)

    def run() -> None:
        with contextlib.suppress(PoolTimeoutError):
            pool.alloc(1, timeout=IN_VAIN)

    return run


def wait_and_be_served(scene: Scene) -> Call:
    """Joins the line and finds room there, as if it had come in between."""
    pool = mine(scene)
    pool._reservations.try_reserve = lambda _: None  # type: ignore[method-assign]
    return lambda: pool.alloc(1, timeout=10.0)


def free_what_others_wait_for(scene: Scene) -> Call:
    """Rings for the survivor."""
    pool = mine(scene)
    handle = pool.publish(reserve(pool, 1))
    return lambda: pool.free(handle)


SCENES = {
    wait_in_vain: survivor_sleeps,
    wait_and_be_served: nobody_sleeps,
    free_what_others_wait_for: survivor_sleeps,
}
OPERATIONS = {operation.__name__: operation for operation in SCENES}


def _operation(name: str) -> Callable[[Scene], Call]:
    chosen = OPERATIONS[name]

    def operation(scene: Scene) -> Call:
        call = chosen(scene)
        if name == "free_what_others_wait_for":
            scene.wake_up()
            scene.sleep()
        return call

    operation.__name__ = name
    return operation


# ---- what must be true -----------------------------------------------------------------------


def kill(name: str) -> Coverage:
    return kill_at_every_line(SCENES[OPERATIONS[name]], _operation(name), _judge_death)


def _judge_death(scene: Scene, _: Point) -> None:
    pool = scene.survivor
    scene.wake_up()
    assert_survives(pool)
    assert waiting(pool) == 0, "the dead are in the line"
    with within(1.0, "the survivor's next wait"):
        pool.free(scene.held)
        handle = pool.alloc(TOTAL * BLOCK_SIZE, timeout=10.0)
    assert handle is not None
    pool.free(handle)


def interrupt(name: str) -> Coverage:
    return interrupt_at_every_line(SCENES[OPERATIONS[name]], _operation(name), _judge_interrupt)


def _judge_interrupt(scene: Scene, point: Point) -> None:
    """It is out of the line, and holds nothing."""
    pool, victim = scene.survivor, scene.mine
    assert victim is not None
    assert_clean(pool, "after the interrupt")
    line = waiting(pool)
    assert line == scene.waiters, f"{line} are in the line, {scene.waiters} should be"
    mine_now = [info for info in pool.allocations() if info.owner_place != 0]
    if not point.is_end and not any(info.state == "published" for info in mine_now):
        assert not mine_now, f"it keeps {mine_now}"
    scene.wake_up()
    with within(1.0, "the next wait of the one that was interrupted"):
        for info in mine_now:
            victim.free(victim.handle_at(info.start_block))
        pool.free(scene.held)
        victim._reservations.__dict__.pop("try_reserve", None)
        handle = victim.alloc(TOTAL * BLOCK_SIZE, timeout=10.0)
    assert handle is not None
    victim.free(handle)
    assert_accounted_for(pool)
    assert waiting(pool) == 0
