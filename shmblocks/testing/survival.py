"""What must be true of a pool after somebody died: one assertion, and what it needs.

    kept = remember(pool, handle)          # the bytes of a published allocation
    ... somebody dies ...
    assert_survives(pool, kept)

`assert_survives` says, in this order:

1. the survivor's next operation succeeds, within a second;
2. `check()` finds no violation;
3. what was remembered is published still, bit for bit;
4. after `reap()` every block is free, or held by somebody who lives, or published and awaited;
5. nobody dead is left, and `check()` is clean again.

It raises AssertionError, works under `python -O`, and needs no torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NamedTuple

from shmblocks._os.segment import path_of
from shmblocks._state.info import AllocationInfo
from shmblocks._state.layout import AUX_BYTES
from shmblocks._state.states import State
from shmblocks.handle import BlockHandle
from shmblocks.pool import BlockPool

AUX = "aux"


class TooSlowError(AssertionError):
    """Something that must come back soon did not."""


class Remembered(NamedTuple):
    """The content of an allocation at one moment, by field."""

    handle: BlockHandle
    content: dict[str, bytes]


def field_bytes(pool: BlockPool, handle: BlockHandle, name: str) -> memoryview:
    """The memory of a field (or `"aux"`) of an allocation, writable, whatever its state.

    It borrows the pool's memory: let go of it before the pool is closed.
    """
    state = pool.state
    if name == AUX:
        start, size = state.layout.aux + handle.start_block * AUX_BYTES, AUX_BYTES
    else:
        field = {field.name: field for field in pool.config.fields}[name]
        first = handle.start_block * pool.config.block_size
        start = state.layout.fields[name] + first * field.token_bytes
        size = handle.num_tokens * field.token_bytes
    return state.segment.memory[start : start + size]


def remember(pool: BlockPool, handle: BlockHandle) -> Remembered:
    """A copy of everything in an allocation."""
    names = [AUX, *(field.name for field in pool.config.fields)]
    return Remembered(handle, {name: bytes(field_bytes(pool, handle, name)) for name in names})


@contextlib.contextmanager
def within(seconds: float, what: str) -> Iterator[None]:
    """The block ends within so many seconds, or is interrupted by `TooSlowError`.

    Not counted is time in which this thread could have run and the machine ran others: what must
    not take long is waiting for somebody, and tests share their machine.

    Interrupted by SIGALRM, which only the main thread can have; in another thread it is told after
    the block has ended.
    """
    complaint = TooSlowError(f"{what}: not over within {seconds:g} s")
    start = _own_time()
    if threading.current_thread() is not threading.main_thread():
        yield
        if _own_time() - start > seconds:
            raise complaint
        return

    def on_alarm(_: int, __: FrameType | None) -> None:
        left = start + seconds - _own_time()
        if left <= 0:
            raise complaint
        signal.setitimer(signal.ITIMER_REAL, left)

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _own_time() -> float:
    """Seconds on a clock that stands still while this thread waits for a processor."""
    try:
        with open("/proc/thread-self/schedstat", "rb") as file:
            waited_ns = int(file.read().split()[1])
    except (FileNotFoundError, IndexError):  # a kernel without it counts everything
        waited_ns = 0
    return time.monotonic() - waited_ns / 1e9


def assert_survives(pool: BlockPool, *published: Remembered, seconds: float = 1.0) -> None:
    """A survivor's view of a pool after a death; see the top of this file.

    `published` must still be published, with the same content. What this process holds is left to
    it; what the dead held is reaped.
    """
    with within(seconds, "the survivor's next operation"):
        _use(pool)
    assert_clean(pool, "after the death")
    for remembered in published:
        assert_unchanged(pool, remembered)
    pool.reap()
    assert_accounted_for(pool)
    assert_clean(pool, "after reap")


def _use(pool: BlockPool) -> None:
    """Take and give back a block, if there is one."""
    handle = pool.alloc(1)
    if handle is not None:
        pool.free(handle)


def assert_clean(pool: BlockPool, when: str) -> None:
    """`check()` finds nothing."""
    violations = pool.check()
    if violations:
        raise AssertionError(f"{when}: " + "; ".join(map(str, violations)))


def assert_unchanged(pool: BlockPool, remembered: Remembered) -> None:
    """The allocation is there, published, and holds what it held."""
    handle = remembered.handle
    found = {info.generation: info for info in pool.allocations()}.get(handle.generation)
    if found is None or found.state not in (State.PUBLISHED, State.LEASED):
        raise AssertionError(f"{handle} was published, now it is {found}")
    now = remember(pool, handle)
    changed = [name for name, data in now.content.items() if data != remembered.content[name]]
    if changed or (found.start_block, found.num_tokens) != (handle.start_block, handle.num_tokens):
        raise AssertionError(f"{handle} is published, but {changed or 'its place'} changed")


def assert_accounted_for(pool: BlockPool) -> None:
    """Every block is free, or somebody who lives (or a deadline) will give it back."""
    stats = pool.stats()
    held = pool.allocations()
    blocks = stats.free_blocks + sum(info.num_blocks for info in held)
    if blocks != stats.total_blocks:
        raise AssertionError(f"{blocks} of {stats.total_blocks} blocks are accounted for: {stats}")
    if stats.dead_participants:
        raise AssertionError(f"{stats.dead_participants} dead participants are left: {stats}")
    for info in held:
        if not _will_end(info):
            raise AssertionError(f"nobody will give back {info}")


def _will_end(info: AllocationInfo) -> bool:
    if not all(lease.holder is not None and lease.holder.is_alive for lease in info.leases):
        return False
    if info.state is State.RESERVED:
        return info.owner is not None and info.owner.is_alive
    if info.state is State.PUBLISHED:
        return info.readers_left > 0
    return bool(info.leases)


def assert_nothing_left(name: str) -> None:
    """No segment of that name is there."""
    if os.path.exists(path_of(name)):
        raise AssertionError(f"{path_of(name)} is still there")
