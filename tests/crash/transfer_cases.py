"""Either side of a transfer dies at every line of each of its steps; the other one lives on.

The side that dies runs in a child; the other is played by the parent (`meanwhile`), which moves
only when the child gives it a turn, so that every step finds the same messages and has the same
lines every time. After the death the parent judges: its room ends within a second and says who
died, and every block comes back.

The points are the lines of `shmblocks.transfer`: the pool's operations between them are killed at
every line of their own by `operations.py`.
"""

from __future__ import annotations

import contextlib
import mmap
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import shmblocks.transfer
import shmblocks.transfer.connection
from shmblocks import BlockPool, Field, PoolConfig, State
from shmblocks.testing import (
    Coverage,
    Point,
    Scope,
    Wire,
    assert_survives,
    kill_at_every_line,
    remember,
)
from shmblocks.transfer import EmbeddingEndpoint, LanguageEndpoint, Receiver, Sender, Status
from shmblocks.transfer.messages import Mode
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

Survivor = Callable[["Scene", int], None]


class Scene:
    """A pool, a wire, and what the survivor has of the transfer."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.kept = remember(pool, publish(pool, 5, readers=2))
        self.ours, self.theirs = Wire.pair()
        # In memory that both see: whose turn it is (n: the survivor's n-th; 0: the child's), and
        # whether the survivor moves.
        self._shared = mmap.mmap(-1, 2)
        self._turns = 0
        self.endpoint: EmbeddingEndpoint | LanguageEndpoint | None = None
        self.room: Sender | Receiver | None = None

    def next_message(self) -> None:
        """In the child: let the survivor move until it has sent something."""
        self._turns += 1
        self._shared[0] = self._turns
        assert self.theirs.has_message(PATIENCE), "the other side said nothing"
        self._shared[0] = 0
        while self._shared[1]:
            time.sleep(0.0001)

    def move(self, survivor: Survivor) -> None:
        """In the parent: let the survivor move, if it is its turn."""
        self._shared[1] = 1
        turn = self._shared[0]
        if turn:
            survivor(self, turn)
        self._shared[1] = 0


class Step(NamedTuple):
    """A step of one side: what comes before it, and itself."""

    name: str
    side: Callable[[Scene], Callable[[], object]]
    survivor: Survivor


def payload() -> dict[str, torch.Tensor]:
    import torch

    return {"x": torch.arange(TOKENS, dtype=torch.int32)}


# ---- the survivor's side, in the parent --------------------------------------------------------


def survivor_sends(scene: Scene, turn: int) -> None:
    """Plays the embedding side: first it greets, then it sends."""
    if scene.endpoint is None:
        scene.endpoint = EmbeddingEndpoint(scene.pool, scene.ours, scene.ours)
    elif turn > 1:
        _start(scene, "landing")
        scene.endpoint.poll()


def survivor_lands(scene: Scene, turn: int) -> None:
    """Plays the language side: first it greets, then it asks."""
    _receive(scene, turn, "landing")


def survivor_is_pushed(scene: Scene, turn: int) -> None:
    _receive(scene, turn, "push")


def _receive(scene: Scene, turn: int, mode: Mode) -> None:
    if scene.endpoint is None:
        scene.endpoint = LanguageEndpoint(scene.pool, scene.ours, scene.ours)
    elif turn > 1:
        _start(scene, mode)
        scene.endpoint.poll()


def _start(scene: Scene, mode: Mode) -> None:
    if scene.room is None and isinstance(scene.endpoint, EmbeddingEndpoint):
        scene.room = scene.endpoint.send(ROOM, payload())
    elif scene.room is None and isinstance(scene.endpoint, LanguageEndpoint):
        scene.room = scene.endpoint.receive(ROOM, mode)


# ---- the side that dies, in the child ----------------------------------------------------------


def language(scene: Scene, mode: Mode, chunks: int, last: str) -> Callable[[], object]:
    """A language side that has taken so many chunks, before its `last` step."""
    endpoint = LanguageEndpoint(scene.pool, scene.theirs, scene.theirs)
    scene.next_message()
    endpoint.poll()  # the greeting
    if last == "receive":
        return lambda: endpoint.receive(ROOM, mode)
    receiver = endpoint.receive(ROOM, mode)
    for _ in range(chunks):
        scene.next_message()
        endpoint.poll()
    if last == "release":
        return receiver.wait(PATIENCE).release
    if last == "close":
        return endpoint.close
    scene.next_message()
    return endpoint.poll


def embedding(scene: Scene, answers: int, last: str) -> Callable[[], object]:
    """An embedding side that has got so many answers to its chunks, before its `last` step."""
    endpoint = EmbeddingEndpoint(scene.pool, scene.theirs, scene.theirs)
    scene.next_message()
    endpoint.poll()  # the greeting
    scene.next_message()  # the request
    if last == "send":
        tensors = payload()
        return lambda: endpoint.send(ROOM, tensors)
    scene.room = endpoint.send(ROOM, payload())
    for _ in range(answers):
        scene.next_message()
        endpoint.poll()
    if last == "close":
        return endpoint.close
    scene.next_message()
    return endpoint.poll


def of_language(mode: Mode, chunks: int, last: str) -> Callable[[Scene], Callable[[], object]]:
    return lambda scene: language(scene, mode, chunks, last)


def of_embedding(answers: int, last: str) -> Callable[[Scene], Callable[[], object]]:
    return lambda scene: embedding(scene, answers, last)


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
        Step("embedding, landing: writes the rest", of_embedding(0, "poll"), survivor_lands),
        Step("embedding, landing: succeeds", of_embedding(1, "poll"), survivor_lands),
        Step("embedding, landing: closes", of_embedding(0, "close"), survivor_lands),
        Step("embedding, push: writes", of_embedding(0, "send"), survivor_is_pushed),
        Step("embedding, push: succeeds", of_embedding(0, "poll"), survivor_is_pushed),
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
    # Here, once: children that had to import torch each for themselves would take a second each.
    payload()
    # Check the peer at every poll and not only now and then: the same lines every time.
    shmblocks.transfer.connection.CHECK_INTERVAL = 0.0
    step = STEPS[name]

    coverage = kill_at_every_line(
        stage,
        step.side,
        _judge,
        scope=Scope([shmblocks.transfer], library=False),
        meanwhile=lambda scene: scene.move(step.survivor),
    )
    return coverage._replace(operation=name)


def _judge(scene: Scene, _: Point) -> None:
    """The survivor's room ends, and says why; everything comes back."""
    _start(scene, "landing")
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
    # What the dead one had published and not announced goes when its time is over.
    left = [info for info in scene.pool.allocations() if info.state is not State.PUBLISHED]
    assert not left, f"more than what is published: {left}"


def _judge_result(receiver: Receiver) -> None:
    result = receiver.result
    assert result is not None
    with result:
        assert result["x"].tolist() == list(range(TOKENS))
