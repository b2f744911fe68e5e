"""The baselines: what no handoff of this kind can beat on this machine.

- *memcpy*: the payload copied once (`Tensor.copy_`) into shared memory whose pages are all there.
  The destination moves on through a region as large as the pools of the other transports, as next
  fit moves through a pool, so it is no warmer in the caches than theirs.
- *spin*: two processes that are awake, with one tensor each over the same shared memory; the
  consumer spins on a word that the producer writes. What hands out tensors cannot do less.
- *sleep*: the same, but the consumer sleeps in the kernel until a POSIX semaphore wakes it.
- *wake*: a process asleep in the kernel is woken by another one, with one byte through a pipe, or
  with a POSIX semaphore (a futex). One way, from before the waker's call to after the sleeper's,
  by the clock that both share.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from multiprocessing.connection import Connection

import posix_ipc
import torch
from torch import Tensor

from benchmarks.payload import Pattern
from benchmarks.pingpong import elapsed, touch
from benchmarks.report import Sample
from benchmarks.settings import REHEARSAL_TOKENS, Settings
from benchmarks.transport import (
    Context,
    Ends,
    Incoming,
    Outgoing,
    OwnBuffers,
    Receiver,
    Sender,
    unique_name,
)


class Memcpy:
    """Copies and times itself; there is no other process."""

    def __init__(self, settings: Settings) -> None:
        self._pattern = Pattern(settings.hidden, settings.seed)
        self._own = OwnBuffers(settings.hidden)
        self._rehearsals = settings.rehearsals
        self._number = 0
        tokens = settings.depth * settings.most_tokens + REHEARSAL_TOKENS
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


def map_faulted(size: int) -> mmap.mmap:
    """`size` bytes of POSIX shared memory, every page there. Unlinked: it ends with its mapping."""
    segment = posix_ipc.SharedMemory("/" + unique_name("memcpy"), posix_ipc.O_CREX, size=size)
    try:
        mapping = mmap.mmap(segment.fd, size)
    finally:
        segment.close_fd()
        segment.unlink()
    torch.frombuffer(mapping, dtype=torch.uint8).zero_()
    return mapping


# --- awake or asleep, with tensors and nothing else --------------------------------------------


# Bytes in front of the data: word 0 counts messages; then, for each message of the last few, where
# it begins and how many tokens it has.
_WORDS = 4096
_MESSAGES = 200
# Looks at the word between two moments at which the processor is offered to others.
_LOOKS = 64


def _open(name: str) -> tuple[memoryview, mmap.mmap]:
    segment = posix_ipc.SharedMemory(name)
    try:
        mapping = mmap.mmap(segment.fd, segment.size)
    finally:
        segment.close_fd()
    return memoryview(mapping)[:_WORDS].cast("Q"), mapping


def _rows(mapping: mmap.mmap, hidden: int) -> Callable[[int, int], Tensor]:
    whole = torch.frombuffer(mapping, dtype=torch.bfloat16, offset=_WORDS).view(-1, hidden)
    return lambda first, tokens: whole[first : first + tokens]


def _nothing() -> None:
    """Whoever spins needs no wake."""


def tensor_sender(name: str, hidden: int, total: int, asleep: bool) -> Sender:
    words, mapping = _open(name)
    rows = _rows(mapping, hidden)
    wake = posix_ipc.Semaphore(name).release if asleep else _nothing
    cursor = 0

    def send(first: int, tokens: int) -> None:
        at = 1 + words[0] % _MESSAGES * 2
        words[at], words[at + 1] = first, tokens
        words[0] += 1
        wake()

    def begin(tokens: int) -> Outgoing:
        nonlocal cursor
        first = 0 if cursor + tokens > total else cursor
        cursor = first + tokens
        return Outgoing(rows(first, tokens), partial(send, first, tokens))

    return Sender(begin, words.release)


def _spin(words: memoryview, seen: int) -> None:
    while True:
        for _ in range(_LOOKS):
            if words[0] != seen:
                return
        os.sched_yield()


def tensor_receiver(name: str, hidden: int, asleep: bool) -> Receiver:
    words, mapping = _open(name)
    rows = _rows(mapping, hidden)
    sleep = posix_ipc.Semaphore(name).acquire if asleep else None
    seen = 0

    def receive() -> Incoming:
        nonlocal seen
        if sleep is None:
            _spin(words, seen)
        else:
            sleep()
        at = 1 + seen % _MESSAGES * 2
        seen += 1
        return Incoming(rows(words[at], words[at + 1]))

    return Receiver(receive, words.release)


@contextmanager
def connect_tensors(asleep: bool, context: Context, settings: Settings) -> Iterator[Ends]:
    name = "/" + unique_name("tensors")
    total = settings.depth * settings.most_tokens + 8 * REHEARSAL_TOKENS
    size = _WORDS + settings.payload_bytes(total)
    segment = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, size=size)
    segment.close_fd()
    try:
        with _semaphore(name):
            yield Ends(
                partial(tensor_sender, name, settings.hidden, total, asleep),
                partial(tensor_receiver, name, settings.hidden, asleep),
            )
    finally:
        posix_ipc.unlink_shared_memory(name)


@contextmanager
def _semaphore(name: str) -> Iterator[None]:
    semaphore = posix_ipc.Semaphore(name, posix_ipc.O_CREX)
    try:
        yield
    finally:
        semaphore.unlink()  # before it is closed: it cannot be named afterwards
        semaphore.close()


# --- a bare wake: messages without data -------------------------------------------------------


def waker(wake: Callable[[], object], close: Callable[[], None]) -> Sender:
    message = Outgoing(None, wake)
    return Sender(lambda tokens: message, close)


def sleeper(sleep: Callable[[], object], close: Callable[[], None]) -> Receiver:
    message = Incoming(None)

    def receive() -> Incoming:
        sleep()
        return message

    return Receiver(receive, close)


def pipe_waker(end: Connection) -> Sender:
    return waker(partial(os.write, end.fileno(), b"!"), end.close)


def pipe_sleeper(end: Connection) -> Receiver:
    return sleeper(partial(os.read, end.fileno(), 1), end.close)


@contextmanager
def connect_pipe(context: Context, settings: Settings) -> Iterator[Ends]:
    read, write = context.Pipe(duplex=False)
    with closing(read), closing(write):
        yield Ends(partial(pipe_waker, write), partial(pipe_sleeper, read))


def semaphore_waker(name: str) -> Sender:
    semaphore = posix_ipc.Semaphore(name)
    return waker(semaphore.release, semaphore.close)


def semaphore_sleeper(name: str) -> Receiver:
    semaphore = posix_ipc.Semaphore(name)
    return sleeper(semaphore.acquire, semaphore.close)


@contextmanager
def connect_semaphore(context: Context, settings: Settings) -> Iterator[Ends]:
    name = "/" + unique_name("wake")
    with _semaphore(name):
        yield Ends(partial(semaphore_waker, name), partial(semaphore_sleeper, name))
