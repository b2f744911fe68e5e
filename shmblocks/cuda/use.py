"""One process's use of the GPU with one pool.

Contract
- `start` makes this process known as a GPU user: from then on what it holds is kept apart after its
  death until its last DMA is over (`participants.py`).
- Words and, for a host pool, all fields are registered with CUDA once, and unregistered by
  `finish`, which first waits for everything that this process has enqueued: after it the blocks may
  go to others and the mapping may go.
- Nothing but `finish` waits for the GPU.

Graphs: an operation on a pool that is captured would write the generation of the capture at every
replay. It is refused (`refuse_capture`); work *between* `open` and `release` may be a graph.

`record_stream`: memory of a pool does not belong to torch's caching allocator, so that
`Tensor.record_stream` does nothing to it. What protects blocks from reuse is the order on the
stream that was given to `publish`, `open` or `release`: work on other streams must be made part of
it (`stream.wait_stream(other)`) before.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from typing import TYPE_CHECKING, NamedTuple, Union

from shmblocks._state.device import CREATOR_LEFT, EXPORTED, Export
from shmblocks._state.info import ParticipantId
from shmblocks._state.layout import WORD
from shmblocks._state.mutex import is_inside
from shmblocks._state.participants import HAS_DEVICE_MEMORY
from shmblocks._state.pool_state import PoolState
from shmblocks.cuda import driver, memory
from shmblocks.cuda.driver import Gpu
from shmblocks.cuda.memory import DeviceMemory
from shmblocks.cuda.watcher import Watcher
from shmblocks.errors import (
    CudaUnavailableError,
    DamagedPoolError,
    InvalidStateError,
    PeerDiedError,
    PoolClosedError,
)

if TYPE_CHECKING:
    import torch

Stream = Union["torch.cuda.Stream", int]

# Two threads that begin at once would register the segment twice.
_starting = threading.Lock()

_log = logging.getLogger("shmblocks")


class GpuUse:
    """The GPU part of a pool in this process. Borrows the state; `finish` ends it."""

    def __init__(self, state: PoolState) -> None:
        self._state = state
        self.gpu: Gpu = driver.load()
        self.device = self.gpu.current_device()
        self._memory: DeviceMemory | None = None
        self._registered: _Registered | None = None
        # Where a device finds the first word of the segment; 0: it is not registered.
        self.words = 0
        self._opening = threading.Lock()
        self._is_finished = False
        self.watcher = Watcher(state)
        # Generations of reservations that were given out to be written to on a stream.
        self.writing: set[int] = set()
        # The order of torch's current stream, which seldom changes.
        self._current = Order(self, -1, False, None)
        # Found once: each publish and open asks.
        self._current_stream = self.gpu.current_stream

    @classmethod
    def start(cls, state: PoolState) -> GpuUse:
        """Begin, and tell the others; what has begun already is given again."""
        with _starting:
            if isinstance(state.device_use, GpuUse):
                return state.device_use
            if state.segment.mapped_fd < 0:
                raise CudaUnavailableError(
                    f"pool {state.name}: this pool object came here through a fork; attach the "
                    "pool in this process to use a GPU"
                )
            use = cls(state)
            state.become_gpu_user()
            state.device_use = use
            return use

    # ---- memory ------------------------------------------------------------------------------

    @property
    def pinned_bytes(self) -> int:
        """How much of the segment is registered with CUDA."""
        return 0 if self._registered is None else self._registered.size_bytes

    def register(self) -> None:
        """Register the segment with CUDA; once."""
        with self._opening:
            if self._registered is not None:
                return
            segment = self._state.segment
            address = ctypes.addressof(ctypes.c_char.from_buffer(segment.mapping))
            size = segment.size_bytes
            try:
                there = self.gpu.register(self.device, address, size)
            except CudaUnavailableError as error:
                raise CudaUnavailableError(
                    f"pool {self._state.name}: {size} bytes of shared memory cannot be registered "
                    f"with CUDA ({error}): see `ulimit -l` and the container's memory limit, or "
                    "use the pool without `pin`"
                ) from error
            self._registered = _Registered(address, size)
            self.words = there
            self._state.note_pinned(size)

    def allocate(self, device: int, size: int) -> None:
        """As the creator: make the pool's device memory and export it."""
        state = self._state
        self.device = device
        made = memory.allocate(self.gpu, device, size, state.pool_id)
        handle = self.gpu.export(device, made.address)
        me = state.participants.me
        export = Export(EXPORTED, me.word if me else 0, self.gpu.uuid(device), handle)
        state.write_export(export)
        self._memory = made
        state.note_flags(HAS_DEVICE_MEMORY)

    def memory(self) -> DeviceMemory:
        """The pool's device memory; the first call opens it."""
        if self._memory is not None:
            return self._memory
        with self._opening:
            if self._memory is None:
                self._memory = self._open()
                self._state.note_flags(HAS_DEVICE_MEMORY)
            return self._memory

    def _open(self) -> DeviceMemory:
        state = self._state
        mine = memory.of_pool(state.pool_id)
        if mine is not None:
            self.device = mine.device
            return mine
        export = state.read_export()
        self._require_creator(export)
        try:
            return memory.open_exported(
                self.gpu,
                self.device,
                export.uuid,
                export.handle,
                state.layout.device_bytes,
                state.pool_id,
            )
        except CudaUnavailableError as error:
            self._require_creator(export)
            raise CudaUnavailableError(
                f"pool {state.name}: its GPU memory cannot be opened on device {self.device} "
                f"({error}): see `shmblocks doctor`"
            ) from error

    def _require_creator(self, export: Export) -> None:
        state = self._state
        creator = ParticipantId.of(export.creator)
        lives = state.is_alive(creator)
        if export.state == CREATOR_LEFT or not lives:
            raise PeerDiedError(
                f"pool {state.name}: the process that made its GPU memory "
                f"({state.describe(creator)}) has left; those who have "
                "the memory open go on, nobody else can open it: create the pool anew"
            )

    # ---- order -------------------------------------------------------------------------------

    def order(self, stream: Stream | None) -> Order:
        """What is enqueued on this stream (None: torch's current one) is to be ordered."""
        if self._registered is None:
            if self._is_finished:
                raise PoolClosedError(f"pool {self._state.name}: closed in this process")
            if not self._state.config.is_on_gpu:
                raise InvalidStateError(
                    f"pool {self._state.name}: expected a pinned pool where a stream is given: "
                    "call `pool.pin()` once in this process"
                )
            self.register()
        if stream is None:
            order = self._current
            current = self._current_stream(self.device)
            if order.stream != current:
                self._current = order = self._order(current, None)
            return order
        if isinstance(stream, int):
            return self._order(stream, None)
        return self._order(int(stream.cuda_stream), stream)

    def _order(self, stream: int, kept: object) -> Order:
        return Order(self, stream, self.gpu.may_be_captured(stream), kept)

    def refuse_capture(self, stream: int) -> None:
        """Raise when the stream is being captured into a graph."""
        if self.gpu.is_capturing(self.device, stream):
            raise InvalidStateError(
                f"pool {self._state.name}: publish, open and release cannot be captured into a "
                "CUDA graph, since each replay would use the generation of the capture; call them "
                "outside, before and after the replay"
            )

    def ended(self) -> InvalidStateError:
        """What is raised once the words are not registered any more."""
        return InvalidStateError(f"pool {self._state.name}: its GPU use has ended")

    # ---- leaving -----------------------------------------------------------------------------

    def finish(self) -> None:
        """Wait for what this process enqueued, then let go of the segment. Idempotent."""
        if self._is_finished:
            return
        if is_inside():
            # What follows waits for streams, they for a watcher, and that for the operation.
            raise InvalidStateError(
                f"pool {self._state.name}: closed by a signal handler or finalizer that "
                "interrupted an operation of the same thread; set a flag there and close it later"
            )
        try:
            # Blocks go back to others after this, and an unfinished write to memory that is not
            # registered any more would break the context. The watcher still runs: the dead do not
            # keep this from ending.
            self.gpu.synchronize(self.device)
            self.watcher.stop()
            self.words = 0
            registered, self._registered = self._registered, None
            if registered is not None:
                self.gpu.unregister(self.device, registered.address)
            self._state.end_gpu_use()
        except (CudaUnavailableError, DamagedPoolError) as error:
            # A broken context, or a damaged segment: there is nothing left to wait for or to tell.
            # (Its text: a log that kept the error would keep our frames, and so the mapping.)
            _log.warning("pool %s: leaving after an error: %s", self._state.name, str(error))
        finally:
            self.watcher.stop()
        self._is_finished = True

    def has_left(self, was_last: bool) -> None:
        """After leaving: the memory goes with its last tensor, unless others use what is ours."""
        mine, self._memory = self._memory, None
        if mine is not None and mine.is_own and not was_last:
            mine.keep_until_exit()


class Order:
    """A stream to keep order on. Keeps torch's stream object alive, if one was given."""

    __slots__ = ("_kept", "may_be_captured", "stream", "use")

    def __init__(self, use: GpuUse, stream: int, may_be_captured: bool, kept: object) -> None:
        self.use = use
        self.stream = stream
        self.may_be_captured = may_be_captured
        self._kept = kept

    def refuse_capture(self) -> None:
        """As `GpuUse.refuse_capture`."""
        if self.may_be_captured:
            self.use.refuse_capture(self.stream)

    def write(self, word: int, value: int) -> None:
        """Enqueue: a word of the segment gets a value."""
        use = self.use
        if not use.words:
            raise use.ended()
        use.gpu.write(use.device, self.stream, use.words + word * WORD, value)

    def wait(self, word: int, value: int) -> None:
        """Enqueue: go on when a word of the segment has reached a value."""
        use = self.use
        if not use.words:
            raise use.ended()
        use.gpu.wait(use.device, self.stream, use.words + word * WORD, value)


class _Registered(NamedTuple):
    address: int
    size_bytes: int
