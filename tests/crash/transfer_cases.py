"""Either side of a transfer dies at every line of each of its steps; the other one lives on.

The side that dies runs in a child; the other is played by the parent (`meanwhile`), until the child
is about to take the step it may die in. Then the parent stands still, so that the step has the same
lines every time, and judges after the death: its rooms end within a second and say who died, and
every block comes back.
"""

from __future__ import annotations

import contextlib
import mmap
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import shmblocks.transfer.link
from shmblocks import BlockPool, Field, PoolConfig
from shmblocks.testing import (
    Coverage,
    Point,
    Wire,
    assert_survives,
    kill_at_every_line,
    remember,
)
from shmblocks.transfer import EmbeddingEndpoint, LanguageEndpoint, Receiver, Sender, Status
from tests.crash.scenes import publish
from tests.support.naming import new_pool_name

if TYPE_CHECKING:
    import torch

BLOCK = 4
LANDING_BLOCKS = 2
CONFIG = PoolConfig(
    total_tokens=12 * BLOCK,
    fields=(Field("x", (), "int32"),),
    block_size=BLOCK,
    default_num_blocks=LANDING_BLOCKS,
    max_participants=3,
    max_leases=4,
    lock_timeout=2.0,
)
# More than a landing allocation: the second round is a resume.
TOKENS = LANDING_BLOCKS * BLOCK + 3
ROOM = 7
PATIENCE = 10.0


