"""The hooks' functions, killed at every line; what must be true after.

The functions here run in a fresh interpreter, away from pytest. The survivor made the pool, and is
the rank that an embedding is announced to, or the encoder that announced it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from shmblocks import BlockHandle, BlockPool, ParticipantId
from shmblocks.sglang_plugin import encoder, gpu, language
from shmblocks.sglang_plugin.attachment import role_of
from shmblocks.sglang_plugin.encoder import HANDLE, Sender
from shmblocks.sglang_plugin.language import Receiver
from shmblocks.sglang_plugin.settings import Settings
from shmblocks.testing import Coverage, Point, Scope, assert_survives, kill_at_every_line, within
from tests.sglang_plugin import kit
from tests.support.naming import new_pool_name

URL = "127.0.0.1:5555"
ROWS = 4
# Lines of the plug-in. Those of the pool's operations are killed by the pool's own tests.
SCOPE = Scope([encoder, language, gpu], library=False)
Call = Callable[[], object]


class Scene:
    """The pool, and the survivor's part in it."""

    def __init__(self, settings: Settings, pool: BlockPool) -> None:
        self.settings = settings
        self.pool = pool
        # Kept until death: what is dropped is given back.
        self.kept: list[object] = []


@contextlib.contextmanager
def scene() -> Iterator[Scene]:
    torch.set_num_threads(1)
    settings = kit.settings(new_pool_name())
    with BlockPool.create(
        settings.pool, settings.config(), role=role_of(URL), prefault="off"
    ) as pool:
        yield Scene(settings, pool)


def an_encoder(scene: Scene) -> tuple[Sender, kit.MMEncoder, kit.EmbeddingData]:
    sender = Sender(scene.settings)
    kit.pool_of(sender)
    made = (sender, kit.MMEncoder(), kit.EmbeddingData("r1", kit.tensor(ROWS)))
    scene.kept += made
    return made


def send(scene: Scene) -> Call:
    sender, target, data = an_encoder(scene)
    return lambda: kit.send(sender, target, data, URL)


def send_in_vain(scene: Scene) -> Call:
    sender, target, data = an_encoder(scene)
    target.fails = True

    def run() -> None:
        with contextlib.suppress(ConnectionError):
            kit.send(sender, target, data, URL)

    return run


def release(scene: Scene) -> Call:
    sender, target, data = an_encoder(scene)
    kit.send(sender, target, data, URL)
    return lambda: sender.release(data)


def a_rank(scene: Scene) -> tuple[Receiver, kit.WaitingZmqRequest, kit.EmbeddingData]:
    """A rank in the child, and a message for it; the child is the encoder, too."""
    receiver = Receiver(scene.settings, "127.0.0.1:1")
    who: ParticipantId | None = kit.pool_of(receiver).participant
    assert who is not None
    data = kit.EmbeddingData("r1", kit.tensor(ROWS))
    with scene.pool.reserve(8) as reservation:
        reservation.tensor(torch.bfloat16, (ROWS, 3584)).copy_(kit.tensor(ROWS))
        handle = reservation.publish(readers=[who])
    setattr(data, HANDLE, handle.encode())
    made = (receiver, kit.WaitingZmqRequest(), data)
    scene.kept += made
    return made


def extract_and_assemble(scene: Scene) -> Call:
    receiver, request, data = a_rank(scene)

    def run() -> None:
        receiver.extract(_no_bytes, request, data, [])  # type: ignore[arg-type]
        request.recv_embedding_data = kit.MultiModalEmbeddingData([data.embedding])
        receiver.has_assembled(request)  # type: ignore[arg-type]

    return run


def give_back(scene: Scene) -> Call:
    receiver, _, data = a_rank(scene)
    receiver.note(data)
    return receiver.give_back_dropped


def _no_bytes(*_: object) -> None:
    raise AssertionError("this message has a handle")


CASES: dict[str, Callable[[Scene], Call]] = {
    operation.__name__: operation
    for operation in (send, send_in_vain, release, extract_and_assemble, give_back)
}
# Of these the survivor is the rank: a claim of its own may be there.
SENDING = ("send", "send_in_vain", "release")


def kill(name: str) -> Coverage:
    """Kill one of them at every line."""

    def verify(scene: Scene, point: Point) -> None:
        _judge(scene, name)

    return kill_at_every_line(scene, CASES[name], verify, scope=SCOPE)


def _judge(scene: Scene, name: str) -> None:
    pool = scene.pool
    assert_survives(pool)
    pool.reap()
    left = pool.allocations()
    if name in SENDING:
        # Of the dead encoder nothing is left; what it announced, the rank can read.
        for info in left:
            assert [lease.kind for lease in info.leases] == ["announced"] * len(info.leases)
            handle = BlockHandle(
                info.start_block, info.num_blocks, info.num_tokens, info.generation, pool.pool_id
            )
            for _ in info.leases:
                with within(1.0, "opening what was announced"), pool.open(handle) as lease:
                    read = lease.tensor(torch.bfloat16, (ROWS, 3584))
                    assert torch.equal(read, kit.tensor(ROWS))
    else:
        assert left == [], f"held for a rank that is dead: {left}"
    assert pool.available_blocks() == pool.config.total_blocks
