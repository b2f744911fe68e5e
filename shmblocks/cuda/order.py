"""What a pool does on CUDA streams, and how a CPU waits for what streams are to do.

    publish   the record says published; then the stream writes the ready word     (`make_ready`)
    open      the reader's stream waits for the ready word, or else the CPU does   (`wait_ready`)
    free      the record says settling; then the stream writes the ready word      (`free_behind`)

Contract
- Nothing here is used by a pool in host memory to which no stream is given.
- `order` begins this process's use of the GPU with the pool; `begun` is it, once it has begun.
- A wait of the CPU ends: with the word, with the producer's death, or with `PoolTimeoutError`.

What it does not do: decide what is allocated, published or leased (`_state/blocks.py`).
"""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING

from shmblocks._state.pool_state import DEAD_PATIENCE, PoolState
from shmblocks.errors import CudaUnavailableError, PeerDiedError, PoolTimeoutError
from shmblocks.handle import BlockHandle

if TYPE_CHECKING:
    from shmblocks.cuda.use import GpuUse, Order, Stream

# Seconds between two polls of a CPU for a word that a stream is to write. Shorter: more polls of
# 10 us. Longer: the CPU goes on later than it could.
STREAM_POLL = 100e-6


class StreamOrder:
    """The stream part of one pool in one process; borrows the state."""

    def __init__(self, state: PoolState) -> None:
        self._state = state
        self.begun: GpuUse | None = None

    # ---- the GPU -----------------------------------------------------------------------------

    def use(self) -> GpuUse:
        """This process's use of the GPU with this pool; the first call begins it."""
        use = self.begun
        if use is None or self._state.device_use is not use:
            from shmblocks.cuda.use import GpuUse

            self._state.take_part()  # in a forked child: as a participant of its own
            self.begun = use = GpuUse.start(self._state)
        return use

    def end(self) -> None:
        """After the state was left."""
        self.begun = None

    @property
    def pinned_bytes(self) -> int:
        """How many bytes of the segment this process has registered with CUDA."""
        return 0 if self.begun is None else self.begun.pinned_bytes

    def open_if_cuda_runs(self) -> None:
        """Open CUDA memory now where CUDA is in use already, so that no request pays for it."""
        torch = sys.modules.get("torch")
        if self._state.config.is_on_gpu and torch is not None and torch.cuda.is_initialized():
            # What is wrong is told by the first view.
            with contextlib.suppress(CudaUnavailableError, PeerDiedError):
                self.use().memory()

    def will_write(self, handle: BlockHandle) -> None:
        """A reservation in CUDA memory is viewed: what is written there is written on a stream."""
        use = self.use()
        use.memory()
        use.writing.add(handle.generation)

    # ---- order -------------------------------------------------------------------------------

    def order(self, stream: Stream | None) -> Order:
        """The stream to keep order on (None: torch's current one); not one that is captured."""
        use = self.begun
        if use is None or self._state.device_use is not use:
            use = self.use()
        order = use.order(stream)
        if order.may_be_captured:
            use.refuse_capture(order.stream)
        return order

    def order_of_writes(self, handle: BlockHandle, stream: Stream | None) -> Order | None:
        """The stream that may still write to a reservation of this process; None: none does."""
        if stream is not None:
            return self.order(stream)
        use = self.begun
        if use is None or handle.generation not in use.writing or self._state.device_use is not use:
            return None
        order = self.order(None)
        use.writing.discard(handle.generation)
        return order

    # ---- publishing and freeing --------------------------------------------------------------

    def make_ready(self, order: Order, handle: BlockHandle) -> None:
        """What was just published is ready when the stream has come here.

        Published first, ready second: a word of a handle that is not valid is never written.
        """
        try:
            order.write(self._state.layout.ready_word(handle.start_block), handle.generation)
        except BaseException:
            self._state.fail(handle)
            raise

    def free_behind(self, order: Order, handle: BlockHandle) -> bool:
        """Free a reservation of this process when the stream has come here; False: it is none."""
        if not self._state.free_behind(handle):
            return False
        order.write(self._state.layout.ready_word(handle.start_block), handle.generation)
        return True

    # ---- waiting -----------------------------------------------------------------------------

    def wait_ready(self, handle: BlockHandle, order: Order | None) -> None:
        """The reader of what is published and not ready: its stream waits, or this thread."""
        if order is None:
            wait = _CpuWait(self._state, handle)
            while not wait.is_ready():
                time.sleep(STREAM_POLL)
            return
        word = self._state.layout.ready_word(handle.start_block)
        order.wait(word, handle.generation)
        order.use.watcher.watch(handle.start_block, handle.generation)

    async def wait_ready_async(self, handle: BlockHandle) -> None:
        """As the wait of a thread, from asyncio."""
        import asyncio  # only for those who use it: it takes longer to import than all of ours

        wait = _CpuWait(self._state, handle)
        while not wait.is_ready():
            await asyncio.sleep(STREAM_POLL)

    def wait_for_writers(self, handle: BlockHandle) -> None:
        """Until the streams of writers that released a reservation have come to it."""
        timeout = self._state.config.stream_timeout
        deadline = time.monotonic() + timeout
        while self._state.require_mine(handle):
            if time.monotonic() > deadline:
                raise PoolTimeoutError(
                    f"{handle}: a writer released it on a stream that did not get there within "
                    f"{timeout:g} s (PoolConfig(stream_timeout=...))"
                )
            time.sleep(STREAM_POLL)


class _CpuWait:
    """One wait of a CPU for what a stream is to finish."""

    def __init__(self, state: PoolState, handle: BlockHandle) -> None:
        self._state = state
        self._handle = handle
        self._timeout = state.config.stream_timeout
        self._deadline = time.monotonic() + self._timeout
        self._dead_since = 0.0

    def is_ready(self) -> bool:
        """Whether it is; `PeerDiedError` when it never will be."""
        handle, now = self._handle, time.monotonic()
        is_believed_dead = bool(self._dead_since) and now - self._dead_since > DEAD_PATIENCE
        is_over = self._state.fail_if_over(handle.start_block, handle.generation, is_believed_dead)
        if is_over and self._state.is_ready(handle):
            return True
        if is_over is None:
            self._dead_since = self._dead_since or now
        if now > self._deadline:
            raise PoolTimeoutError(
                f"{handle}: published on a stream that did not get there within "
                f"{self._timeout:g} s (PoolConfig(stream_timeout=...))"
            )
        return False
