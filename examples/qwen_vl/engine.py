"""The launcher: requests in, tokens out, whatever happens to the processes.

    async with Engine(settings, transport) as engine:
        async for token in engine.generate(prompt, count): ...

- One embedding process, and language processes that have one request at a time each.
- A request whose embeddings do not arrive, because a process died or was too slow, is tried again
  with the processes that replace them, up to ATTEMPTS times; then it is `NoAnswerError`. After
  its first token it is not tried again: a language process that dies then ends the answer with that
  error.
- `ask` is one attempt, with everything that the processes say about it.

What is not here: HTTP (serve.py), or processes themselves (children.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from qwen_vl.children import Child
from qwen_vl.handoff import Transport
from qwen_vl.messages import (
    Crossed,
    Embed,
    Ended,
    FromLauncher,
    Generate,
    Holding,
    Ready,
    Refused,
    Sent,
    Token,
    ToLauncher,
    Way,
    Withdraw,
)
from qwen_vl.models import ModelSettings
from qwen_vl.processes import Setup, embedding_process, language_process
from qwen_vl.prompts import Prompt, PromptError

ATTEMPTS = 4


class NoAnswerError(Exception):
    """There is no (whole) answer; the message says why. Asking again may help."""


@dataclass(frozen=True)
class Request:
    """What is wanted, and how it is to be done."""

    prompt: Prompt
    count: int
    way: Way = "push"
    is_timed: bool = False
    with_digests: bool = False


EMBEDDING = -1  # who says something: this, or the index of a language process
Event = Sent | Holding | Crossed | Token
Said = Event | Refused | Ended


@dataclass
class Room:
    """One attempt: the processes that have not finished with it, and what they reported."""

    running: set[int]
    readers: tuple[int, ...]
    said: asyncio.Queue[tuple[int, Said] | None]  # None: all processes have finished


class Engine:
    """The processes of one model and the requests they work on. An async context manager."""

    def __init__(
        self, settings: ModelSettings, transport: Transport, readers: int, way: Way = "push"
    ) -> None:
        setup = Setup(settings, transport)
        self.embedding = Child(
            "embedding", embedding_process, (setup,), self._on_message, self._on_death
        )
        self.languages = [
            Child(f"language {i}", language_process, (setup, i), self._on_message, self._on_death)
            for i in range(readers)
        ]
        self.way = way
        self._rooms: dict[int, Room] = {}
        self._next_room = 0
        self._idle: set[int] = set()
        self._changed = asyncio.Condition()  # the set of idle processes, or a process became ready
        self._tasks: set[asyncio.Task[None]] = set()

    # ---- life --------------------------------------------------------------------------------

    @property
    def children(self) -> list[Child]:
        """All of them."""
        return [self.embedding, *self.languages]

    @property
    def num_rooms(self) -> int:
        """Attempts that are going on."""
        return len(self._rooms)

    async def __aenter__(self) -> Engine:
        self._running = [asyncio.create_task(child.run()) for child in self.children]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for task in (*self._running, *self._tasks):
            task.cancel()
        await asyncio.gather(*self._running, *self._tasks, return_exceptions=True)

    async def wait_ready(self) -> list[Ready]:
        """Wait until every process has its half of the model; `ChildError` when one cannot."""
        waiting = asyncio.create_task(self._all_ready())
        watched: set[asyncio.Task[Any]] = {waiting, *self._running}
        await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            waiting.cancel()
            await self.wait_broken()
        return await waiting

    async def _all_ready(self) -> list[Ready]:
        return [await child.wait_ready() for child in self.children]

    async def wait_broken(self) -> None:
        """Wait until a process cannot be kept running; raises its `ChildError`."""
        done, _ = await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    # ---- requests ----------------------------------------------------------------------------

    async def generate(self, prompt: Prompt, count: int) -> AsyncGenerator[int, None]:
        """`count` tokens, each as soon as it is there. `PromptError`, `NoAnswerError`.

        When several language processes give the same answer (fan-out), the first one counts.
        """
        for attempt in range(1, ATTEMPTS + 1):
            got, answering = 0, None
            try:
                async for who, event in self.ask(Request(prompt, count, self.way)):
                    if isinstance(event, Token) and answering in (None, who):
                        got, answering = got + 1, who
                        yield event.token
                return
            except NoAnswerError:
                if got or attempt == ATTEMPTS:
                    raise

    async def ask(self, request: Request) -> AsyncIterator[tuple[int, Event]]:
        """One attempt: what its processes say, and which (EMBEDDING, or a language process)."""
        room = await self._open(request)
        problems: list[Exception] = []
        is_whole = True  # a process that dies when it has handed over has done its part
        while (said := await room.said.get()) is not None:
            who, what = said
            if isinstance(what, Refused):
                problems.append((PromptError if what.is_prompt else NoAnswerError)(what.reason))
            elif isinstance(what, Ended):
                if what.failure:
                    is_whole = False
                    problems.append(NoAnswerError(what.failure))
            else:
                yield who, what
        if not is_whole:
            raise problems[0]

    async def _open(self, request: Request) -> Room:
        """Choose idle language processes, and send each process its part of the request."""
        readers = await self._take_readers(request)
        number = self._next_room
        self._next_room += 1
        room = Room({EMBEDDING, *readers}, readers, asyncio.Queue())
        self._rooms[number] = room
        generate = Generate(
            number, request.way, request.count, request.is_timed, request.with_digests
        )
        embed = Embed(
            number, request.prompt, request.way, readers, request.is_timed, request.with_digests
        )
        for reader in readers:  # first: they have to ask
            self._send(reader, room, generate)
        self._send(EMBEDDING, room, embed)
        return room

    async def _take_readers(self, request: Request) -> tuple[int, ...]:
        """Language processes without work, at a moment when the embedding process is there."""
        how_many = len(self.languages) if request.way == "fan-out" else 1
        async with self._changed:
            await self._changed.wait_for(
                lambda: len(self._idle) >= how_many and self.embedding.ready is not None
            )
            readers = tuple(sorted(self._idle)[:how_many])
            self._idle.difference_update(readers)
        return readers

    def _send(self, who: int, room: Room, message: FromLauncher) -> None:
        """Not to a restarted process: it knows nothing of the room."""
        child = self.embedding if who == EMBEDDING else self.languages[who]
        self._later(child.send(message, is_wanted=lambda: who in room.running))

    # ---- what the processes say --------------------------------------------------------------

    def _on_message(self, child: Child, message: ToLauncher) -> None:
        who = self._index(child)
        if who != EMBEDDING and isinstance(message, Ready | Ended):
            self._idle.add(who)
        if isinstance(message, Ready):
            self._later(self._notify_waiting())
            return
        if isinstance(message, Ended):
            self._later(self._notify_waiting())
        self._note(message.room, who, message)

    def _on_death(self, child: Child, how: str) -> None:
        who = self._index(child)
        self._idle.discard(who)
        for number, room in list(self._rooms.items()):
            if who in room.running:
                is_embedding = who == EMBEDDING
                self._note(
                    number, who, Refused(number, how, False) if is_embedding else Ended(number, how)
                )

    def _note(self, number: int, who: int, what: Said) -> None:
        room = self._rooms.get(number)
        if room is None or who not in room.running:
            return
        room.said.put_nowait((who, what))
        if isinstance(what, Refused):
            for reader in room.readers:
                self._send(reader, room, Withdraw(number, what.reason))
        if isinstance(what, Ended) and what.failure:
            self._send(EMBEDDING, room, Withdraw(number, what.failure))
        if isinstance(what, Sent | Refused | Ended):
            room.running.discard(who)
        if not room.running:
            del self._rooms[number]
            room.said.put_nowait(None)

    def _index(self, child: Child) -> int:
        return EMBEDDING if child is self.embedding else self.languages.index(child)

    async def _notify_waiting(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _later(self, what: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(what)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
