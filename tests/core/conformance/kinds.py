"""The kinds of pool. A new kind is one more entry; what it must do is in the tests beside.

What a kind must bring: `create` and `attach` (of the same pool in any process of the node), and a
way to bring its tensors to the CPU for comparing.
"""

from __future__ import annotations

from typing import Protocol

import torch

from shmblocks import BlockPool, PoolConfig


class Kind(Protocol):
    """How the tests make and reach one kind of pool."""

    name: str

    def create(self, name: str, config: PoolConfig) -> BlockPool: ...

    def attach(self, name: str) -> BlockPool: ...

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor: ...


class HostPool:
    """All fields in POSIX shared memory."""

    name = "host"

    def create(self, name: str, config: PoolConfig) -> BlockPool:
        return BlockPool.create(name, config, prefault="off")

    def attach(self, name: str) -> BlockPool:
        return BlockPool.attach(name, prefault="off")

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


KINDS: tuple[Kind, ...] = (HostPool(),)
