"""The launcher's part of the work: which worker gets which request, and which is done.

Every language process has one request at a time; the embedding process may have one waiting for
each of them.

What is not here: starting and ending processes (_children.py), or the models (_processes.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import msgspec

from _children import Child, ChildDiedError, Children
from _photos import Photo
from _processes import READY, Answer, Answered, Encoded, Job, Way
from _rows import Row


class Workers:
    """One embedding process and some language processes, and what each is working on."""

    def __init__(
        self, children: Children, embedding: Child, languages: list[Child], timeout: float
    ) -> None:
        self._children, self._embedding, self._languages = children, embedding, languages
        self._timeout = timeout
        self._idle = deque(range(len(languages)))
        self._jobs: dict[int, Job] = {}
        self._encoded: dict[int, Encoded] = {}
        self._answered: dict[int, Answered] = {}

    def wait_ready(self) -> Iterator[None]:
        """One step per child whose models are there."""
        waiting = {child.name for child in self._children.all}
        while waiting:
            for child, message in self._children.receive(self._timeout):
                if message != READY:
                    raise ChildDiedError(f"{child.name}: expected {READY!r}, got {message!r}")
                waiting.discard(child.name)
                yield

    def serve(self, work: list[tuple[Photo, Way]], expected: dict[Photo, Answer]) -> Iterator[Row]:
        """Have it all done, and yield each request as it is finished, in whatever order."""
        waiting = deque(enumerate(work))
        while waiting or self._jobs:
            while waiting and self._idle:
                room, (photo, way) = waiting.popleft()
                self._begin(Job(room, photo, way, self._idle.popleft()))
            self._receive()
            yield from self._finished(expected)

    def _begin(self, job: Job) -> None:
        self._jobs[job.room] = job
        message = msgspec.msgpack.encode(job)
        self._children.send(self._languages[job.reader], message)  # first: it has to ask
        self._children.send(self._embedding, message)

    def _receive(self) -> None:
        for child, message in self._children.receive(self._timeout):
            if child is self._embedding:
                encoded = msgspec.msgpack.decode(message, type=Encoded)
                self._encoded[encoded.room] = encoded
            else:
                answered = msgspec.msgpack.decode(message, type=Answered)
                self._answered[answered.room] = answered

    def _finished(self, expected: dict[Photo, Answer]) -> Iterator[Row]:
        """The requests that both processes are done with."""
        for room in self._encoded.keys() & self._answered.keys():
            job = self._jobs.pop(room)
            self._idle.append(job.reader)
            yield Row(job, self._encoded.pop(room), self._answered.pop(room), expected[job.photo])
