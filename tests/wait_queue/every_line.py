"""Blocking allocation, killed and interrupted at every line; what must be true after each.

The functions here run in a fresh interpreter, away from pytest. The head of the
queue is the survivor, which sleeps: so that whoever leaves the queue wakes somebody.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import msgspec

from shmblocks import BlockHandle, BlockPool, PoolTimeoutError
from shmblocks import _alloc_wait as waits_module
from shmblocks._os.wait import seconds_left
from shmblocks._state.pool_state import AllocRequest, stamp
from shmblocks._state.wait_queue import Place
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
from tests.support.inside import run_inside
from tests.support.naming import new_pool_name
from tests.wait_queue.kit import reserve, waiting

TOTAL = 4
HELD = 3
MAX_WAITERS = 3
# Seconds that the waits of these runs sleep for before they are over, by a clock of their own: the
# real one would let them poll more or less often, and pass other lines each time.
NAP = 0.0005
# Seconds: one, and two more for a machine that does twenty other things. What would hold up a
# survivor is the lock's timeout (20 s), or an entry of the queue that nobody takes out.
AT_ONCE = 3.0

Call = Callable[[], object]


class Scene:
    """A pool of which the survivor holds three blocks of four, and waits for more of them."""

    def __init__(self, survivor: BlockPool) -> None:
        self.survivor = survivor
        self.mine: BlockPool | None = None
        self._places: list[Place] = []
        self.held = reserve(survivor, HELD)
        self.published: BlockHandle | None = None
        self.waiters = 0

    def sleep(self) -> None:
        """The survivor joins the queue; it polls just now."""
        me = self.survivor.participant
        assert me is not None
        join, now = self.survivor.state.queue.join, time.monotonic_ns()
        self._places.append(run_inside(self.survivor, join, me.word, HELD, b"survivor", now))
        self.waiters = 1

    def wake_up(self) -> None:
        for place in self._places:
            run_inside(self.survivor, self.survivor.state.queue.leave, place)


@contextlib.contextmanager
def nobody_sleeps() -> Iterator[Scene]:
    config = msgspec.structs.replace(pools.tiny(TOTAL, max_participants=4), max_waiters=MAX_WAITERS)
    with pools.create(new_pool_name(), config, role="survivor") as pool:
        scene = Scene(pool)
        yield scene
        _set_clock(seconds_left)
        if scene.mine is not None:
            scene.mine.close()


@contextlib.contextmanager
def survivor_sleeps() -> Iterator[Scene]:
    with nobody_sleeps() as scene:
        scene.sleep()
        yield scene


@contextlib.contextmanager
def survivor_sleeps_beside_a_full_pool() -> Iterator[Scene]:
    with nobody_sleeps() as scene:
        scene.published = scene.survivor.publish(reserve(scene.survivor, 1))
        scene.sleep()
        yield scene


@contextlib.contextmanager
def the_dead_fill_the_queue() -> Iterator[Scene]:
    with nobody_sleeps() as scene:
        dead = pools.attach(scene.survivor.name, role="dead")
        for _ in range(MAX_WAITERS):
            assert dead.state.poll_queue(AllocRequest(TOTAL, 1, b"", stamp())).handle is None
        pools.abandon(dead)
        yield scene


def mine(scene: Scene) -> BlockPool:
    """A pool object of its own for the one that is killed or interrupted."""
    scene.mine = pools.attach(scene.survivor.name, role="victim")
    return scene.mine


def _set_clock(clock: Callable[[float | None], float]) -> None:
    vars(waits_module)["seconds_left"] = clock


def _no_blocks(_: object) -> None:
    """A first attempt that finds no blocks, so that there is a wait."""


# ---- operations ------------------------------------------------------------------------------


def wait_in_vain(scene: Scene) -> Call:
    """Joins the queue, polls, sleeps, is told that it is late, leaves and wakes the head."""
    pool = mine(scene)
    clock = iter((NAP, -1.0))

    def run() -> None:
        with contextlib.suppress(PoolTimeoutError):
            pool.alloc(1, timeout=10.0)

    _set_clock(lambda _: next(clock))
    return run


def wait_and_be_served(scene: Scene) -> Call:
    """Joins the queue and finds blocks there, as if they had come in between."""
    pool = mine(scene)
    vars(pool.state)["reserve"] = _no_blocks
    return lambda: pool.alloc(1, timeout=10.0)


def reserve_when_served(scene: Scene) -> Call:
    """The same with an owner, which is dropped: it gives the blocks back."""
    pool = mine(scene)
    vars(pool.state)["reserve"] = _no_blocks
    return lambda: pool.reserve(1, timeout=10.0)


def reserve_in_vain(scene: Scene) -> Call:
    pool = mine(scene)
    clock = iter((NAP, -1.0))

    def run() -> None:
        with contextlib.suppress(PoolTimeoutError):
            pool.reserve(1, timeout=10.0)

    _set_clock(lambda _: next(clock))
    return run


def poll_where_the_dead_fill_the_queue(scene: Scene) -> Call:
    """Reaps, and joins in their place."""
    pool = mine(scene)
    vars(pool.state)["reserve"] = _no_blocks
    return lambda: pool.alloc(1, timeout=10.0)


def free_what_others_wait_for(scene: Scene) -> Call:
    """Wakes the survivor."""
    pool, handle = mine(scene), scene.published
    assert handle is not None
    return lambda: pool.free(handle)


SCENES = {
    wait_in_vain: survivor_sleeps,
    wait_and_be_served: nobody_sleeps,
    reserve_in_vain: survivor_sleeps,
    reserve_when_served: nobody_sleeps,
    poll_where_the_dead_fill_the_queue: the_dead_fill_the_queue,
    free_what_others_wait_for: survivor_sleeps_beside_a_full_pool,
}
OPERATIONS = {operation.__name__: operation for operation in SCENES}


# ---- what must be true -----------------------------------------------------------------------


def kill(name: str) -> Coverage:
    # At every line: a recording that stopped at each of them would nap, and poll, more often.
    return kill_at_every_line(SCENES[OPERATIONS[name]], OPERATIONS[name], _judge_death)


def _judge_death(scene: Scene, _: Point) -> None:
    pool = scene.survivor
    scene.wake_up()
    assert_survives(pool)
    assert waiting(pool) == 0, "the dead are in the queue"
    with within(AT_ONCE, "the survivor's next wait"):
        _free_all(pool)
        handle = pool.alloc(TOTAL * BLOCK_SIZE, timeout=10.0)
    assert handle is not None
    pool.free(handle)


def _free_all(pool: BlockPool) -> None:
    for info in pool.allocations():
        pool.free(pool.handle_at(info.start_block))


def interrupt(name: str) -> Coverage:
    return interrupt_at_every_line(SCENES[OPERATIONS[name]], OPERATIONS[name], _judge_interrupt)


def _judge_interrupt(scene: Scene, point: Point) -> None:
    """It is out of the queue, and holds nothing."""
    _set_clock(seconds_left)
    pool, victim = scene.survivor, scene.mine
    assert victim is not None
    assert_clean(pool, "after the interrupt")
    pool.reap_if_due()
    found = waiting(pool)
    assert found == scene.waiters, f"{found} are in the queue, {scene.waiters} should be"
    kept = [info for info in pool.allocations() if info.owner_id != pool.participant]
    assert point.is_end or not kept, f"it keeps {kept}"
    scene.wake_up()
    with within(AT_ONCE, "the next wait of the one that was interrupted"):
        _free_all(pool)
        vars(victim.state).pop("reserve", None)
        handle = victim.alloc(TOTAL * BLOCK_SIZE, timeout=10.0)
    assert handle is not None
    victim.free(handle)
    assert_accounted_for(pool)
    assert waiting(pool) == 0
