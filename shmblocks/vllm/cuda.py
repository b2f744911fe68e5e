"""Copies between an engine's CUDA tensors and the pool, on streams of their own.

    save   the saving stream waits for the engine's stream, copies, and publishes in its order
    load   the loading stream copies, and releases in its order; the engine's stream waits for it

Contract
- No call waits for the GPU. What is saved is a hit for others as soon as its stream got there.
- The engine may free or reuse its tensors at once: the allocator keeps their memory until the copy
  is over (`record_stream`).
- A pool in host memory is pinned here, once; that what the machine refuses is told at start.

vLLM's model runners call from one thread, with their own stream as torch's current one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from shmblocks.cache import CacheLease, TensorCache

if TYPE_CHECKING:
    from shmblocks.cuda.use import Stream


class CudaCopies:
    """Copies on two streams of torch's current device. Borrows the cache."""

    def __init__(self, cache: TensorCache) -> None:
        self._cache = cache
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._loading = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._saving = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._is_loading = False
        if not cache.pool.config.is_on_gpu:
            cache.pool.pin()

    def adopt(self, ticket: bytes) -> CacheLease:
        with torch.cuda.stream(self._loading):
            return self._cache.adopt(ticket)

    def load(self, lease: CacheLease) -> torch.Tensor:
        # The memory is the loading stream's until the engine's stream, which uses it, is done.
        engine = torch.cuda.current_stream(self._device)
        stream: Stream = self._loading
        try:
            with torch.cuda.stream(self._loading):
                found = torch.empty(lease.shape, dtype=lease.dtype, device=self._device)
                found.copy_(lease.tensor, non_blocking=True)
            found.record_stream(engine)
        finally:
            lease.release(stream)
        self._is_loading = True
        return found

    def join(self) -> None:
        if self._is_loading:
            torch.cuda.current_stream(self._device).wait_stream(self._loading)
            self._is_loading = False

    def save(self, key: bytes, tensor: torch.Tensor) -> bool:
        tensor = tensor.detach()
        self._saving.wait_stream(torch.cuda.current_stream(self._device))
        tensor.record_stream(self._saving)
        return self._cache.put(key, tensor, stream=self._saving)
