"""Where fetched rows land: blocks of the own pool; of a CUDA pool, by way of pinned host memory.

    host pool    recv_into -> a reservation of the pool, which is published
    CUDA pool    recv_into -> a reservation of the pinned host pool
                 copies on torch's current stream -> a reservation of the CUDA pool
                 published in the order of that stream; the host blocks come back behind the copies

Nobody waits for the GPU: `publish` returns when the copies are enqueued, as any on a stream does.
"""

from __future__ import annotations

import time
from typing import Protocol

from shmblocks.handle import BlockHandle
from shmblocks.lease import Reservation
from shmblocks.nodes.rows import AUX, require_host_pool
from shmblocks.pool import BlockPool


class Landing(Protocol):
    """Blocks to receive into, and to publish then. Frees what was not published."""

    @property
    def handle(self) -> BlockHandle: ...

    def memory(self, name: str) -> memoryview: ...

    def publish(
        self, *, readers: int = 1, key: bytes | None = None, hold: float = 0.0
    ) -> BlockHandle: ...

    def __enter__(self) -> Landing: ...

    def __exit__(self, *_: object) -> None: ...


class GpuLanding:
    """One reservation in pinned host memory, and one of the same length in CUDA memory."""

    def __init__(self, host: Reservation, host_pool: BlockPool, gpu: Reservation) -> None:
        """Takes both reservations over."""
        self._host = host
        self._host_pool = host_pool
        self._gpu = gpu

    @property
    def handle(self) -> BlockHandle:
        """Of the CUDA pool."""
        return self._gpu.handle

    @property
    def host(self) -> Reservation:
        """Where the rows land first; it ends with this."""
        return self._host

    def memory(self, name: str) -> memoryview:
        """The rows in host memory: what a socket can write."""
        return self._host.memory(name)

    def publish(
        self, *, readers: int = 1, key: bytes | None = None, hold: float = 0.0
    ) -> BlockHandle:
        """Enqueue the copies, and publish behind them, on torch's current stream."""
        self._gpu.memory(AUX)[:] = self._host.memory(AUX)
        # Whatever comes of this: the host blocks are free when the stream has read them.
        order = self._host_pool.streams.order(None)
        try:
            for name in self._gpu:
                self._gpu[name].copy_(self._host[name], non_blocking=True)
            return self._gpu.publish(readers=readers, key=key, hold=hold)
        finally:
            self._host_pool.streams.free_behind(order, self._host.handle)
            self._host.note_published()

    def __enter__(self) -> GpuLanding:
        return self

    def __exit__(self, *_: object) -> None:
        self._host.free()
        if not self._gpu.is_over:
            # Not written on any stream: at once.
            self._gpu.free()


def landed(landing: Landing) -> Landing | Reservation:
    """The blocks that rows are received into: in host memory."""
    return landing.host if isinstance(landing, GpuLanding) else landing


class Landings:
    """Reserves where rows are to land."""

    def __init__(self, pool: BlockPool, host: BlockPool | None) -> None:
        """`host`: a pool in host memory with the same fields, for a pool on a GPU; it is pinned."""
        if not pool.config.is_on_gpu or host is None:
            require_host_pool(pool)
        elif (host.config.fields, host.config.block_size) != (
            pool.config.fields,
            pool.config.block_size,
        ):
            raise ValueError(
                f"host: expected the fields and the block_size of {pool.name}, {host.name} has "
                "others: create it with msgspec.structs.replace(pool.config, device='cpu', "
                "total_tokens=...)"
            )
        else:
            require_host_pool(host).pin()
        self._pool = pool
        self._host = host if pool.config.is_on_gpu else None

    @property
    def host_pool(self) -> BlockPool:
        """The pool that rows are received into."""
        return self._pool if self._host is None else self._host

    @property
    def is_on_gpu(self) -> bool:
        """Whether rows go on to a GPU."""
        return self._host is not None

    def reserve(self, num_tokens: int, req_id: str | None, timeout: float | None) -> Landing:
        """Wait for blocks, in the pools' wait queues; `timeout` bounds both waits."""
        if self._host is None:
            return self._pool.reserve(num_tokens, req_id=req_id, timeout=timeout)
        began = time.monotonic()
        host = self._host.reserve(num_tokens, req_id=req_id, timeout=timeout)
        try:
            left = None if timeout is None else max(0.0, began + timeout - time.monotonic())
            gpu = self._pool.reserve(num_tokens, req_id=req_id, timeout=left)
        except BaseException:
            host.free()
            raise
        return GpuLanding(host, self._host, gpu)

    async def reserve_async(
        self, num_tokens: int, req_id: str | None, timeout: float | None
    ) -> Landing:
        """`reserve` for asyncio."""
        if self._host is None:
            return await self._pool.reserve_async(num_tokens, req_id=req_id, timeout=timeout)
        began = time.monotonic()
        host = await self._host.reserve_async(num_tokens, req_id=req_id, timeout=timeout)
        try:
            left = None if timeout is None else max(0.0, began + timeout - time.monotonic())
            gpu = await self._pool.reserve_async(num_tokens, req_id=req_id, timeout=left)
        except BaseException:
            host.free()
            raise
        return GpuLanding(host, self._host, gpu)

    def reserve_now(self, num_tokens: int, req_id: str | None) -> Landing | None:
        """Blocks that are free or can be evicted now; None: there are not enough."""
        if self._host is None:
            return self._pool.reserve_now(num_tokens, req_id=req_id)
        if self._host.config.blocks_for(num_tokens) > self._host.config.total_blocks:
            return None
        host = self._host.reserve_now(num_tokens, req_id=req_id)
        if host is None:
            return None
        try:
            gpu = self._pool.reserve_now(num_tokens, req_id=req_id)
        except BaseException:
            host.free()
            raise
        if gpu is None:
            host.free()
            return None
        return GpuLanding(host, self._host, gpu)
