"""What several links share: a producer's own memory, names, and the shape of a message's ends.

Nothing in here is measured by itself.
"""

from __future__ import annotations

import mmap
import os
import secrets

import posix_ipc
import torch
from torch import Tensor


def unique_name(what: str) -> str:
    """A name in /dev/shm that no other run has.

    Who starts a run and wants to find what it leaves behind says how its names begin.
    """
    prefix = os.environ.get("SHMBLOCKS_BENCH_PREFIX", "shmblocks-bench")
    return f"{prefix}-{os.getpid()}-{secrets.token_hex(4)}-{what}"


class OwnBuffers:
    """The producer's private tensors, bf16 [tokens, hidden]: one of each size, kept."""

    def __init__(self, hidden: int) -> None:
        self._hidden = hidden
        self._tensors: dict[int, Tensor] = {}

    def get(self, tokens: int) -> Tensor:
        tensor = self._tensors.get(tokens)
        if tensor is None:
            tensor = torch.zeros(tokens, self._hidden, dtype=torch.bfloat16)
            self._tensors[tokens] = tensor
        return tensor


class Held:
    """An incoming message that is freed by dropping its tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor: Tensor | None = tensor

    @property
    def tensor(self) -> Tensor | None:
        return self._tensor

    def release(self) -> None:
        self._tensor = None


class Nothing:
    """Both ends of a message without data."""

    tensor = None
    payload = None

    def release(self) -> None:
        """There is nothing to give back."""


def map_faulted(size: int) -> mmap.mmap:
    """`size` bytes of POSIX shared memory, every page there. Unlinked: it ends with its mapping."""
    name = "/" + unique_name("memcpy")
    segment = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, size=size)
    try:
        mapping = mmap.mmap(segment.fd, size)
    finally:
        segment.close_fd()
        segment.unlink()
    torch.frombuffer(mapping, dtype=torch.uint8).zero_()
    return mapping
