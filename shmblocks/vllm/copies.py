"""Moves items between an engine's tensors and the pool, on a CPU; with streams: `cuda.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from shmblocks.cache import CacheLease, TensorCache

if TYPE_CHECKING:
    import torch


class Copies(Protocol):
    """How a worker moves items."""

    def load(self, lease: CacheLease) -> torch.Tensor:
        """A copy of the item for the engine, usable after `join`; ends the lease."""
        ...

    def join(self) -> None:
        """What the engine does from now on may use what was loaded."""
        ...

    def adopt(self, ticket: bytes) -> CacheLease:
        """The lease of a ticket, as `load` takes it."""
        ...

    def save(self, key: bytes, tensor: torch.Tensor) -> bool:
        """Put an engine's tensor into the pool under a key; False: it was not stored."""
        ...


class HostCopies:
    """Copies that are over when the call returns. Borrows the cache."""

    def __init__(self, cache: TensorCache) -> None:
        self._cache = cache

    def adopt(self, ticket: bytes) -> CacheLease:
        return self._cache.adopt(ticket)

    def load(self, lease: CacheLease) -> torch.Tensor:
        # Its pages are touched here for the first time, which costs several times the copy. Large
        # pages (MADV_HUGEPAGE) were tried: 3 to 4 times faster, but for one load of 57 MB that took
        # ten seconds, on a busy machine with little memory in one piece.
        with lease:
            return lease.tensor.clone()

    def join(self) -> None:
        """Nothing is under way."""

    def save(self, key: bytes, tensor: torch.Tensor) -> bool:
        return self._cache.put(key, tensor.detach())
