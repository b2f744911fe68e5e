"""The other side of a transfer, in a thread or process of its own, told what to do step by step.

    partner.ask("start", 7, num_tokens=100)      # opens room 7 over there, answers with its status
    partner.ask("until", 7)                      # polls until the room has ended
    partner.ask("until", 7, status="Transferring")

A *busy* partner polls its endpoint all the time; an idle one only does what it is asked, so that it
stands still, and can be killed, at a known point.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from dataclasses import dataclass
from typing import Literal

from shmblocks import BlockPool
from shmblocks.transfer import (
    EmbeddingEndpoint,
    EndpointStats,
    LanguageEndpoint,
    Receiver,
    Sender,
    Status,
)
from tests.support.children import Channel, Child
from tests.transfer.kinds import AnyEnd
from tests.transfer.kit import PATIENCE, Mode, assert_arrived, payload

Side = Literal["embedding", "language"]
Verb = Literal["start", "poll", "until", "abort", "take", "stats", "close"]


@dataclass(frozen=True)
class Command:
    """What a partner is told. Which arguments count depends on the verb."""

    verb: Verb
    room: int = 0
    num_tokens: int = 0
    seed: int = 0
    delta: int = 0
    mode: Mode = "landing"
    status: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Reply:
    """How a room stands after a command."""

    status: str = ""
    failure: str | None = None
    rounds: int = 0
    peer: str = ""
    stats: EndpointStats | None = None


class _Service:
    """The endpoint over there."""

    def __init__(self, pool: BlockPool, side: Side, end: AnyEnd, is_busy: bool) -> None:
        self._pool = pool
        self._side = side
        self._end = end
        self._is_busy = is_busy
        self._rooms: dict[int, Sender | Receiver] = {}

    def run(self, channel: Channel) -> None:
        with self._end.opened() as (tx, rx):
            kind = EmbeddingEndpoint if self._side == "embedding" else LanguageEndpoint
            with kind(self._pool, tx, rx) as endpoint:
                channel.say(Reply("ready"))
                while (command := self._next(channel, endpoint)).verb != "close":
                    channel.say(self._obey(command, endpoint))
        channel.say(Reply("closed"))

    def _next(self, channel: Channel, endpoint: EmbeddingEndpoint | LanguageEndpoint) -> Command:
        while self._is_busy and not channel.has_message(0.0005):
            endpoint.poll()
        command = channel.receive()
        assert isinstance(command, Command)
        return command

    def _obey(self, command: Command, endpoint: EmbeddingEndpoint | LanguageEndpoint) -> Reply:
        if command.verb == "start":
            self._rooms[command.room] = self._start(command, endpoint)
        elif command.verb == "poll":
            endpoint.poll()
        elif command.verb == "stats":
            return Reply(peer=endpoint.stats().peer, stats=endpoint.stats())
        elif command.verb == "until":
            self._until(self._rooms[command.room], command.status)
        elif command.verb == "abort":
            self._rooms[command.room].abort(command.reason)
        elif command.verb == "take":
            self._take(command)
        room = self._rooms.get(command.room)
        return Reply() if room is None else Reply(str(room.status), room.failure, room.rounds)

    def _start(
        self, command: Command, endpoint: EmbeddingEndpoint | LanguageEndpoint
    ) -> Sender | Receiver:
        if isinstance(endpoint, LanguageEndpoint):
            return endpoint.receive(command.room, command.mode)
        tensors = payload(self._pool.config.fields, command.num_tokens, command.seed)
        return endpoint.send(command.room, tensors, mrope_position_delta=command.delta)

    def _until(self, room: Sender | Receiver, status: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not room.status.is_final and room.status != status:
            room.poll()
            assert time.monotonic() < deadline, f"hangs: {room}"

    def _take(self, command: Command) -> None:
        room = self._rooms[command.room]
        assert isinstance(room, Receiver)
        with room.wait(PATIENCE) as result:
            assert_arrived(result, self._pool, command.num_tokens, command.seed, command.delta)


def serve_one(
    channel: Channel, pool_name: str, side: Side, end: AnyEnd, is_busy: bool = True
) -> None:
    """For a child process: be one side of one pair of queues."""
    serve_all(channel, pool_name, side, {"": end}, is_busy)


def serve_all(
    channel: Channel, pool_name: str, side: Side, ends: dict[str, AnyEnd], is_busy: bool = True
) -> None:
    """For a child process: be one side of several pairs of queues, one after the other."""
    import torch

    torch.set_num_threads(1)  # a forked child has lost the threads of its parent
    with BlockPool.attach(pool_name, role=side) as pool:
        kind: object = "" if len(ends) == 1 else channel.receive()
        while kind is not None:
            _Service(pool, side, ends[str(kind)], is_busy).run(channel)
            kind = None if len(ends) == 1 else channel.receive()


class Partner:
    """Speaks to a side that is served elsewhere; borrows what it speaks through."""

    def __init__(self, channel: Channel | Child) -> None:
        self._channel = channel
        assert self._reply().status == "ready"

    def ask(
        self,
        verb: Verb,
        room: int = 0,
        *,
        num_tokens: int = 0,
        seed: int = 0,
        delta: int = 0,
        mode: Mode = "landing",
        status: str = "",
        reason: str = "",
    ) -> Reply:
        """Tell, and wait for the answer."""
        self._channel.say(Command(verb, room, num_tokens, seed, delta, mode, status, reason))
        return self._reply()

    def close(self) -> None:
        """Close the endpoint over there."""
        assert self.ask("close").status == "closed"

    def _reply(self) -> Reply:
        reply = self._channel.receive()
        assert isinstance(reply, Reply), reply
        return reply


class PartnerThread:
    """A partner in a thread of this process. A context manager."""

    def __init__(self, pool: BlockPool, side: Side, end: AnyEnd) -> None:
        ours, theirs = multiprocessing.Pipe()
        self._channels = (Channel(ours), Channel(theirs))
        service = _Service(pool, side, end, is_busy=True)
        self._thread = threading.Thread(target=service.run, args=(Channel(theirs),))

    def __enter__(self) -> Partner:
        self._thread.start()
        self._partner = Partner(self._channels[0])
        return self._partner

    def __exit__(self, *_: object) -> None:
        self._partner.close()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the partner's thread hangs"
        for channel in self._channels:
            channel.close()


def is_final(status: str) -> bool:
    return Status(status).is_final
