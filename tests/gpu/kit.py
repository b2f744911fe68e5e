"""Pools in CUDA memory and pinned ones, patterns, and the other side of a handoff."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import cast

import torch

from shmblocks import BlockHandle, BlockPool, Field, PoolConfig
from shmblocks import lease as lease_module
from shmblocks._state.blocks import LeaseKey
from shmblocks._state.pool_state import PoolState
from shmblocks.cuda.use import GpuUse, Order
from tests.support.children import Channel

WIDTH = 1024
TOKENS = 64
BLOCK_SIZE = 16
# As many handles may be on their way as the pool has room for: each allocation waits for the reader
# of the one that had its blocks before.
ROOM = 8
LONGEST_NAP_CYCLES = 60_000
# Some 2 ms: longer than a writer sleeps between two polls for blocks, so that what was given back
# too early is overwritten while the reader naps.
SLOW_READER_CYCLES = 4_000_000
# Now and then the producer is late by some 20 ms: longer than a GPU that is shared by two
# processes stays with one of them, so that a reader that does not wait comes first.
LATE_EVERY = 16
LATE_CYCLES = 40_000_000


def config(allocations: int = ROOM, **more: int) -> PoolConfig:
    return PoolConfig(
        total_tokens=allocations * TOKENS,
        fields=(Field("rows", (WIDTH,), "int32"),),
        block_size=BLOCK_SIZE,
        **more,  # type: ignore[arg-type]
    )


def create(name: str, device: str = "cuda:0", allocations: int = ROOM) -> BlockPool:
    """`cpu` gives a pinned pool in host memory."""
    pool = BlockPool.create(name, config(allocations), prefault="off", device=device)
    if device == "cpu":
        pool.pin()
    return pool


def nap(cycles: int) -> None:
    """Keep the current stream busy for so many clock cycles."""
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]


def write_on_stream(pool: BlockPool, seed: int, source: torch.Tensor, readers: int = 1) -> bytes:
    """Late: the stream naps between the publishing and the writing of the data."""
    stream = torch.cuda.current_stream()
    handle = pool.alloc(TOKENS, timeout=60)
    assert handle is not None
    nap(LATE_CYCLES if seed % LATE_EVERY == 0 else seed * 7919 % LONGEST_NAP_CYCLES)
    source.fill_(seed)
    pool.view(handle)["rows"].copy_(source, non_blocking=True)
    return pool.publish(handle, readers=readers, stream=stream).encode()


class Reader:
    """Counts, on the GPU and without waiting for it, what is not as it was published."""

    def __init__(self, pool: BlockPool, nap_cycles: int = LONGEST_NAP_CYCLES) -> None:
        """`nap_cycles`: how long it naps between its two reads, at most."""
        self.pool = pool
        self.nap_cycles = nap_cycles
        self.wrong = torch.zeros((), dtype=torch.int64, device="cuda")

    def read(self, data: bytes, seed: int) -> None:
        stream = torch.cuda.current_stream()
        with self.pool.open(BlockHandle.decode(data), stream=stream) as lease:
            rows = lease.view["rows"].to("cuda", non_blocking=True)
            self.wrong += (rows != seed).sum()
            nap(seed * 104729 % self.nap_cycles)
            # Again, late: what was given to the next one too early shows here.
            self.wrong += (lease.view["rows"].to("cuda", non_blocking=True) != seed).sum()

    def verdict(self) -> int:
        return int(self.wrong.item())


@contextlib.contextmanager
def broken(how: str) -> Iterator[None]:
    """Leave out a part of the order, to see that the tests would see it."""
    undo: list[Callable[[], None]] = []
    if how == "no wait":
        wait = Order.wait
        Order.wait = lambda self, word, value: None  # type: ignore[method-assign]
        undo.append(lambda: setattr(Order, "wait", wait))
    elif how == "early release":
        end = lease_module._end

        def at_once(state: PoolState, key: LeaseKey, order: object) -> None:
            state.release(key)

        lease_module._end = at_once
        undo.append(lambda: setattr(lease_module, "_end", end))
    try:
        yield
    finally:
        for each in undo:
            each()


def read_many(channel: Channel, name: str, count: int, how: str, pinned: bool) -> int:
    """A reader in a process of its own; how many elements were wrong."""
    with broken(how), BlockPool.attach(name, prefault="off", role="reader") as pool:
        if pinned:
            pool.pin()
        reader = Reader(pool, SLOW_READER_CYCLES if how == "early release" else LONGEST_NAP_CYCLES)
        torch.cuda.synchronize()
        channel.say("ready")
        for _ in range(count):
            data, seed = cast("tuple[bytes, int]", channel.receive(120))
            reader.read(data, seed)
        verdict = reader.verdict()
        torch.cuda.synchronize()
    return verdict


def ipc_opens(pool: BlockPool) -> int:
    use = pool.state.device_use
    assert isinstance(use, GpuUse)
    opens: int = use.gpu.ipc_opens  # type: ignore[attr-defined]
    return opens
