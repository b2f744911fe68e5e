"""`BlockPool`: one pool of blocks in POSIX shared memory, as one process uses it.

    writer:   handle = pool.alloc(n) -> pool.view(handle) -> pool.publish(handle, readers=r)
    queue:    handle.encode() ... BlockHandle.decode(data)
    reader:   with pool.open(handle) as lease: lease["input_embeddings"]   # the last one frees

Contract
- Every method may be called from any thread and from any attached process, at any time.
- A call that raises has changed nothing; one that is interrupted (KeyboardInterrupt) has either
  changed nothing or done its work; an interrupted `alloc` or `open` has given back what it took.
- What a process holds (its reservations and leases) comes back when it closes the pool or dies.
- After `fork` the child may go on using the pool: it becomes a participant of its own at its first
  call. It holds nothing of what its parent holds.

GPU users (`shmblocks.cuda`)
- In a pool created with `device="cuda:0"` the fields lie in CUDA memory; `pin` lets a GPU read and
  write a pool in host memory at full speed. Everything else is the same for both.
- `publish`, `open`, `release`, `free` take a `stream` (in a CUDA pool: torch's current one) and
  order what follows on it, without waiting for anything.
- A process without a GPU can do everything with a CUDA pool but look at its fields.

What it does not do: carry handles (any queue does), or keep a tensor's content after its lease.
"""

from __future__ import annotations

import contextlib
import operator
import struct
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from shmblocks._alloc_wait import Reservations, Want
from shmblocks._os.wait import deadline_of, seconds_left
from shmblocks._state import check as inspection
from shmblocks._state.blocks import READS, WRITES, LeaseKey, ReservationKey
from shmblocks._state.check import AllocationInfo, PoolStats, Violation
from shmblocks._state.layout import REQUEST_ID_BYTES
from shmblocks._state.lifetime import leave_at_exit
from shmblocks._state.participants import ParticipantId, ParticipantInfo, utf8_prefix
from shmblocks._state.pool_state import Ledger
from shmblocks._state.reclaim import ReapReport
from shmblocks._state.states import STATES, State
from shmblocks.config import MAX_BLOCKS, PoolConfig
from shmblocks.cuda.order import Streams
from shmblocks.cuda.placement import allocate_on_gpu, field_tensors, placed
from shmblocks.errors import (
    ForeignHandleError,
    InvalidStateError,
    PoolClosedError,
    PoolNotFoundError,
    StaleHandleError,
)
from shmblocks.handle import BlockHandle
from shmblocks.lease import Lease, Leases
from shmblocks.view import BlockView, FieldTensors

if TYPE_CHECKING:
    import torch

    from shmblocks.cuda.use import Stream

T = TypeVar("T")

PREFAULT = ("background", "now", "off")
# Seconds between two looks for a pool that is not there yet.
ATTACH_POLL = 0.01
# Tokens or readers.
_MOST = MAX_BLOCKS << 20


