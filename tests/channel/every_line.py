"""Operations of a channel, killed and interrupted at every line; what must be true after each.

The functions here run in a fresh interpreter, away from pytest. Channels that spin would pass a
different number of lines each time: these never do.

After each death the survivor reaps, and receives what is in the channels. Nothing may be published
that no message announces, and no message may announce what is not there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from shmblocks import BlockHandle, BlockPool, Lease, PoolConfig, State
from shmblocks.channel import Channel
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
from tests.support.naming import new_pool_name
from tests.support.points import one_per_state

CONFIG = PoolConfig(
    total_tokens=64,
    block_size=4,
    default_num_blocks=2,
    max_participants=6,
    max_leases=8,
    max_waiters=8,
    channels=3,
    channel_slots=80,
    max_claims=4,
    lock_timeout=2.0,
)
THERE = [b"first", b"second"]
Call = Callable[[], object]


class Scene:
    """A pool whose channel has two messages; `mine` is used by the one that is disturbed."""

    def __init__(self, pool: BlockPool, redeliver: bool) -> None:
        self.survivor = pool
        self.mine = pool
        self.redeliver = redeliver
        self.kept: list[Lease] = []
        self.channel = self.open(pool)
        for message in THERE:
            self.channel.send(reserve(pool), message=message)

    def open(self, pool: BlockPool, name: str = "one") -> Channel:
        return pool.channel(name, capacity=4, redeliver=self.redeliver, spin=0)

    def keep(self, leases: list[Lease]) -> None:
        """Hold them, until death or the end of the scene."""
        self.kept = leases

    def messages(self, name: str = "one") -> list[bytes]:
        """Take everything that is there."""
        found = []
        channel = self.open(self.survivor, name)
        while (lease := channel.receive_nowait()) is not None:
            found.append(lease.message)
            lease.release()
        return found


def reserve(pool: BlockPool) -> BlockHandle:
    handle = pool.alloc(5)
    assert handle is not None
    return handle


@contextlib.contextmanager
def two_messages(redeliver: bool = False) -> Iterator[Scene]:
    with BlockPool.create(new_pool_name(), CONFIG, prefault="off") as pool:
        yield Scene(pool, redeliver)


@contextlib.contextmanager
def redelivering() -> Iterator[Scene]:
    with two_messages(redeliver=True) as scene:
        yield scene


@contextlib.contextmanager
def dead_receiver() -> Iterator[Scene]:
    """The first message was taken by one who died, and is to go back."""
    with two_messages(redeliver=True) as scene:
        other = BlockPool.attach(scene.survivor.name, prefault="off")
        lease = scene.open(other).receive(timeout=0)
        assert lease.message == THERE[0]
        abandon(other)
        yield scene


class Case(NamedTuple):
    """An operation, its scene, and what may be in the channels after a death and an interrupt."""

    operation: Callable[[Scene], Call]
    setup: Callable[[], contextlib.AbstractContextManager[Scene]]
    killed: list[list[bytes]]
    interrupted: list[list[bytes]]
    also: str


CASES: dict[str, Case] = {}


def case(
    *,
    killed: list[list[bytes]],
    interrupted: list[list[bytes]] | None = None,
    setup: Callable[[], contextlib.AbstractContextManager[Scene]] = two_messages,
    also: str = "",
) -> Callable[[Callable[[Scene], Call]], Callable[[Scene], Call]]:
    def register(operation: Callable[[Scene], Call]) -> Callable[[Scene], Call]:
        CASES[operation.__name__] = Case(
            operation, setup, killed, killed if interrupted is None else interrupted, also
        )
        return operation

    return register


def joined(scene: Scene) -> tuple[BlockPool, Channel]:
    """The pool and the channel, with a forked child as a participant of its own."""
    scene.mine.available_blocks()
    return scene.mine, scene.open(scene.mine)


NOT_SENT = THERE
SENT = [*THERE, b"new"]


@case(killed=[NOT_SENT, SENT])
def send_a_reservation(scene: Scene) -> Call:
    pool, channel = joined(scene)

    def send() -> None:
        with pool.reserve(5) as reservation:
            channel.send(reservation, message=b"new")

    return send


@case(killed=[NOT_SENT, SENT], also="two")
def send_to_two_channels(scene: Scene) -> Call:
    pool, channel = joined(scene)
    two = scene.open(pool, "two")

    def send() -> None:
        with pool.reserve(5) as reservation:
            pool.send([channel, two], reservation, message=b"new")

    return send


@case(killed=[THERE, THERE[1:]], interrupted=[THERE])
def receive(scene: Scene) -> Call:
    _, channel = joined(scene)
    return lambda: channel.receive(timeout=0).release


@case(killed=[THERE, THERE[1:], []], interrupted=[THERE])
def receive_many(scene: Scene) -> Call:
    _, channel = joined(scene)
    return lambda: channel.receive_many(2, timeout=0)


@case(killed=[THERE], interrupted=[THERE], setup=redelivering)
def receive_what_is_redelivered(scene: Scene) -> Call:
    _, channel = joined(scene)
    return lambda: scene.keep(channel.receive_many(2, timeout=0))


@case(killed=[THERE], setup=dead_receiver)
def reap_that_redelivers(scene: Scene) -> Call:
    pool, _ = joined(scene)
    return pool.reap


@case(killed=[THERE], also="two")
def make_a_channel(scene: Scene) -> Call:
    pool, _ = joined(scene)
    return lambda: scene.open(pool, "two")


@case(killed=[THERE[1:], THERE])
def receive_and_release(scene: Scene) -> Call:
    _, channel = joined(scene)

    def receive() -> None:
        channel.receive(timeout=0).release()

    return receive


@case(killed=[[THERE[1]], []], interrupted=[[THERE[1]]])
def receive_past_what_was_freed(scene: Scene) -> Call:
    pool, channel = joined(scene)
    first = min(
        (info for info in pool.allocations() if info.state is State.PUBLISHED),
        key=lambda info: info.generation,
    )
    pool.free(pool.handle_at(first.start_block))

    return lambda: scene.keep(channel.receive_many(1, timeout=0))


def _judge(scene: Scene, allowed: list[list[bytes]], also: str) -> None:
    pool = scene.survivor
    with within(1.0, "the survivor's next operation"):
        pool.reap()
    assert_clean(pool, "after a reap")
    published = [info for info in pool.allocations() if info.state is State.PUBLISHED]
    first = scene.messages()
    assert first in allowed, f"{first} is none of {allowed}"
    if also:
        # All channels of one send, or none.
        assert scene.messages(also) == [message for message in first if message == b"new"]
    assert len(published) == len(first), f"{len(published)} are published, {first} announced"
    assert_survives(pool)
    assert pool.available_blocks() == pool.config.total_blocks


def kill(name: str) -> Coverage:
    """Kill a case at every line."""
    case = CASES[name]

    def verify(scene: Scene, point: Point) -> None:
        _judge(scene, case.killed, case.also)

    return kill_at_every_line(case.setup, case.operation, verify, one_per_state=one_per_state())


def interrupt(name: str) -> Coverage:
    """Interrupt a case at every line."""
    case = CASES[name]

    def operation(scene: Scene) -> Call:
        scene.mine = BlockPool.attach(scene.survivor.name, prefault="off")
        return case.operation(scene)

    operation.__name__ = name

    def verify(scene: Scene, point: Point) -> None:
        with within(1.0, "another participant's next operation"):
            scene.survivor.available_blocks()
        allowed = case.killed if point.is_end else case.interrupted
        mine = scene.mine
        with within(1.0, "the next operation of the one who was interrupted"):
            mine.available_blocks()
        assert_clean(mine, "seen by the one who was interrupted")
        mine.close()
        scene.kept = []
        _judge(scene, allowed, case.also)

    return interrupt_at_every_line(case.setup, operation, verify)
