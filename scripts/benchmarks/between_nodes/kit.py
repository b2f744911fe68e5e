"""What all transports have: payloads, pools, and two halves, each in a process of its own."""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import Protocol

from shmblocks import BlockPool, PoolConfig, multimodal_fields

HIDDEN = 3584
BLOCK = 128
KEY = b"the key of a benchmark on one machine"
LOOPBACK = "127.0.0.1"


class NotHereError(Exception):
    """The transport cannot be measured on this machine; the text says why."""


class Source(Protocol):
    """The half that has the payload."""

    @property
    def told(self) -> object:
        """What the reader needs to know of it; travels by a pipe."""

    def prepare(self, tokens: int) -> object:
        """Before the clock runs: what the reader needs for its next payload."""


class Reader(Protocol):
    """The half that brings it into its own pool."""

    def carry(self, tokens: int, prepared: object) -> None:
        """One payload, from the first call to the last byte in the own blocks, and free again."""


class Half(Protocol):
    """Makes one half, in its own process; what it opens is closed with the stack."""

    def __call__(
        self, stack: contextlib.ExitStack, name: str, most: int, told: object, /
    ) -> Source | Reader: ...


def config(most: int) -> PoolConfig:
    """A pool for payloads of at most so many tokens."""
    blocks = -(-most // BLOCK) + 1
    return PoolConfig(
        total_tokens=blocks * BLOCK, fields=multimodal_fields(HIDDEN), block_size=BLOCK
    )


def size_of(tokens: int) -> int:
    return tokens * config(1).token_bytes


def own_pool(stack: contextlib.ExitStack, name: str, most: int) -> BlockPool:
    """The pool of a half; each page of it is mapped."""
    return stack.enter_context(BlockPool.create(name, config(most), prefault="now"))


class Along:
    """Parts of a memory, one behind the other, and from its start again."""

    def __init__(self, most: int) -> None:
        """So many tokens, in mapped pages that say something."""
        size = size_of(most)
        self._mapping = mmap.mmap(-1, size)
        self._mapping.write((os.urandom(1 << 20) * ((size >> 20) + 1))[:size])
        self._memory = memoryview(self._mapping)
        self._at = 0

    def next(self, count: int) -> memoryview:
        """The next part of so many bytes."""
        if self._at + count > len(self._memory):
            self._at = 0
        start, self._at = self._at, self._at + count
        return self._memory[start : self._at]


class Nothing:
    """A source that is asked for nothing."""

    told: object = None

    def prepare(self, tokens: int) -> object:
        return None