class Scene:
    """A pool, a wire, and what the survivor has of the transfer."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.kept = remember(pool, publish(pool, 5, readers=2))
        self.ours, self.theirs = Wire.pair()
        self.is_about_to = mmap.mmap(-1, 1)
        self.endpoint: EmbeddingEndpoint | LanguageEndpoint | None = None
        self.room: Sender | Receiver | None = None

    def begin(self) -> None:
        """The child takes the step that it may die in: nobody else moves from now on."""
        self.is_about_to[0] = 1


class Step(NamedTuple):
    """A step of one side: what comes before it, and itself."""

    name: str
    side: Callable[[Scene], Callable[[], object]]
    survivor: Callable[[Scene], None]


def payload() -> dict[str, torch.Tensor]:
    import torch

    return {"x": torch.arange(TOKENS, dtype=torch.int32)}


# ---- the survivor's side, in the parent --------------------------------------------------------


def survivor_sends(scene: Scene) -> None:
    """Plays the embedding side."""
    if scene.endpoint is None:
        scene.endpoint = EmbeddingEndpoint(scene.pool, scene.ours, scene.ours)
        scene.room = scene.endpoint.send(ROOM, payload())
    scene.endpoint.poll()


def survivor_lands(scene: Scene) -> None:
    _survivor_receives(scene, "landing")


def survivor_is_pushed(scene: Scene) -> None:
    _survivor_receives(scene, "push")


def _survivor_receives(scene: Scene, mode: str) -> None:
    """Plays the language side."""
    if scene.endpoint is None:
        endpoint = LanguageEndpoint(scene.pool, scene.ours, scene.ours)
        scene.endpoint = endpoint
        scene.room = endpoint.receive(ROOM, "push" if mode == "push" else "landing")
    scene.endpoint.poll()


# ---- the side that dies, in the child ----------------------------------------------------------


def next_message(scene: Scene) -> None:
    assert scene.theirs.has_message(PATIENCE), "the other side said nothing"


def language(scene: Scene, mode: str, polls: int, last: str) -> Callable[[], object]:
    """A language side that has polled so often, each time with one more message there."""
    endpoint = LanguageEndpoint(scene.pool, scene.theirs, scene.theirs)
    if last == "receive":
        scene.begin()
        return lambda: endpoint.receive(ROOM, "push" if mode == "push" else "landing")
    receiver = endpoint.receive(ROOM, "push" if mode == "push" else "landing")
    while receiver.rounds < polls:
        next_message(scene)
        endpoint.poll()
    scene.room = receiver
    if last == "release":
        result = receiver.wait(PATIENCE)
        scene.begin()
        return result.release
    if last == "close":
        scene.begin()
        return endpoint.close
    wait_for_chunk(scene, receiver, endpoint)
    scene.begin()
    return endpoint.poll


def wait_for_chunk(scene: Scene, receiver: Receiver, endpoint: LanguageEndpoint) -> None:
    """Take greetings until what lies there is the next chunk: the answer to what was asked."""
    next_message(scene)
    if receiver.rounds == 0:
        endpoint.poll()  # the greeting
        if receiver.rounds == 0:
            next_message(scene)


def embedding(scene: Scene, polls: int, last: str) -> Callable[[], object]:
    """An embedding side that has answered so many requests."""
    endpoint = EmbeddingEndpoint(scene.pool, scene.theirs, scene.theirs)
    next_message(scene)  # the greeting
    endpoint.poll()
    if last == "send":
        next_message(scene)
        tensors = payload()
        scene.begin()
        return lambda: endpoint.send(ROOM, tensors)
    sender = endpoint.send(ROOM, payload())
    while sender.rounds < polls:
        next_message(scene)
        endpoint.poll()
    scene.room = sender
    if last == "poll":
        next_message(scene)
    scene.begin()
    return endpoint.close if last == "close" else endpoint.poll


def of_language(mode: str, polls: int, last: str) -> Callable[[Scene], Callable[[], object]]:
    return lambda scene: language(scene, mode, polls, last)


def of_embedding(polls: int, last: str) -> Callable[[Scene], Callable[[], object]]:
    return lambda scene: embedding(scene, polls, last)


STEPS = {
    step.name: step
    for step in (
        Step("language, landing: asks", of_language("landing", 0, "receive"), survivor_sends),
        Step("language, landing: resumes", of_language("landing", 0, "poll"), survivor_sends),
        Step("language, landing: succeeds", of_language("landing", 1, "poll"), survivor_sends),
        Step("language, landing: releases", of_language("landing", 2, "release"), survivor_sends),
        Step("language, landing: closes", of_language("landing", 1, "close"), survivor_sends),
        Step("language, push: succeeds", of_language("push", 0, "poll"), survivor_sends),
        Step("language, push: releases", of_language("push", 1, "release"), survivor_sends),
        Step("embedding, landing: writes", of_embedding(0, "send"), survivor_lands),
        Step("embedding, landing: writes the rest", of_embedding(1, "poll"), survivor_lands),
        Step("embedding, landing: succeeds", of_embedding(2, "poll"), survivor_lands),
        Step("embedding, landing: closes", of_embedding(1, "close"), survivor_lands),
        Step("embedding, push: writes", of_embedding(0, "send"), survivor_is_pushed),
        Step("embedding, push: succeeds", of_embedding(1, "poll"), survivor_is_pushed),
    )
}


# ---- killing -----------------------------------------------------------------------------------


@contextlib.contextmanager
def stage() -> Iterator[Scene]:
    with BlockPool.create(new_pool_name(), CONFIG, role="survivor", prefault="off") as pool:
        scene = Scene(pool)
        try:
            yield scene
        finally:
            scene.ours.close()
            scene.theirs.close()


def kill(name: str) -> Coverage:
    """Kill one side at every line of one step."""
    # Look for the peer at every poll and not only now and then: the same lines every time.
    shmblocks.transfer.link.LOOK_INTERVAL = 0.0
    step = STEPS[name]

    def meanwhile(scene: Scene) -> None:
        if not scene.is_about_to[0]:
            step.survivor(scene)

    coverage = kill_at_every_line(stage, step.side, _judge, meanwhile=meanwhile)
    return coverage._replace(operation=name)


def _judge(scene: Scene, _: Point) -> None:
    """The survivor's room ends, and says why; everything comes back."""
    endpoint, room = scene.endpoint, scene.room
    assert endpoint is not None
    assert room is not None
    deadline = time.monotonic() + 1.0
    while room.status not in (Status.Success, Status.Failed):
        assert time.monotonic() < deadline, f"{room} has not ended a second after the death"
        endpoint.poll()
    if room.status is Status.Failed:
        assert "died" in str(room.failure) or "closed" in str(room.failure), room.failure
    elif isinstance(room, Receiver):
        _judge_result(room)
    endpoint.close()
    assert_survives(scene.pool, scene.kept)
    left = [info for info in scene.pool.allocations() if info.owner is None or info.owner.is_self]
    assert len(left) == 1, f"more than what is kept: {left}"


def _judge_result(receiver: Receiver) -> None:
    result = receiver.result
    assert result is not None
    with result:
        assert result["x"].tolist() == list(range(TOKENS))
