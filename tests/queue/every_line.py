"""Operations of a queue, killed and interrupted at every line; what must be true after each.

The functions here run in a fresh interpreter, away from pytest. Queues that spin would pass a
different number of lines each time: these never do.

What is not here: asyncio. Its lock is left by `with`, at whose end the harness raises what no
signal could; real signals do it in test_asyncio.py.
"""

from __future__ import annotations

import contextlib
import gc
import os
import queue as standard
from collections.abc import Callable, Iterator
from typing import NamedTuple

from shmblocks import HandleQueue
from shmblocks._os import wait as wait_module
from shmblocks._os.wait import seconds_left
from shmblocks._state.layout import Q_GETTERS_ASLEEP, Q_PUTTERS_ASLEEP, QueueLayout
from shmblocks.testing import (
    Coverage,
    Point,
    assert_nothing_left,
    interrupt_at_every_line,
    kill_at_every_line,
    within,
)
from tests.crash.scenes import forget_what_was_left
from tests.queue.kit import abandon, asleep, drain, require_right
from tests.support.naming import new_pool_name
from tests.support.points import one_per_state

CAPACITY = 4
THERE = [b"0", b"1"]
# Seconds that the waits of these runs sleep for before they are over, by a clock of their own: the
# real one would let them poll more or less often, and pass other lines each time.
NAP = 0.0005
# Seconds: one, and two more for a machine that does twenty other things. What would hold up a
# survivor is the lock's timeout (30 s).
AT_ONCE = 3.0

Call = Callable[[], object]


class Scene:
    """A queue with two messages and a survivor; `mine` is the one that is killed or interrupted."""

    def __init__(self, name: str, survivor: HandleQueue[bytes] | None) -> None:
        self.name = name
        self._survivor = survivor
        self.mine: HandleQueue[bytes] | None = None
        self.descriptors: set[str] = set()

    @property
    def survivor(self) -> HandleQueue[bytes]:
        assert self._survivor is not None
        return self._survivor

    @property
    def has_survivor(self) -> bool:
        return self._survivor is not None

    def close_mine(self) -> None:
        if self.mine is not None:
            self.mine.close()


@contextlib.contextmanager
def two_messages() -> Iterator[Scene]:
    forget_what_was_left()
    name = new_pool_name()
    with HandleQueue.create(name, CAPACITY, message_bytes=8, spin=0) as queue:
        for message in THERE:
            queue.put(message)
        scene = Scene(name, queue)
        yield scene
        _set_clock(seconds_left)
        scene.close_mine()
    assert_nothing_left(name)


@contextlib.contextmanager
def no_message() -> Iterator[Scene]:
    with two_messages() as scene:
        drain(scene.survivor)
        yield scene


@contextlib.contextmanager
def no_room() -> Iterator[Scene]:
    with two_messages() as scene:
        scene.survivor.put(b"2")
        scene.survivor.put(b"3")
        yield scene


@contextlib.contextmanager
def nobody() -> Iterator[Scene]:
    scene = Scene(new_pool_name(), None)
    yield scene
    scene.close_mine()
    HandleQueue.create(scene.name).close()  # in place of what the dead left


@contextlib.contextmanager
def leftover() -> Iterator[Scene]:
    with nobody() as scene:
        queue = HandleQueue.create(scene.name, CAPACITY, spin=0)
        queue.put(b"old")
        abandon(queue)
        yield scene


Setup = Callable[[], contextlib.AbstractContextManager[Scene]]


class Case(NamedTuple):
    """An operation, its scene, and what may be in the queue before and after it."""

    operation: Callable[[Scene], Call]
    setup: Setup
    outcomes: list[list[bytes]]
    killable: bool
    interruptible: bool

    @property
    def name(self) -> str:
        return self.operation.__name__


CASES: dict[str, Case] = {}


def case(
    setup: Setup,
    *outcomes: list[bytes],
    killable: bool = True,
    interruptible: bool = True,
) -> Callable[[Callable[[Scene], Call]], Callable[[Scene], Call]]:
    def register(operation: Callable[[Scene], Call]) -> Callable[[Scene], Call]:
        made = Case(operation, setup, list(outcomes), killable, interruptible)
        CASES[made.name] = made
        return operation

    return register


def mine(scene: Scene) -> HandleQueue[bytes]:
    """A queue of its own for the one that is killed or interrupted."""
    scene.mine = HandleQueue.attach(scene.name, spin=0)
    return scene.mine


def _set_clock(clock: Callable[[float | None], float]) -> None:
    vars(wait_module)["seconds_left"] = clock


def short_of_time() -> float:
    """The timeout for a wait of one nap, by the clock above."""
    clock = iter((NAP, NAP, -1.0))
    _set_clock(lambda _: next(clock))
    return 10.0


def some_sleep(scene: Scene) -> None:
    """So that it is a wake-up's turn too."""
    words = scene.survivor.state.segment.words
    words[Q_GETTERS_ASLEEP] = words[Q_PUTTERS_ASLEEP] = 1


# ---- operations ------------------------------------------------------------------------------


@case(two_messages, THERE, [*THERE, b"new"])
def put(scene: Scene) -> Call:
    queue = mine(scene)
    some_sleep(scene)
    return lambda: queue.put(b"new")


@case(two_messages, THERE, [b"1"])
def get(scene: Scene) -> Call:
    queue = mine(scene)
    some_sleep(scene)
    return queue.get


@case(two_messages, THERE, [])
def get_many(scene: Scene) -> Call:
    queue = mine(scene)
    some_sleep(scene)
    return lambda: queue.get_many(2)


@case(two_messages, THERE)
def participants(scene: Scene) -> Call:
    return mine(scene).participants


