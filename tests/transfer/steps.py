"""Bringing a room, with both sides in this process, to a status, and holding it there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from shmblocks import BlockPool
from shmblocks.transfer import Receiver, Sender, Status
from tests.transfer.conftest import Pair
from tests.transfer.kit import LANDING, WHOLE_POOL, Mode, payload, settle

ROOM = 7
LONG = 3 * LANDING + 5  # tokens: more than one round with landing


class Step(NamedTuple):
    """A mode, and what the two sides are at."""

    mode: Mode
    embedding: Status | None
    language: Status | None


# Every pair of open statuses that two sides can stand at, None being a side that has not begun.
STEPS = [
    Step("landing", Status.Bootstrapping, None),
    Step("landing", None, Status.Bootstrapping),
    Step("landing", None, Status.WaitingForInput),
    Step("landing", Status.Bootstrapping, Status.Bootstrapping),
    Step("landing", Status.Transferring, Status.WaitingForInput),
    Step("landing", Status.Transferring, Status.Transferring),
    Step("push", Status.Bootstrapping, None),
    Step("push", None, Status.WaitingForInput),
    Step("push", Status.WaitingForInput, Status.WaitingForInput),
    Step("push", Status.Transferring, Status.WaitingForInput),
    Step("push", Status.Transferring, Status.Transferring),
]


class Held(NamedTuple):
    """The two sides of the room."""

    sender: Sender | None
    receiver: Receiver | None


@contextlib.contextmanager
def no_blocks(pool: BlockPool, free_blocks: int = 0) -> Iterator[None]:
    """Somebody else has the pool."""
    held = pool.alloc_blocks(pool.config.total_blocks - free_blocks, 1, req_id="somebody else")
    assert held is not None
    try:
        yield
    finally:
        pool.free(held)


@contextlib.contextmanager
def room_at(step: Step, pair: Pair) -> Iterator[Held]:
    """The room at that step; neither side is polled any more."""
    starves = step.language is Status.Bootstrapping or step.embedding is Status.WaitingForInput
    with no_blocks(pair.pool) if starves else contextlib.nullcontext():
        sender = receiver = None
        if step.embedding is not None:
            tokens = 2 * WHOLE_POOL if step.mode == "push" and not starves else LONG
            sender = pair.embedding.send(ROOM, payload(pair.pool.config.fields, tokens))
        if step.language is not None:
            receiver = pair.language.receive(ROOM, step.mode)
        if step.embedding in (Status.WaitingForInput, Status.Transferring):
            pair.embedding.poll()
        if step.language is Status.Transferring:
            pair.language.poll()
        assert sender is None or sender.status == step.embedding
        assert receiver is None or receiver.status == step.language
        yield Held(sender, receiver)


def finish(pair: Pair) -> None:
    settle(pair.embedding, pair.language)
