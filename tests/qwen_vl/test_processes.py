"""A process stops waiting for its partner in a room when the launcher says that it is gone."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the extra `qwen` is not installed")

from qwen_vl import processes
from qwen_vl.cases import cases
from qwen_vl.children import Child
from qwen_vl.engine import Engine, NoAnswerError, Request
from qwen_vl.halves import Embedded, Whole
from qwen_vl.handoff import PoolSending, PoolTransport, pool_config
from qwen_vl.messages import (
    ENCODER,
    Embed,
    FromLauncher,
    Generate,
    Refused,
    Sent,
    Token,
    Way,
    Withdraw,
)
from qwen_vl.models import ModelSettings
from qwen_vl.processes import Launcher
from qwen_vl.prompts import Prompt, prompt_of
from shmblocks import BlockPool, PoolTimeoutError

PROMPT = prompt_of("Hello")
# Longer than any test may take: who waits for it hangs.
FOR_EVER = 10_000.0


class Half:
    """A vision half without a model."""

    def prepare(self, prompt: Prompt) -> Mapping[str, Any]:
        return {}

    def __call__(self, prepared: Mapping[str, Any]) -> Embedded:
        return Embedded({"fill_ids": torch.zeros(3, dtype=torch.int32)}, 0)


class End:
    """Readers that take what is sent at the n-th poll; None: never.

    `meanwhile` runs at each poll.
    """

    def __init__(self, polls: int | None, meanwhile: Callable[[], object] = list) -> None:
        self._left = polls
        self._meanwhile = meanwhile
        self.sent: list[int] = []
        self.gave_up: list[str] = []

    def send(self, room: int, embedded: Embedded, way: Way, readers: Sequence[int]) -> End:
        self.sent.append(room)
        return self

    def wait(self, seconds: float) -> bool:
        self._meanwhile()
        if self._left is None:
            return False
        self._left -= 1
        return self._left < 0

    def give_up(self, reason: str) -> None:
        self.gave_up.append(reason)


@pytest.fixture
def pipe() -> Iterator[tuple[Launcher, Connection[bytes, bytes]]]:
    ours, theirs = multiprocessing.Pipe()
    yield Launcher(theirs, "cpu"), ours
    ours.close()
    theirs.close()


def tell(connection: Connection[bytes, bytes], *messages: FromLauncher) -> None:
    for message in messages:
        connection.send_bytes(ENCODER.encode(message))


def embed(room: int) -> Embed:
    return Embed(room, PROMPT, "push", (0,))


def embedded(end: End, asked: Embed, launcher: Launcher) -> Sent | Refused:
    return processes._embed(Half(), end, asked, launcher)  # type: ignore[arg-type]


def test_it_stops_sending_when_the_launcher_withdraws_the_room(
    pipe: tuple[Launcher, Connection[bytes, bytes]],
) -> None:
    launcher, connection = pipe
    withdraw = (Withdraw(6, "another room"), Withdraw(7, "language 0 was killed"), embed(8))
    end = End(None, lambda: tell(connection, *withdraw))
    assert embedded(end, embed(7), launcher) == Refused(7, "language 0 was killed", False)
    assert end.gave_up == ["language 0 was killed"]
    assert launcher.next() == embed(8), "what came meanwhile is not lost"


def test_a_room_that_was_withdrawn_while_another_was_worked_on_is_known(
    pipe: tuple[Launcher, Connection[bytes, bytes]],
) -> None:
    launcher, connection = pipe
    tell(connection, embed(1), embed(2), Withdraw(2, "language 1 was killed"), embed(3))
    assert launcher.next() == embed(1)
    assert isinstance(embedded(End(3), embed(1), launcher), Sent)
    assert launcher.next() == embed(2)
    end = End(None)
    assert embedded(end, embed(2), launcher) == Refused(2, "language 1 was killed", False)
    assert not end.sent
    assert launcher.next() == embed(3)
    assert launcher.withdrawn(2) is None, "forgotten: rooms only ever go up"


def test_without_a_launcher_nobody_waits(
    pipe: tuple[Launcher, Connection[bytes, bytes]],
) -> None:
    launcher, connection = pipe
    connection.close()
    assert embedded(End(None), embed(1), launcher) == Refused(1, "the launcher is gone", False)
    assert launcher.next() is None


@contextlib.asynccontextmanager
async def started(name: str, way: Way) -> AsyncIterator[Engine]:
    """An engine of a tiny model whose rooms never end by themselves; its pool is right after."""
    settings = ModelSettings("qwen2.5-vl", "tiny")
    transport = PoolTransport(name, 2, timeout=FOR_EVER)
    with transport.created(settings) as pool:
        async with Engine(settings, transport, 2, way) as engine:
            await engine.wait_ready()
            yield engine
        assert pool.check() == []
        assert pool.available_blocks() == pool.config.total_blocks


def record_messages(child: Child) -> list[FromLauncher]:
    """What it will be told."""
    told: list[FromLauncher] = []
    send = child.send

    async def recording(
        message: FromLauncher, is_wanted: Callable[[], bool] = lambda: True
    ) -> None:
        told.append(message)
        await send(message, is_wanted)

    child.send = recording  # type: ignore[method-assign]
    return told


async def kill_when_asked(engine: Engine, children: Sequence[Child]) -> None:
    """Keep them from asking for the room that they are told of, then kill them."""
    pids = [child.pid for child in children if child.pid is not None]
    assert len(pids) == len(children)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    while engine.num_rooms == 0:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)  # by now, mostly, the embedding process waits for them
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("way", ["landing", "push", "fan-out"])
def test_a_language_process_that_dies_before_it_asks_holds_nobody_up(
    pool_name: str, way: Way
) -> None:
    prompt = cases(shrink=8)["one image"]
    whole = Whole(ModelSettings("qwen2.5-vl", "tiny"))

    async def answer() -> list[int]:
        async with started(pool_name, way) as engine:
            told = record_messages(engine.embedding)
            # Those who will be asked. (Killed too, the other one might be tried in between.)
            asked = engine.languages if way == "fan-out" else engine.languages[:1]
            killing = asyncio.create_task(kill_when_asked(engine, asked))
            got = [token async for token in engine.generate(prompt, 4)]
            await killing
            # Without it, the room would last until another process has replaced the dead one.
            assert {message.room for message in told if isinstance(message, Withdraw)} == {0}
        return got

    assert asyncio.run(answer()) == [step.token for step in whole.answer(prompt, 4)]


def test_one_of_two_readers_that_dies_before_it_asks_ends_the_room_for_both(
    pool_name: str,
) -> None:
    prompt = cases(shrink=8)["one image"]

    async def ask() -> None:
        async with started(pool_name, "fan-out") as engine:
            killing = asyncio.create_task(kill_when_asked(engine, engine.languages[1:]))
            with pytest.raises(NoAnswerError, match="language 1"):
                _ = [said async for said in engine.ask(Request(prompt, 2, "fan-out"))]
            await killing
            tokens = [said async for said in engine.ask(Request(prompt, 2, "fan-out"))]
            assert sum(isinstance(what, Token) for _, what in tokens) == 2 * 2

    asyncio.run(ask())


def test_a_generation_is_told_to_end_the_same_way(
    pipe: tuple[Launcher, Connection[bytes, bytes]],
) -> None:
    launcher, connection = pipe
    tell(connection, Generate(5, "push", 1), Withdraw(5, "the embedding process was killed"))
    assert launcher.next() == Generate(5, "push", 1)
    assert launcher.withdrawn(5) == "the embedding process was killed"


def test_giving_up_frees_what_was_published_and_ends_every_sender(pool_name: str) -> None:
    aborted = []

    class Sender:
        def abort(self, reason: str) -> None:
            aborted.append(reason)
            raise PoolTimeoutError("the lock")

    with BlockPool.create(pool_name, pool_config(ModelSettings("qwen2.5-vl", "tiny"))) as pool:
        handle = pool.alloc(8)
        assert handle is not None
        handle = pool.publish(handle, readers=2)
        sending = PoolSending(pool, 5, [Sender(), Sender()], handle)  # type: ignore[list-item]
        with pytest.raises(PoolTimeoutError):
            sending.give_up("a reader has died")
        sending.give_up("again")
        assert aborted == ["a reader has died"] * 2
        assert pool.available_blocks() == pool.config.total_blocks


def test_what_all_readers_have_had_need_not_be_freed(pool_name: str) -> None:
    with BlockPool.create(pool_name, pool_config(ModelSettings("qwen2.5-vl", "tiny"))) as pool:
        handle = pool.alloc(8)
        assert handle is not None
        handle = pool.publish(handle)
        pool.open(handle).release()
        PoolSending(pool, 5, [], handle).give_up("SIGTERM")