@case(no_message, [])
def get_in_vain(scene: Scene) -> Call:
    queue = mine(scene)
    timeout = short_of_time()

    def run() -> None:
        with contextlib.suppress(standard.Empty):
            queue.get(timeout=timeout)

    return run


@case(no_room, [*THERE, b"2", b"3"])
def put_in_vain(scene: Scene) -> Call:
    queue = mine(scene)
    timeout = short_of_time()

    def run() -> None:
        with contextlib.suppress(standard.Full):
            queue.put(b"new", timeout=timeout)

    return run


@case(two_messages, THERE)
def attach(scene: Scene) -> Call:
    return lambda: mine(scene)


@case(two_messages, THERE)
def close(scene: Scene) -> Call:
    return mine(scene).close


@contextlib.contextmanager
def all_slots_of_the_dead() -> Iterator[Scene]:
    """Three processes can take part: the survivor, and two that are dead."""
    slots = QueueLayout.PARTICIPANTS
    QueueLayout.PARTICIPANTS = 3
    try:
        with two_messages() as scene:
            for queue in [HandleQueue.attach(scene.name, spin=0) for _ in range(2)]:
                abandon(queue)
            yield scene
    finally:
        QueueLayout.PARTICIPANTS = slots


@case(all_slots_of_the_dead, THERE)
def attach_in_place_of_the_dead(scene: Scene) -> Call:
    return lambda: mine(scene)


@case(two_messages, THERE, [*THERE, b"new"], interruptible=False)
def put_first_after_fork(scene: Scene) -> Call:
    return lambda: scene.survivor.put(b"new")


@case(two_messages, THERE, [b"1"], interruptible=False)
def get_first_after_fork(scene: Scene) -> Call:
    return scene.survivor.get


@case(two_messages, THERE, [], interruptible=False)
def get_many_first_after_fork(scene: Scene) -> Call:
    return lambda: scene.survivor.get_many(2)


@case(two_messages, THERE, interruptible=False)
def close_first_after_fork(scene: Scene) -> Call:
    return scene.survivor.close


@case(nobody)
def create(scene: Scene) -> Call:
    def run() -> None:
        scene.mine = HandleQueue.create(scene.name, CAPACITY, spin=0)

    return run


@case(leftover, interruptible=False)
def create_in_place_of_a_leftover(scene: Scene) -> Call:
    return create(scene)


@case(nobody)
def close_as_the_last_one(scene: Scene) -> Call:
    scene.mine = HandleQueue.create(scene.name, CAPACITY, spin=0)
    scene.mine.put(b"x")
    return scene.mine.close


# ---- what must be true -----------------------------------------------------------------------


def kill(name: str) -> Coverage:
    it = CASES[name]

    def verify(scene: Scene, point: Point) -> None:
        if scene.has_survivor:
            _judge(it, scene, point)
        else:
            _judge_name(scene)

    return kill_at_every_line(it.setup, it.operation, verify, one_per_state=one_per_state())


def _judge(it: Case, scene: Scene, point: Point) -> None:
    """The survivor goes on at once, and finds what was before or what comes after."""
    with within(AT_ONCE, "the survivor's next operations"):
        found = drain(scene.survivor)
        allowed = it.outcomes[-1:] if point.is_end and len(it.outcomes) == 2 else it.outcomes
        assert found in allowed, f"{found} is none of {allowed}"
        for number in range(2 * CAPACITY):
            scene.survivor.put(b"%d" % number, timeout=0)
            assert scene.survivor.get(timeout=0) == b"%d" % number
        with HandleQueue.attach(scene.name, spin=0) as newcomer:
            newcomer.put(b"x")
            assert scene.survivor.get() == b"x"
    require_right(scene.survivor)
    assert sum(asleep(scene.survivor)) <= 2
    _judge_participants(scene, point)


def _judge_participants(scene: Scene, point: Point) -> None:
    """Nobody is there twice, and nobody who was interrupted in joining is there at all."""
    living = [info for info in scene.survivor.participants() if info.is_alive]
    assert living[0].is_self
    joined = scene.mine is not None and not scene.mine.is_closed
    assert len(living) == 1 + joined, (point, living)


def _judge_name(scene: Scene) -> None:
    """Nobody lives: the name can be used at once, and nothing stays."""
    with within(AT_ONCE, "creating anew"):
        queue = HandleQueue.create(scene.name, CAPACITY, spin=0)
    with queue:
        queue.put(b"x")
        assert queue.get() == b"x"
    assert_nothing_left(scene.name)


def interrupt(name: str, exception: type[BaseException]) -> Coverage:
    it = CASES[name]

    def operation(scene: Scene) -> Call:
        call = it.operation(scene)
        scene.descriptors = _descriptors()
        return call

    operation.__name__ = name

    def verify(scene: Scene, point: Point) -> None:
        if not point.is_end:
            gc.collect()
            left = _descriptors() - scene.descriptors
            assert not left, f"left open: {left}"
        if scene.has_survivor:
            _judge(it, scene, point)
            _judge_mine(scene)
        else:
            scene.close_mine()
            _judge_name(scene)

    return interrupt_at_every_line(it.setup, operation, verify, exception=exception)


def _judge_mine(scene: Scene) -> None:
    """The one that was interrupted goes on too."""
    _set_clock(seconds_left)
    queue = scene.mine
    if queue is None:
        return
    with within(AT_ONCE, "the next operations of the one that was interrupted"):
        if not queue.is_closed:
            queue.put(b"again")
            assert scene.survivor.get() == b"again"
            scene.survivor.put(b"and back")
            assert queue.get() == b"and back"
        queue.close()


def _descriptors() -> set[str]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add(f"{number} -> {os.readlink(f'/proc/self/fd/{number}')}")
    return found
