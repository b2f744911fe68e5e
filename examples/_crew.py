"""The launcher's side of the work: which child gets which request, and which is done.

Every language process has one request at a time; the embedding process may have one waiting for
each of them. What it does not do: start or end processes (_fleet.py), or compute (_sides.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import msgspec

from _fleet import Child, ChildDiedError, Fleet
from _photos import Photo
from _rows import Row
from _sides import READY, Answer, Answered, Encoded, Job, Way


class Crew:
    """One embedding process and some language processes at work."""

    def __init__(
        self, fleet: Fleet, embedding: Child, languages: list[Child], timeout: float
    ) -> None:
        self._fleet, self._embedding, self._languages = fleet, embedding, languages
        self._timeout = timeout
        self._idle = deque(range(len(languages)))
        self._jobs: dict[int, Job] = {}
        self._encoded: dict[int, Encoded] = {}
        self._answered: dict[int, Answered] = {}

    def wait_ready(self) -> Iterator[None]:
        """One step per child whose models are there."""
        waiting = {child.name for child in self._fleet.children}
        while waiting:
            for child, message in self._fleet.receive(self._timeout):
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
            self._hear()
            yield from self._finished(expected)

    def _begin(self, job: Job) -> None:
        self._jobs[job.room] = job
        message = msgspec.msgpack.encode(job)
        self._fleet.send(self._languages[job.reader], message)  # first: it has to ask
        self._fleet.send(self._embedding, message)

    def _hear(self) -> None:
        for child, message in self._fleet.receive(self._timeout):
            if child is self._embedding:
                encoded = msgspec.msgpack.decode(message, type=Encoded)
                self._encoded[encoded.room] = encoded
            else:
                answered = msgspec.msgpack.decode(message, type=Answered)
                self._answered[answered.room] = answered

    def _finished(self, expected: dict[Photo, Answer]) -> Iterator[Row]:
        """Both sides have said that they are done with it."""
        for room in self._encoded.keys() & self._answered.keys():
            job = self._jobs.pop(room)
            self._idle.append(job.reader)
            yield Row(job, self._encoded.pop(room), self._answered.pop(room), expected[job.photo])