class BlockPool:
    """A pool that this process is attached to. Make one with `create` or `attach`."""

    def __init__(self, ledger: Ledger, role: str, prefault: str) -> None:
        """For `create` and `attach`; takes over the ledger, whose participant we are."""
        self._ledger = ledger
        self._role = role
        self._prefault = prefault
        self._is_on_gpu = ledger.config.is_on_gpu
        self._pool_id = ledger.pool_id
        self._block_size = ledger.config.block_size
        self._unclaimed_ns = int(ledger.config.unclaimed_timeout * 1e9)
        self._total_blocks = ledger.config.total_blocks
        self._tensors: FieldTensors | None = field_tensors(ledger)
        ledger.segment.prefault(prefault)
        self._reservations = Reservations(ledger, self._run)
        self._streams = Streams(ledger, self._run)
        self._leases = Leases(ledger, self._run, self._streams)
        # The same list: a look at it is part of every call.
        self._dropped = self._leases.dropped
        self._finalizer = leave_at_exit(self, ledger)

    # ---- life --------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        name: str,
        config: PoolConfig,
        *,
        role: str = "",
        prefault: str = "background",
        device: str | torch.device | None = None,
    ) -> BlockPool:
        """Make a pool and be its first participant.

        name      1 to 200 of A-Z a-z 0-9 . _ - ; what other processes attach by
        role      up to 31 bytes that inspectors and errors show for this process
        prefault  map all pages `"now"`, in the `"background"` (a thread), or `"off"` as touched
        device    where the fields lie, instead of the config's: `"cpu"` or `"cuda:0"`

        All memory is allocated before the name appears. The leftover of a dead pool of the same
        name is replaced. Raises `PoolExistsError`, `SharedMemoryFullError`.
        """
        _known_prefault(prefault)
        made: list[Ledger] = []
        try:
            config = placed(config, device)
            prepare = allocate_on_gpu if config.is_on_gpu else None
            Ledger.create(name, config, role, made, prepare)
            return cls(made[0], role, prefault)
        except BaseException:
            _undo(made)
            raise

    @classmethod
    def attach(
        cls, name: str, *, timeout: float = 0.0, role: str = "", prefault: str = "background"
    ) -> BlockPool:
        """Become a participant of an existing pool; wait up to `timeout` seconds for it to appear.

        Raises `PoolNotFoundError`, `IncompatiblePoolError`, `PoolPermissionError`,
        `TooManyParticipantsError`.
        """
        _known_prefault(prefault)
        deadline = deadline_of(timeout)
        while True:
            made: list[Ledger] = []
            try:
                Ledger.attach(name, role, made)
                pool = cls(made[0], role, prefault)
                pool._streams.open_if_cuda_runs()
                return pool
            except PoolNotFoundError as error:
                _undo(made)
                if seconds_left(deadline) <= 0:
                    waited = f" (waited {timeout:g} s)" if timeout else ""
                    raise PoolNotFoundError(f"{error}{waited}") from None
                time.sleep(ATTACH_POLL)
            except BaseException:
                _undo(made)
                raise

    def close(self) -> None:
        """Leave the pool: reservations and leases of this process come back; idempotent.

        The last participant to leave removes the segment. Tensors of views stay readable, but their
        blocks are no longer theirs. A GPU user waits for what it has enqueued.
        """
        # First: who is woken to look again must find it closed.
        self._ledger.leave()
        self._reservations.close()
        self._tensors = None
        self._streams.end()
        self._finalizer.detach()

    def __enter__(self) -> BlockPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[..., BlockPool], tuple[str, int, str, str]]:
        return (_reattach, (self.name, self.pool_id, self._role, self._prefault))

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else f"{self.participant or 'not joined yet'}"
        return (
            f"BlockPool({self.name!r}, {self.config.total_blocks} blocks of "
            f"{self.config.block_size} tokens, {state})"
        )

    # ---- what it is --------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """With its leading slash."""
        return self._ledger.name

    @property
    def config(self) -> PoolConfig:
        return self._ledger.config

    @property
    def pool_id(self) -> int:
        """A random 64-bit number; handles carry it."""
        return self._ledger.pool_id

    @property
    def participant(self) -> ParticipantId | None:
        """This process in the pool; None when closed, or forked and not used yet."""
        return self._ledger.participants.me

    @property
    def is_closed(self) -> bool:
        """Whether this process has left the pool."""
        return self._ledger.is_closed

    # ---- the GPU -----------------------------------------------------------------------------

    def pin(self) -> None:
        """Register the segment with CUDA in this process, once: copies between it and a GPU then
        run at full speed, and streams may be given to `publish` and `open`.

        Each process does it for itself. Raises `CudaUnavailableError`. (A CUDA pool registers what
        it needs by itself.)
        """
        self._streams.use().register()

    @property
    def is_pinned(self) -> bool:
        """Whether this process has registered the segment with CUDA."""
        return self.pinned_bytes > 0

    @property
    def pinned_bytes(self) -> int:
        """How many bytes of the segment this process has registered with CUDA."""
        return 0 if self.is_closed else self._streams.pinned_bytes

    # ---- allocation --------------------------------------------------------------------------

    def alloc(
        self,
        num_tokens: int,
        req_id: str | None = None,
        fake: bool = False,
        timeout: float | None = 0.0,
    ) -> BlockHandle | None:
        """Reserve ceil(num_tokens / block_size) consecutive blocks; None: no room now.

        The reservation is this process's until it is published or freed. `req_id` is shown by
        inspectors (63 bytes of it). `fake` gives a handle of no blocks at all, for warm-up
        requests.

        `timeout` > 0 waits so many seconds (None: for ever), first come, first served over all
        processes, then raises `PoolTimeoutError`, which names those who hold the blocks. While
        somebody waits, calls that don't get None.
        """
        num_tokens = _whole("num_tokens", num_tokens)
        num_blocks = -(-num_tokens // self._block_size)
        return self._alloc(num_blocks, num_tokens, req_id, fake, timeout)

    def alloc_default(
        self,
        req_id: str | None = None,
        fake: bool = False,
        timeout: float | None = 0.0,
    ) -> BlockHandle | None:
        """Reserve the config's `default_num_blocks`, for a length that is not known yet."""
        config = self.config
        num_tokens = config.default_num_blocks * config.block_size
        return self._alloc(config.default_num_blocks, num_tokens, req_id, fake, timeout)

    def alloc_blocks(
        self,
        num_blocks: int,
        num_tokens: int,
        req_id: str | None = None,
        fake: bool = False,
        timeout: float | None = 0.0,
    ) -> BlockHandle | None:
        """Reserve `num_blocks` consecutive blocks for `num_tokens` tokens; None: no room now.

        Raises ValueError for what this pool can never serve. `timeout` as in `alloc`.
        """
        num_blocks = _whole("num_blocks", num_blocks)
        num_tokens = _whole("num_tokens", num_tokens)
        return self._alloc(num_blocks, num_tokens, req_id, fake, timeout)

    def _alloc(
        self,
        num_blocks: int,
        num_tokens: int,
        req_id: str | None,
        fake: bool,
        timeout: float | None,
    ) -> BlockHandle | None:
        want = self._want(num_blocks, num_tokens, req_id, fake)
        if fake:
            return BlockHandle(0, num_blocks, num_tokens, 0, self.pool_id)
        deadline = deadline_of(timeout) if timeout else None
        try:
            handle = self._reservations.try_reserve(want)
            if handle is None and timeout != 0.0:
                return self._reservations.wait(want, deadline)
            return handle
        except BaseException:
            self._take_back(want.made)
            raise

    async def alloc_async(
        self, num_tokens: int, req_id: str | None = None, timeout: float | None = None
    ) -> BlockHandle:
        """`alloc` that waits its turn in asyncio; cancelling it leaves no trace."""
        num_tokens = _whole("num_tokens", num_tokens)
        want = self._want(self.config.blocks_for(num_tokens), num_tokens, req_id, fake=False)
        deadline = deadline_of(timeout)
        try:
            return await self._reservations.wait_async(want, deadline)
        except BaseException:
            self._take_back(want.made)
            raise

    def _want(self, num_blocks: int, num_tokens: int, req_id: str | None, fake: bool) -> Want:
        if num_tokens > num_blocks * self._block_size:
            raise ValueError(
                f"num_tokens: expected at most {num_blocks * self._block_size} for "
                f"{num_blocks} blocks, got {num_tokens}"
            )
        if num_blocks > self._total_blocks and not fake:
            raise ValueError(
                f"pool {self.name}: has {self.config.total_blocks} blocks, {num_blocks} can never "
                "be served: create a larger pool, or send the tokens in several allocations"
            )
        if req_id is not None and not isinstance(req_id, str):
            raise TypeError(f"req_id: expected str or None, got {type(req_id).__name__}")
        request = utf8_prefix(req_id, REQUEST_ID_BYTES) if req_id else b""
        return Want(num_blocks, num_tokens, request, [])

    def _take_back(self, made: list[ReservationKey]) -> None:
        """Free what an interrupted `alloc` may have reserved."""
        for key in made:
            with contextlib.suppress(PoolClosedError):
                self._run(self._free_key, key)

    def _free_key(self, key: ReservationKey) -> None:
        if self._ledger.blocks.take_back(key):
            self._ledger.ring()

    def grow(self, handle: BlockHandle, num_tokens: int) -> BlockHandle | None:
        """Extend a reservation in place to `num_tokens` tokens; None: the blocks behind it are
        taken, or somebody waits for blocks (`alloc(timeout=)`) who came first.

        The content stays. The handle that this returns replaces the old one, which is stale.
        """
        real = self._real(handle)
        num_tokens = _whole("num_tokens", num_tokens)
        if num_tokens < handle.num_tokens:
            raise ValueError(
                f"num_tokens: expected at least the {handle.num_tokens} that the handle has, "
                f"got {num_tokens}"
            )
        return self._run(self._grow, real, num_tokens)

    def _grow(self, handle: BlockHandle, num_tokens: int) -> BlockHandle | None:
        blocks = self._ledger.blocks
        others_wait = self._reservations.others_wait()  # first: it may reap
        record = blocks.find_exact(handle)
        num_blocks = max(self.config.blocks_for(num_tokens), record.num_blocks)
        start = handle.start_block
        if others_wait and num_blocks > record.num_blocks:
            return None
        if not blocks.grow(start, record, num_blocks, num_tokens):
            return None
        return BlockHandle(start, num_blocks, num_tokens, handle.generation, handle.pool_id)

    def free(
        self,
        handle: BlockHandle,
        req_id: str | None = None,
        fake: bool = False,
        stream: Stream | None = None,
    ) -> None:
        """Give an allocation back; any process may. With open leases: the last one released does.

        A reservation of this process that a stream works on: it comes back when the stream gets
        here. In a CUDA pool that is so for every one that was viewed, on torch's current stream.

        A fake handle is left alone. Raises `StaleHandleError` for what was freed before, and
        changes nothing then. (`req_id` is accepted for symmetry with `alloc`.)
        """
        if fake or _handle(handle).generation == 0:
            return
        if self._streams.begun is None and stream is None:
            self._run(self._free, self._real(handle))
            return
        real = self._real(handle)
        order = self._streams.order_of_writes(real, stream)
        if order is None or not self._streams.free_behind(order, real):
            self._run(self._free, real)

    def _free(self, handle: BlockHandle) -> None:
        record = self._ledger.blocks.find(handle)
        if STATES[record.state] is State.DRAINING:
            raise StaleHandleError(
                f"{handle}: its blocks were freed; they come back when the last of "
                f"{record.leases} lease(s) is released"
            )
        self._ledger.blocks.free(handle.start_block, record)
        self._ledger.ring()

    def available_blocks(self) -> int:
        """Blocks in no allocation, of this moment."""
        return self._run(self._available_blocks)

    def _available_blocks(self) -> int:
        self._ledger.collect()
        return self._ledger.blocks.free_blocks

    def handle_at(self, start_block: int) -> BlockHandle:
        """The handle of the allocation that starts at a block, for those who kept only the number.

        Raises `StaleHandleError` when none starts there. It proves nothing: between the reading and
        the use of the number the blocks may have gone to another.
        """
        return self._run(self._handle_at, start_block)

    def _handle_at(self, start_block: int) -> BlockHandle:
        if not 0 <= start_block < self.config.total_blocks:
            raise ValueError(
                f"start_block: expected 0 to {self.config.total_blocks - 1}, got {start_block}"
            )
        record = self._ledger.blocks.record(start_block)
        if STATES[record.state] is State.FREE:
            raise StaleHandleError(f"block {start_block}: no allocation starts there")
        return BlockHandle(
            start_block, record.num_blocks, record.num_tokens, record.generation, self.pool_id
        )

    def field(self, name: str) -> torch.Tensor:
        """A field of the whole pool, `[total_tokens, *shape]`, as stored; `"aux"`: `[blocks, 16]`.

        For engines that register memory; everyone else takes a view of an allocation.
        """
        tensors = self._open_tensors
        return tensors.aux() if name == "aux" else tensors.tensor(name)

    # ---- writing and publishing --------------------------------------------------------------

    def view(self, handle: BlockHandle) -> BlockView:
        """The fields of a reservation of this process, to write (or, after a landing, to read)."""
        real = self._real(handle)
        me = self._ledger.participants.me
        seems_mine = me is not None and self._ledger.blocks.seems_reserved(real, me.word)
        if not seems_mine and self._run(self._check_mine, real):
            self._streams.wait_for_writers(real, self._check_mine)
        if self._is_on_gpu:
            self._streams.will_write(real)
        return self._view(handle)

    def _check_mine(self, handle: BlockHandle) -> bool:
        """Whether a writer's stream still works on it (raises when it is not ours)."""
        record = self._ledger.blocks.find_exact(handle)
        owner = ParticipantId.of(record.owner)
        if STATES[record.state] is not State.RESERVED or owner != self._me:
            raise InvalidStateError(
                f"{handle}: expected a reservation of this process, it is "
                f"{STATES[record.state]} and belongs to "
                f"{self._ledger.participants.describe(owner)}: use `open` to read what is "
                "published, `write` for a reservation of another process"
            )
        if not record.leases or not self._ledger.blocks.waits_for_streams:
            return False
        self._ledger.collect()
        return any(
            lease.pending and lease.generation == handle.generation
            for _, lease in self._ledger.blocks.leases()
        )

    def _view(self, handle: BlockHandle) -> BlockView:
        start_token = handle.start_block * self._block_size
        return BlockView(self._tensors or self._open_tensors, handle, start_token, self)

    def write(self, handle: BlockHandle, stream: Stream | None = None) -> Lease:
        """A writer's lease on a reservation, whoever owns it (a landing allocation).

        While it is open the blocks are not used again, even when their owner frees them. With a
        stream it is open until the stream has come to its release.
        """
        return self._open(handle, WRITES, stream)

    def publish(
        self,
        handle: BlockHandle,
        *,
        readers: int = 1,
        num_tokens: int | None = None,
        stream: Stream | None = None,
    ) -> BlockHandle:
        """Make a reservation readable by `readers` leases; the last one released frees the blocks.

        `num_tokens` is the length actually written, if it is not the handle's. Give the handle that
        this returns to the readers. Unopened for the config's `unclaimed_timeout`, it is freed.

        `stream`: what was enqueued there before is what writes; readers' streams wait for it. This
        returns at once, and the handle may travel at once. In a CUDA pool: torch's current stream.
        In a pool in host memory only when it is given, after `pin`.
        """
        real = self._real(handle)
        readers = _whole("readers", readers)
        length = handle.num_tokens if num_tokens is None else _whole("num_tokens", num_tokens)
        if length > handle.num_blocks * self._block_size:
            raise ValueError(
                f"num_tokens: expected at most {handle.num_blocks * self._block_size} for "
                f"{handle}, got {length}"
            )
        if stream is None and not self._is_on_gpu:
            self._run(self._publish, real, length, readers, False)
        else:
            order = self._streams.order(stream)
            order.use.writing.discard(handle.generation)
            self._run(self._publish, real, length, readers, True)
            self._streams.make_ready(order, real)
        if length == handle.num_tokens:
            return handle
        start, blocks = handle.start_block, handle.num_blocks
        return BlockHandle(start, blocks, length, handle.generation, handle.pool_id)

    def _publish(self, handle: BlockHandle, num_tokens: int, readers: int, on_stream: bool) -> None:
        blocks = self._ledger.blocks
        record = blocks.find_exact(handle)
        if record.leases and STATES[record.state] is State.RESERVED:
            raise InvalidStateError(
                f"{handle}: {record.leases} writer's lease(s) are open; release them, then publish"
            )
        now = time.monotonic_ns()
        until = now + self._unclaimed_ns
        start = handle.start_block
        blocks.publish(start, record, num_tokens, readers, now, until, on_stream=on_stream)

    # ---- reading -----------------------------------------------------------------------------

    def open(self, handle: BlockHandle, stream: Stream | None = None) -> Lease:
        """A reader's lease on published blocks; use it in a `with` statement.

        `stream` (in a CUDA pool: torch's current one) waits until what was published on a stream is
        there, and the lease lasts until the stream has come to its release: this returns at once.
        Without a stream this waits until it is there.

        Raises `PeerDiedError` when the publisher died before it was there, `StaleHandleError` when
        they were freed (all expected readers were there, or nobody came in time),
        `InvalidStateError` when they are not published.
        """
        return self._open(handle, READS, stream)

    def _open(self, handle: BlockHandle, kind: int, stream: Stream | None) -> Lease:
        made: list[LeaseKey] = []
        real = self._real(handle)
        order = None
        if stream is not None or self._is_on_gpu:
            order = self._streams.order(stream)
            if self._is_on_gpu:
                order.use.memory()
        try:
            key, is_ready = self._run(self._leases.take, real, kind, made)
            if not is_ready:
                self._streams.wait_ready(real, order)
            return Lease(self._leases, self._view(handle), key, order, is_ready)
        except BaseException:
            for key in made:
                with contextlib.suppress(PoolClosedError):
                    self._leases.release(key, unread=True)
            raise

    # ---- looking after it --------------------------------------------------------------------

    def stats(self) -> PoolStats:
        """Counts of blocks by state, allocations, leases and participants."""
        return self._run(self._stats)

    def _stats(self) -> PoolStats:
        self._ledger.collect()
        return inspection.stats(self._ledger)

    def allocations(self) -> list[AllocationInfo]:
        """Every allocation: who holds it, for which request, since when, under which leases."""
        return self._run(inspection.allocations, self._ledger)

    def participants(self) -> list[ParticipantInfo]:
        """Everyone attached, and the dead who were not reaped yet."""
        return self._run(self._ledger.participants.infos)

    def is_alive(self, who: ParticipantId) -> bool:
        """Whether that process is attached and lives."""
        return self._run(self._ledger.participants.is_alive, who)

    def describe(self, who: ParticipantId) -> str:
        """For messages: `participant 3 (pid 4242, embedding)`."""
        return self._run(self._ledger.participants.describe, who)

    def check(self) -> list[Violation]:
        """Every invariant that does not hold; empty when the pool is right."""
        return self._run(inspection.check, self._ledger)

    def reap(self) -> ReapReport:
        """Give back what the dead held and what nobody claimed in time.

        Runs by itself when an allocation would otherwise fail.
        """
        return self._run(self._ledger.reap)

    # ---- inside ------------------------------------------------------------------------------

    @property
    def _me(self) -> ParticipantId:
        me = self._ledger.participants.me
        if me is None:
            raise self._closed()
        return me

    @property
    def _open_tensors(self) -> FieldTensors:
        if self._tensors is None:
            raise self._closed()
        return self._tensors

    def _closed(self) -> PoolClosedError:
        return PoolClosedError(f"pool {self.name}: closed in this process; attach it again")

    def _run(self, body: Callable[..., T], *args: object) -> T:
        ledger = self._ledger
        if ledger.participants.me is None:
            self._rejoin()
        if self._dropped:
            self._leases.release_dropped()
        try:
            return ledger.mutex.run(body, *args)
        except struct.error as error:
            raise ledger.too_large(error) from error

    def _rejoin(self) -> None:
        """In a forked child: become a participant of its own."""
        if self.is_closed:
            raise self._closed()
        self._ledger.run(self._join_once)
        self._finalizer = leave_at_exit(self, self._ledger)

    def _join_once(self) -> None:
        if self._ledger.participants.me is None:
            self._ledger.take_place(self._role, is_creator=False)

    def _real(self, handle: BlockHandle) -> BlockHandle:
        """The handle, if it can be one of this pool."""
        if _handle(handle).pool_id != self._pool_id:
            raise ForeignHandleError(
                f"{handle}: it is of pool {handle.pool_id:#x}, this is {self.name} "
                f"({self.pool_id:#x}): attach the pool that made it"
            )
        if handle.generation == 0:
            raise InvalidStateError(
                f"{handle}: a fake handle names no blocks; it can only be freed"
            )
        return handle


def _reattach(name: str, pool_id: int, role: str, prefault: str) -> BlockPool:
    """Unpickling in another process: attach, and make sure that it is the same pool."""
    pool = BlockPool.attach(name, role=role, prefault=prefault)
    if pool.pool_id != pool_id:
        pool.close()
        raise PoolNotFoundError(
            f"pool {name}: the pool that was sent is gone, another has taken its name"
        )
    return pool


def _undo(made: list[Ledger]) -> None:
    """Leave what an interrupted `create` or `attach` has made, or one that failed."""
    for ledger in made:
        ledger.leave()


def _known_prefault(prefault: str) -> None:
    if prefault not in PREFAULT:
        raise ValueError(f"prefault: expected one of {', '.join(PREFAULT)}, got {prefault!r}")


def _handle(handle: BlockHandle) -> BlockHandle:
    """Any handle, of whatever pool; TypeError for anything else."""
    if not isinstance(handle, BlockHandle):
        raise TypeError(f"handle: expected BlockHandle, got {type(handle).__name__}")
    return handle


def _whole(what: str, value: int) -> int:
    """A whole number of at least 1 that no pool's arithmetic can overflow."""
    number = operator.index(value)
    if not 1 <= number <= _MOST:
        raise ValueError(f"{what}: expected a whole number of at least 1, got {value}")
    return number
