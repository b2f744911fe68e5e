"""What a pool does on CUDA streams, and how a CPU waits for what streams are to do.

    publish   the record says published; then the stream writes the ready word     (`make_ready`)
    open      the reader's stream waits for the ready word, or else the CPU does   (`wait_ready`)
    free      the record says draining; then the stream writes the ready word      (`free_behind`)

Contract
- Nothing here is used by a pool in host memory to which no stream is given.
- `order` begins this process's use of the GPU with the pool; `begun` is it, once it has begun.
- A wait of the CPU ends: with the word, with the producer's death, or with `PoolTimeoutError`.

What it does not do: decide what is allocated, published or leased (`blocks.py`).
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from shmblocks._os.wait import Run
from shmblocks._state.layout import FAILED
from shmblocks._state.participants import ParticipantId
from shmblocks._state.pool_state import Ledger
from shmblocks._state.states import STATES, State
from shmblocks.errors import CudaUnavailableError, PeerDiedError, PoolTimeoutError
from shmblocks.handle import BlockHandle

if TYPE_CHECKING:
    from shmblocks.cuda.use import GpuUse, Order, Stream

# Seconds between two looks of a CPU at a word that a stream is to write. Shorter: more looks of
# 10 us. Longer: the CPU goes on later than it could.
STREAM_POLL = 100e-6
# Seconds after which a dead producer whose end cannot be seen (participants.py) is believed to
# write nothing more.
DEAD_PATIENCE = 1.0


class Streams:
    """The stream part of one pool in one process; borrows the ledger."""

    def __init__(self, ledger: Ledger, run: Run) -> None:
        """`run` runs an operation under the lock, as a participant."""
        self._ledger = ledger
        self._run = run
        self.begun: GpuUse | None = None

    # ---- the GPU -----------------------------------------------------------------------------

    def use(self) -> GpuUse:
        """This process's use of the GPU with this pool; the first call begins it."""
        use = self.begun
        if use is None or self._ledger.outside is not use:
            from shmblocks.cuda.use import GpuUse

            self._run(_nothing)  # a participant, if it can be
            self.begun = use = GpuUse.start(self._ledger)
        return use

    def end(self) -> None:
        """After the ledger was left."""
        self.begun = None

    @property
    def pinned_bytes(self) -> int:
        """How many bytes of the segment this process has registered with CUDA."""
        return 0 if self.begun is None else self.begun.pinned_bytes

    def open_if_cuda_runs(self) -> None:
        """Open CUDA memory now where CUDA is in use already, so that no request pays for it."""
        torch = sys.modules.get("torch")
        if self._ledger.config.is_on_gpu and torch is not None and torch.cuda.is_initialized():
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
        if use is None or self._ledger.outside is not use:
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
        if use is None or handle.generation not in use.writing or self._ledger.outside is not use:
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
            order.write(self._ledger.layout.ready_word(handle.start_block), handle.generation)
        except BaseException:
            self._run(self._fail, handle)
            raise

    def _fail(self, handle: BlockHandle) -> None:
        """What we published will never be ready."""
        blocks = self._ledger.blocks
        record = blocks.record(handle.start_block)
        if record.generation == handle.generation:
            blocks.fail(handle.start_block, record)

    def free_behind(self, order: Order, handle: BlockHandle) -> bool:
        """Free a reservation of this process when the stream has come here; False: it is none."""
        if not self._run(self._drain, handle):
            return False
        order.write(self._ledger.layout.ready_word(handle.start_block), handle.generation)
        return True

    def _drain(self, handle: BlockHandle) -> bool:
        ledger = self._ledger
        record, me = ledger.blocks.find(handle), ledger.participants.me
        if STATES[record.state] is not State.RESERVED or me is None or record.owner != me.word:
            return False
        ledger.blocks.free_behind(handle.start_block, record, time.monotonic_ns())
        return True

    # ---- waiting -----------------------------------------------------------------------------

    def wait_ready(self, handle: BlockHandle, order: Order | None) -> None:
        """The reader of what is published and not ready: its stream waits, or this thread."""
        if order is None:
            self._wait_here(handle)
            return
        word = self._ledger.layout.ready_word(handle.start_block)
        order.wait(word, handle.generation)
        order.use.watcher.watch(handle.start_block, handle.generation)

    def _wait_here(self, handle: BlockHandle) -> None:
        timeout = self._ledger.config.unclaimed_timeout
        deadline = time.monotonic() + timeout
        dead_since = 0.0
        while True:
            is_ready, owner_lives = self._run(self._look, handle, dead_since)
            if is_ready:
                return
            now = time.monotonic()
            if not owner_lives:
                dead_since = dead_since or now
            if now > deadline:
                raise PoolTimeoutError(
                    f"{handle}: published on a stream that did not get there within {timeout:g} s"
                )
            time.sleep(STREAM_POLL)

    def _look(self, handle: BlockHandle, dead_since: float) -> tuple[bool, bool]:
        """Whether it is ready, and whether its owner lives; `PeerDiedError` when it never will."""
        blocks, participants = self._ledger.blocks, self._ledger.participants
        record = blocks.record(handle.start_block)
        if record.ready == handle.generation:
            return True, True
        if record.ready & FAILED:
            raise blocks.died(handle)
        owner = ParticipantId.of(record.owner)
        if participants.is_alive(owner):
            return False, True
        is_over = dead_since and time.monotonic() - dead_since > DEAD_PATIENCE
        if participants.is_gone(owner) or is_over:
            blocks.fail(handle.start_block, record)
        return False, False

    def has_arrived(self, handle: BlockHandle) -> bool:
        """Whether a published allocation that we have open is ready; `PeerDiedError`: never."""
        word: int = self._ledger.segment.words[self._ledger.layout.ready_word(handle.start_block)]
        if word & FAILED:
            raise self._ledger.blocks.died(handle)
        return word == handle.generation

    def wait_for_writers(
        self, handle: BlockHandle, are_writing: Callable[[BlockHandle], bool]
    ) -> None:
        """Until the streams of writers that released a reservation have come to it."""
        timeout = self._ledger.config.lock_timeout
        deadline = time.monotonic() + timeout
        while self._run(are_writing, handle):
            if time.monotonic() > deadline:
                raise PoolTimeoutError(
                    f"{handle}: a writer released it on a stream that did not get there within "
                    f"{timeout:g} s"
                )
            time.sleep(STREAM_POLL)


def _nothing() -> None:
    """To be run under the lock for what comes with it."""
