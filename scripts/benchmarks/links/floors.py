"""The floors: what no handoff of this kind can beat on this machine.

- *memcpy*: the payload copied once (`Tensor.copy_`) into shared memory whose pages are all there.
  The destination moves on through a region as large as the pools of the other links, as next fit
  moves through a pool, so it is no warmer in the caches than theirs.
- *wake*: a process asleep in the kernel is woken by another one, with one byte through a pipe, or
  with a POSIX semaphore (a futex). One way, from before the waker's call to after the sleeper's,
  by the clock that both share.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from multiprocessing.connection import Connection

import posix_ipc
import torch
from torch import Tensor

from benchmarks.link import Context, Ends
from benchmarks.links.buffers import Nothing, OwnBuffers, map_faulted, unique_name
from benchmarks.payload import Pattern
from benchmarks.pingpong import elapsed, touch
from benchmarks.results import Sample
from benchmarks.settings import REHEARSAL_TOKENS, Settings

# --- memcpy -----------------------------------------------------------------------------------


class Memcpy:
    """Copies and times itself; there is no other process."""

    def __init__(self, settings: Settings) -> None:
        self._pattern = Pattern(settings.hidden, settings.seed)
        self._own = OwnBuffers(settings.hidden)
        self._rehearsals = settings.rehearsals
        self._number = 0
        tokens = 2 * settings.most_tokens + REHEARSAL_TOKENS
        mapping = map_faulted(settings.payload_bytes(tokens))
        values = torch.frombuffer(mapping, dtype=torch.bfloat16)
        self._region = values.view(tokens, settings.hidden)
        self._cursor = 0

    def measure(self, size: int, count: int) -> list[Sample]:
        return [self._message(size) for _ in range(count)]

    def close(self) -> None:
        """The region ends with the process: it has no name."""

    def _message(self, tokens: int) -> Sample:
        self._number += 1
        source = self._own.get(tokens)
        self._pattern.fill(source, self._number)
        for _ in range(self._rehearsals):
            self._copy(self._own.get(REHEARSAL_TOKENS), self._next(REHEARSAL_TOKENS))
        destination = self._next(tokens)
        took = elapsed(partial(self._copy, source, destination))
        self._pattern.check(destination, self._number, tokens)
        return Sample(took)

    def _copy(self, source: Tensor, destination: Tensor) -> None:
        destination.copy_(source)
        touch(destination)

    def _next(self, tokens: int) -> Tensor:
        if self._cursor + tokens > len(self._region):
            self._cursor = 0
        self._cursor += tokens
        return self._region[self._cursor - tokens : self._cursor]


def prepare_memcpy(settings: Settings) -> Callable[[], Memcpy]:
    return partial(Memcpy, settings)


# --- wake through a pipe ----------------------------------------------------------------------


class PipeWaker(Nothing):
    def __init__(self, end: Connection) -> None:
        self._end = end

    def begin(self, tokens: int) -> PipeWaker:
        return self

    def send(self) -> None:
        os.write(self._end.fileno(), b"!")

    def close(self) -> None:
        self._end.close()


class PipeSleeper(Nothing):
    def __init__(self, end: Connection) -> None:
        self._end = end

    def receive(self) -> PipeSleeper:
        os.read(self._end.fileno(), 1)
        return self

    def close(self) -> None:
        self._end.close()


@contextmanager
def connect_pipe(context: Context, settings: Settings) -> Iterator[Ends]:
    read, write = context.Pipe(duplex=False)
    with closing(read), closing(write):
        yield Ends(partial(PipeWaker, write), partial(PipeSleeper, read))


# --- wake with a semaphore --------------------------------------------------------------------


class SemaphoreWaker(Nothing):
    def __init__(self, name: str) -> None:
        self._semaphore = posix_ipc.Semaphore(name)

    def begin(self, tokens: int) -> SemaphoreWaker:
        return self

    def send(self) -> None:
        self._semaphore.release()

    def close(self) -> None:
        self._semaphore.close()


class SemaphoreSleeper(Nothing):
    def __init__(self, name: str) -> None:
        self._semaphore = posix_ipc.Semaphore(name)

    def receive(self) -> SemaphoreSleeper:
        self._semaphore.acquire()
        return self

    def close(self) -> None:
        self._semaphore.close()


@contextmanager
def connect_semaphore(context: Context, settings: Settings) -> Iterator[Ends]:
    name = "/" + unique_name("wake")
    semaphore = posix_ipc.Semaphore(name, posix_ipc.O_CREX)
    try:
        yield Ends(partial(SemaphoreWaker, name), partial(SemaphoreSleeper, name))
    finally:
        semaphore.unlink()  # before it is closed: it cannot be named afterwards
        semaphore.close()
