"""Putters and getters of a `HandleQueue` die, or are interrupted, at every line.

What must be true: at most the messages that the one who died had in hand are lost, nothing comes
twice or out of order, and the others go on at once.
"""

from __future__ import annotations

import contextlib
import os
import queue as standard
from collections.abc import Callable, Iterator
from typing import NamedTuple

from shmblocks import HandleQueue
from shmblocks.testing import (
    Coverage,
    Point,
    interrupt_at_every_line,
    kill_at_every_line,
    within,
)
from tests.support.naming import new_pool_name

# Never spinning: the number of looks while spinning would differ from run to run.
SPIN = 0.0
THERE = [b"first", b"second", b"third"]
NEW = b"new"


class Scene(NamedTuple):
    """A queue, and another participant in it. No queue: only a name."""

    name: str
    queue: HandleQueue[bytes] | None
    witness: HandleQueue[bytes] | None


class Case(NamedTuple):
    """`allowed`: what may be in the queue afterwards, in order."""

    operation: Callable[[Scene], Callable[[], object]]
    allowed: list[list[bytes]]


@contextlib.contextmanager
def filled() -> Iterator[Scene]:
    name = new_pool_name()
    with (
        HandleQueue.create(name, 4, message_bytes=16, spin=SPIN) as queue,
        HandleQueue.attach(name, spin=SPIN) as witness,
    ):
        for message in THERE:
            queue.put(message)
        yield Scene(queue.name, queue, witness)
    assert not os.path.exists(f"/dev/shm/{name}")


@contextlib.contextmanager
def nothing() -> Iterator[Scene]:
    name = "/" + new_pool_name()
    yield Scene(name, None, None)
    if os.path.exists(f"/dev/shm{name}"):
        # A leftover goes when its name is taken anew, and then left in good order.
        HandleQueue.create(name, 4, message_bytes=16, spin=SPIN).close()


def queue_of(scene: Scene) -> HandleQueue[bytes]:
    """The inherited queue, taken part in."""
    assert scene.queue is not None
    with contextlib.suppress(standard.Full):
        for _ in THERE:
            scene.queue.put(scene.queue.get_nowait())
    return scene.queue


def put(scene: Scene) -> Callable[[], object]:
    queue = queue_of(scene)
    return lambda: queue.put(NEW)


def put_in_vain(scene: Scene) -> Callable[[], object]:
    queue = queue_of(scene)

    def fill() -> None:
        with contextlib.suppress(standard.Full):
            while True:
                queue.put(NEW, timeout=1e-9)

    return fill


def get(scene: Scene) -> Callable[[], object]:
    return queue_of(scene).get


def get_many(scene: Scene) -> Callable[[], object]:
    queue = queue_of(scene)
    return lambda: queue.get_many(2)


def get_in_vain(scene: Scene) -> Callable[[], object]:
    queue = queue_of(scene)

    def drain() -> None:
        with contextlib.suppress(standard.Empty):
            while True:
                queue.get(timeout=1e-9)

    return drain


def attach(scene: Scene) -> Callable[[], object]:
    return lambda: HandleQueue.attach(scene.name, spin=SPIN)


def close(scene: Scene) -> Callable[[], object]:
    return queue_of(scene).close


CASES = {
    case.operation.__name__: case
    for case in (
        Case(put, [THERE, [*THERE, NEW]]),
        Case(put_in_vain, [THERE, [*THERE, NEW]]),
        Case(get, [THERE, THERE[1:]]),
        Case(get_many, [THERE, THERE[2:]]),
        Case(get_in_vain, [THERE, THERE[1:], THERE[2:], []]),
        Case(attach, [THERE]),
        Case(close, [THERE]),
    )
}


def kill(name: str) -> Coverage:
    case = CASES[name]
    return kill_at_every_line(filled, case.operation, lambda scene, _: _judge(scene, case))


def interrupt(name: str) -> Coverage:
    case = CASES[name]
    return interrupt_at_every_line(filled, case.operation, lambda scene, _: _judge(scene, case))


def _judge(scene: Scene, case: Case) -> None:
    """Another participant takes everything, and can put and get as before."""
    witness = scene.witness
    assert witness is not None
    with within(1.0, "the other participant's next operations"):
        left = []
        while not witness.empty():
            left.append(witness.get(timeout=0.5))
        assert left in case.allowed, f"{left} is none of {case.allowed}"
        for _ in range(witness.capacity):
            witness.put(b"after", timeout=0.5)
        assert witness.full()
        assert witness.get_many(witness.capacity) == [b"after"] * witness.capacity


def create(scene: Scene) -> Callable[[], object]:
    return lambda: HandleQueue.create(scene.name, 4, message_bytes=16, spin=SPIN)


def kill_create() -> Coverage:
    return kill_at_every_line(nothing, create, _judge_name)


def interrupt_create() -> Coverage:
    return interrupt_at_every_line(nothing, create, _judge_name)


def _judge_name(scene: Scene, point: Point) -> None:
    if point.is_end and os.path.exists(f"/dev/shm{scene.name}"):
        return  # of an interrupt that came too late: the queue is there, and lives
    with within(1.0, "creating anew"):
        queue = HandleQueue.create(scene.name, 4, message_bytes=16, spin=SPIN)
    with queue:
        queue.put(NEW)
        assert queue.get() == NEW
    assert not os.path.exists(f"/dev/shm{scene.name}")
