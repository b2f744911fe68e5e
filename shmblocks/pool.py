"""`BlockPool`: one pool of blocks in POSIX shared memory, as one process uses it.

    copy in    handle = pool.put({"input_embeddings": tensor, ...})
    copy out   tensors = pool.take(handle)

    in place   with pool.reserve(num_tokens) as r:
                   encoder(out=r["input_embeddings"])
                   handle = r.publish(readers=2)
               with pool.open(handle) as lease:          # the last of the two readers frees it
                   lease["input_embeddings"]

    the handle travels over any queue:  handle.encode() ... BlockHandle.decode(data)

Contract
- Every method may be called from any thread and from any attached process, at any time.
- A call that raises has changed nothing; one that is interrupted (KeyboardInterrupt) has either
  changed nothing or done its work; an interrupted `alloc` or `open` has given back what it took.
- What a process holds (its reservations and leases) comes back when it closes the pool or dies.
- After `fork` the child may go on using the pool: it becomes a participant of its own at its first
  call. It holds nothing of what its parent holds.
- A process is one participant of a pool, however often the pool is unpickled in it.

GPU users (`shmblocks.cuda`)
- In a pool created with `device="cuda:0"` the fields lie in CUDA memory; `pin` lets a GPU read and
  write a pool in host memory at full speed. Everything else is the same for both.
- `publish`, `open`, `release`, `free` take a `stream` (in a CUDA pool: torch's current one) and
  order what follows on it, without waiting for anything.
- A process without a GPU can do everything with a CUDA pool but read and write its fields.

What it does not do: carry handles (any queue does), or keep a tensor's content after its lease.
"""

from __future__ import annotations

import contextlib
import operator
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, NoReturn, get_args

from shmblocks._alloc_wait import AllocWaiters
from shmblocks._claim_wait import ClaimWaiters
from shmblocks._os.wait import LONGEST_SPIN, deadline_of, seconds_left
from shmblocks._state import lifetime
from shmblocks._state.blocks import LeaseKey
from shmblocks._state.cache_state import CacheState, ClaimAnswer, Found, Ticket
from shmblocks._state.channel_state import ChannelState
from shmblocks._state.channels import NAME_BYTES
from shmblocks._state.info import (
    AllocationInfo,
    CacheStats,
    EntryInfo,
    ParticipantId,
    ParticipantInfo,
    PoolStats,
    ReapReport,
    Violation,
    WaiterInfo,
)
from shmblocks._state.layout import MOST_NAMED_READERS, REQUEST_ID_BYTES, UNBOUNDED
from shmblocks._state.participants import utf8_prefix
from shmblocks._state.peers import PeerState
from shmblocks._state.pool_state import AllocRequest, Opened, PoolState, stamp
from shmblocks._state.shared_segment import ATTACH_POLL
from shmblocks.channel import Channel, ReadyToSend, send
from shmblocks.config import MAX_BLOCKS, MAX_SECONDS, PoolConfig
from shmblocks.cuda.order import StreamOrder
from shmblocks.cuda.placement import allocate_on_gpu, field_tensors, placed, read_only_tensors
from shmblocks.errors import (
    ForeignHandleError,
    IncompatibleConfigError,
    InvalidStateError,
    KeyExistsError,
    PoolClosedError,
    PoolExistsError,
    PoolNotFoundError,
    PoolTimeoutError,
    StaleHandleError,
)
from shmblocks.handle import BlockHandle
from shmblocks.inspector import remove_dead_pools
from shmblocks.lease import Lease, LeaseMeans, Readers, Reservation
from shmblocks.tickets import Tickets, decode_ticket, encode_ticket
from shmblocks.view import AUX, BlockView, FieldTensors, ReservationGuard, count_tokens, fill

if TYPE_CHECKING:
    import torch

    from shmblocks.cuda.use import Stream

Prefault = Literal["background", "now", "off"]

# Tokens or readers.
_MOST = MAX_BLOCKS << 20
# Bytes from which an async copy runs in a thread, so that the event loop goes on meanwhile.
_COPY_IN_THREAD = 1 << 20


class BlockPool:
    """A pool that this process is attached to. Make one with `create`, `attach` or `ensure`."""

    def __init__(
        self, state: PoolState, role: str, prefault: Prefault, read_only_leases: bool
    ) -> None:
        """For `create` and `attach`; takes over the state, whose participant we are."""
        # Public for the parts of this package; users have no business with it.
        self.state = state
        self._role = role
        self._prefault: Prefault = prefault
        self._read_only_leases = read_only_leases and not state.config.is_on_gpu
        self._is_on_gpu = state.config.is_on_gpu
        # None when closed: they keep the mapping alive.
        self._tensors: FieldTensors | None = field_tensors(state)
        self._read_means: LeaseMeans | None = None
        self._write_means: LeaseMeans | None = None
        self._guard = ReservationGuard(state)
        self._waiters = AllocWaiters(state)
        self.cache_state = CacheState(state)
        self.peer_state = PeerState(state)
        self._claim_waiters = ClaimWaiters(self.cache_state)
        self.channel_state = ChannelState(state)
        self._channels: weakref.WeakSet[Channel] = weakref.WeakSet()
        self.streams = StreamOrder(state)
        if self._read_only_leases and state.config.fields:
            # Now, and not at the first lease: an attached process can open whatever comes.
            self._read_means = LeaseMeans(state, self.streams, read_only_tensors(state))
        state.segment.prefault(prefault)
        self._finalizer = lifetime.leave_when_dropped(self, state)
        _open_pools[state.pool_id] = self

    # ---- life --------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        name: str,
        config: PoolConfig,
        *,
        role: str = "",
        prefault: Prefault = "background",
        device: str | torch.device | None = None,
        read_only_leases: bool = True,
    ) -> BlockPool:
        """Make a pool and be its first participant.

        name      1 to 200 of A-Z a-z 0-9 . _ - ; what other processes attach by
        role      up to 63 bytes that inspectors and errors show for this process
        prefault  map all pages `"now"`, in the `"background"` (a thread), or `"off"` as touched
        device    where the fields lie, instead of the config's: `"cpu"` or `"cuda:0"`
        read_only_leases   tensors of this process's leases cannot be written to (a host pool that
                           is not pinned): a stray write is a segmentation fault

        All memory is allocated before the name appears. The leftover of a dead pool of the same
        name is replaced. Raises `PoolExistsError`, `SharedMemoryFullError`.
        """
        _require_known(prefault)
        config = placed(config, device)
        prepare = allocate_on_gpu if config.is_on_gpu else None
        make = partial(PoolState.create, name, config, _role(role), prepare)
        return cls._owning(make, role, prefault, read_only_leases)

    @classmethod
    def attach(
        cls,
        name: str,
        *,
        timeout: float = 0.0,
        role: str = "",
        prefault: Prefault = "background",
        read_only_leases: bool = True,
    ) -> BlockPool:
        """Become a participant of an existing pool; wait up to `timeout` seconds for it to appear.

        The other arguments are those of `create`. Raises `PoolNotFoundError`,
        `IncompatiblePoolError`, `DamagedPoolError`, `PoolPermissionError`,
        `TooManyParticipantsError`.
        """
        _require_known(prefault)
        deadline = deadline_of(timeout)
        while True:
            try:
                make = partial(PoolState.attach, name, _role(role))
                pool = cls._owning(make, role, prefault, read_only_leases)
                pool.streams.open_if_cuda_runs()
                return pool
            except PoolNotFoundError as error:
                if seconds_left(deadline) <= 0:
                    raise _waited(error, timeout) from None
            time.sleep(ATTACH_POLL)

    @classmethod
    async def attach_async(
        cls,
        name: str,
        *,
        timeout: float = 0.0,
        role: str = "",
        prefault: Prefault = "background",
        read_only_leases: bool = True,
    ) -> BlockPool:
        """`attach` that waits in asyncio."""
        import asyncio

        deadline = deadline_of(timeout)
        while True:
            try:
                return cls.attach(
                    name, role=role, prefault=prefault, read_only_leases=read_only_leases
                )
            except PoolNotFoundError as error:
                if seconds_left(deadline) <= 0:
                    raise _waited(error, timeout) from None
            await asyncio.sleep(ATTACH_POLL)

    @classmethod
    def ensure(
        cls,
        name: str,
        config: PoolConfig,
        *,
        role: str = "",
        prefault: Prefault = "background",
        read_only_leases: bool = True,
        remove_dead: str | None = None,
    ) -> BlockPool:
        """Attach to the pool of that name, or create it; whoever comes first creates.

        `remove_dead`: before that, remove every pool whose name begins with this and that no
        process uses (`remove_dead_pools`), so that their memory is free for this one.

        Raises `IncompatibleConfigError`, which names the difference, when it exists with another
        config.
        """
        if remove_dead is not None:
            remove_dead_pools(remove_dead)
        while True:
            try:
                pool = cls.attach(
                    name, role=role, prefault=prefault, read_only_leases=read_only_leases
                )
            except PoolNotFoundError:
                try:
                    return cls.create(
                        name,
                        config,
                        role=role,
                        prefault=prefault,
                        read_only_leases=read_only_leases,
                    )
                except PoolExistsError:
                    continue  # another one was faster
            difference = pool.config.difference_to(config)
            if difference:
                pool.close()
                raise IncompatibleConfigError(
                    f"pool {pool.name}: it exists with another config: {difference}; use the same "
                    "config everywhere, or another name"
                )
            return pool

    @classmethod
    def _owning(
        cls, make: Callable[[], PoolState], role: str, prefault: Prefault, read_only_leases: bool
    ) -> BlockPool:
        """The pool object of the state that `make` joins; interrupted anywhere, it has left."""
        state: PoolState | None = None
        try:
            state = make()
            return cls(state, role, prefault, read_only_leases)
        except BaseException:
            if state is not None:
                state.leave()
            raise

    def close(self) -> None:
        """Leave the pool: reservations and leases of this process come back; idempotent.

        The last participant to leave removes the segment. Tensors of views stay readable, but their
        blocks are no longer theirs. A GPU user waits for what it has enqueued.
        """
        # Leave first, so that waiters woken below see a closed pool.
        try:
            self.state.leave()
        finally:
            if self.is_closed:
                self._let_go()

    def _let_go(self) -> None:
        self._waiters.close()
        self._claim_waiters.close()
        for channel in list(self._channels):
            channel.end_waits()
        self._tensors = self._read_means = self._write_means = None
        self.streams.end()
        self._finalizer.detach()

    def __enter__(self) -> BlockPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[..., BlockPool], tuple[object, ...]]:
        how = (self._role, self._prefault, self._read_only_leases)
        return (_reattach, (self.name, self.pool_id, *how))

    def __copy__(self) -> NoReturn:
        raise TypeError(f"{self!r}: it cannot be copied; attach the pool again, or share this one")

    def __deepcopy__(self, memo: object) -> NoReturn:
        self.__copy__()

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
        return self.state.name

    @property
    def config(self) -> PoolConfig:
        return self.state.config

    @property
    def pool_id(self) -> int:
        """A random 64-bit number; handles carry it."""
        return self.state.pool_id

    @property
    def participant(self) -> ParticipantId | None:
        """This process in the pool; None when closed, or forked and not used yet."""
        return self.state.participants.me

    @property
    def is_closed(self) -> bool:
        """Whether this process has left the pool."""
        return self.state.is_closed

    # ---- the GPU -----------------------------------------------------------------------------

    def pin(self) -> None:
        """Register the segment with CUDA in this process, once: copies between it and a GPU then
        run at full speed, and streams may be given to `publish` and `open`.

        Each process does it for itself. Leases of a pinned pool lie in the registered mapping,
        which can be written to. Raises `CudaUnavailableError`. (A CUDA pool registers what it needs
        by itself.)
        """
        self.streams.use().register()

    @property
    def is_pinned(self) -> bool:
        """Whether this process has registered the segment with CUDA."""
        return self.pinned_bytes > 0

    @property
    def pinned_bytes(self) -> int:
        """How many bytes of the segment this process has registered with CUDA."""
        return 0 if self.is_closed else self.streams.pinned_bytes

    # ---- copying in and out ------------------------------------------------------------------

    def put(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        readers: int = 1,
        req_id: str | None = None,
        timeout: float | None = None,
        stream: Stream | None = None,
    ) -> BlockHandle:
        """Copy tensors into new blocks and publish them.

        `tensors` has every field, of its dtype, `[num_tokens, *shape]` (a transposed field
        `[k, num_tokens]`), on any device and with any strides; `"aux"`, int32[16], may be among
        them (else `aux[0]` is the number of tokens). Waits up to `timeout` seconds for blocks
        (None: for ever), then raises `PoolTimeoutError`. Raises TypeError or ValueError, which
        name the field, when a tensor does not fit.
        """
        num_tokens = count_tokens(self.config, tensors)
        with self.reserve(num_tokens, req_id=req_id, timeout=timeout) as reservation:
            fill(reservation.view, tensors, num_tokens)
            return reservation.publish(readers=readers, stream=stream)

    async def put_async(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        readers: int = 1,
        req_id: str | None = None,
        timeout: float | None = None,
        stream: Stream | None = None,
    ) -> BlockHandle:
        """`put` that waits in asyncio, and copies large tensors in a thread."""
        num_tokens = count_tokens(self.config, tensors)
        with await self.reserve_async(num_tokens, req_id=req_id, timeout=timeout) as reservation:
            view = reservation.view
            if self._is_on_gpu or num_tokens * self.config.token_bytes < _COPY_IN_THREAD:
                fill(view, tensors, num_tokens)
            else:
                import asyncio

                await asyncio.to_thread(fill, view, tensors, num_tokens)
            return reservation.publish(readers=readers, stream=stream)

    def take(self, handle: BlockHandle, *, stream: Stream | None = None) -> dict[str, torch.Tensor]:
        """Private copies of all fields and `"aux"` of published blocks; the lease is released.

        Raises what `open` raises.
        """
        with self.open(handle, stream) as lease:
            return _copied(lease.view)

    async def take_async(self, handle: BlockHandle) -> dict[str, torch.Tensor]:
        """`take` that waits in asyncio, and copies large tensors in a thread."""
        with await self.open_async(handle) as lease:
            view = lease.view
            if self._is_on_gpu or handle.num_tokens * self.config.token_bytes < _COPY_IN_THREAD:
                return _copied(view)
            import asyncio

            return await asyncio.to_thread(_copied, view)

    # ---- allocation --------------------------------------------------------------------------

    def reserve(
        self, num_tokens: int, *, req_id: str | None = None, timeout: float | None = None
    ) -> Reservation:
        """Reserve ceil(num_tokens / block_size) consecutive blocks, to be used in a `with` block.

        What was not published when the block ends is freed. Waits in the pool's wait queue, first
        come, first served over all processes, up to `timeout` seconds (None: for ever), then raises
        `PoolTimeoutError`, which names those who hold the blocks. `req_id`: 63 bytes that
        inspectors show.
        """
        moment = stamp()
        try:
            reserved = self._reserved_by_core(num_tokens, req_id, timeout, moment)
            if reserved is not None:
                return Reservation(self, reserved)
        except BaseException:
            self.state.take_back(moment)
            raise
        request = self._request(num_tokens, req_id)
        deadline = deadline_of(timeout)
        try:
            handle = self.state.reserve(request) or self._waiters.wait(request, deadline)
            return Reservation(self, handle)
        except (PoolClosedError, PoolTimeoutError):
            raise  # nothing was taken, and the lock is not to be had
        except BaseException:
            self.state.take_back(request.stamp)
            raise

    def reserve_now(self, num_tokens: int, *, req_id: str | None = None) -> Reservation | None:
        """`reserve` that does not wait; None: there are no free blocks now, or somebody waits."""
        request = self._request(num_tokens, req_id)
        try:
            handle = self.state.reserve(request)
            return None if handle is None else Reservation(self, handle)
        except (PoolClosedError, PoolTimeoutError):
            raise  # nothing was taken, and the lock is not to be had
        except BaseException:
            self.state.take_back(request.stamp)
            raise

    async def reserve_async(
        self, num_tokens: int, *, req_id: str | None = None, timeout: float | None = None
    ) -> Reservation:
        """`reserve` that waits its turn in asyncio; cancelling it leaves no trace."""
        request = self._request(num_tokens, req_id)
        deadline = deadline_of(timeout)
        try:
            return Reservation(self, await self._waiters.wait_async(request, deadline))
        except (PoolClosedError, PoolTimeoutError):
            raise  # nothing was taken, and the lock is not to be had
        except BaseException:
            self.state.take_back(request.stamp)
            raise

    def alloc(
        self,
        num_tokens: int,
        req_id: str | None = None,
        fake: bool = False,
        timeout: float | None = 0.0,
    ) -> BlockHandle | None:
        """Reserve ceil(num_tokens / block_size) consecutive blocks; None: none are free now.

        The reservation is this process's until it is published or freed. `req_id` is shown by
        inspectors (63 bytes of it). `fake` gives a handle of no blocks at all, for warm-up
        requests.

        `timeout` > 0 waits so many seconds (None: for ever), first come, first served over all
        processes, then raises `PoolTimeoutError`, which names those who hold the blocks. While
        any process waits, a call with `timeout=0` returns None. (`reserve` is the same, owned.)
        """
        if not fake:
            moment = stamp()
            try:
                reserved = self._reserved_by_core(num_tokens, req_id, timeout, moment)
                if reserved is not None:
                    return reserved
            except BaseException:
                self.state.take_back(moment)
                raise
        num_tokens = _whole("num_tokens", num_tokens)
        return self._alloc(self.config.blocks_for(num_tokens), num_tokens, req_id, fake, timeout)

    def _reserved_by_core(
        self, num_tokens: int, req_id: str | None, timeout: float | None, moment: int
    ) -> BlockHandle | None:
        """Blocks that the compiled core has reserved at once; None: do it by Python.

        A caller that is interrupted before it has stored the handle calls `take_back(moment)`.
        """
        core = self.state.core
        if core is None or not (timeout is None or timeout >= 0):
            return None
        return core.reserve(0, num_tokens, req_id, moment)

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
        """Reserve `num_blocks` consecutive blocks for `num_tokens` tokens; None: none are free now.

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
        if fake:
            self._require_capacity(num_blocks, num_tokens)
            return BlockHandle(0, num_blocks, num_tokens, 0, self.pool_id)
        request = self._request_blocks(num_blocks, num_tokens, req_id)
        deadline = deadline_of(timeout) if timeout else None
        try:
            handle = self.state.reserve(request)
            if handle is None and timeout != 0.0:
                handle = self._waiters.wait(request, deadline)
            return handle
        except (PoolClosedError, PoolTimeoutError):
            raise  # nothing was taken, and the lock is not to be had
        except BaseException:
            self.state.take_back(request.stamp)
            raise

    async def alloc_async(
        self, num_tokens: int, req_id: str | None = None, timeout: float | None = None
    ) -> BlockHandle:
        """`alloc` that waits its turn in asyncio; cancelling it leaves no trace."""
        request = self._request(num_tokens, req_id)
        return await self._waiters.wait_async(request, deadline_of(timeout))

    def _request(self, num_tokens: int, req_id: str | None) -> AllocRequest:
        num_tokens = _whole("num_tokens", num_tokens)
        return self._request_blocks(self.config.blocks_for(num_tokens), num_tokens, req_id)

    def _request_blocks(self, num_blocks: int, num_tokens: int, req_id: str | None) -> AllocRequest:
        self._require_capacity(num_blocks, num_tokens)
        total = self.state.layout.total_blocks
        if num_blocks > total:
            raise ValueError(
                f"num_tokens: pool {self.name} has {total} blocks, {num_blocks} can never be "
                "served: create a larger pool, or send the tokens in several allocations"
            )
        if req_id is not None and not isinstance(req_id, str):
            raise TypeError(f"req_id: expected str or None, got {type(req_id).__name__}")
        request_id = utf8_prefix(req_id, REQUEST_ID_BYTES) if req_id else b""
        return AllocRequest(num_blocks, num_tokens, request_id, stamp())

    def _require_capacity(self, num_blocks: int, num_tokens: int) -> None:
        capacity = num_blocks * self.config.block_size
        if num_tokens > capacity:
            raise ValueError(
                f"num_tokens: expected at most {capacity} for {num_blocks} blocks, got {num_tokens}"
            )

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
        return self.state.grow(real, num_tokens)

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
        real = self._real(handle)
        if self.streams.begun is not None or stream is not None:
            order = self.streams.order_of_writes(real, stream)
            if order is not None and self.streams.free_behind(order, real):
                return
        self.state.free(real)

    def free_own(self, handle: BlockHandle) -> None:
        """Free a reservation of this process; nothing happens when it is none any more."""
        if self.state.is_mine(handle):
            # The look takes no lock: the reservation may have been freed since.
            with contextlib.suppress(StaleHandleError):
                self.free(handle)

    def forgo(
        self, handle: BlockHandle, claims: int = 1, *, reader: ParticipantId | None = None
    ) -> bool:
        """End the claims of announced readers who will not come; with the last one it is free.

        Raises `InvalidStateError` when fewer are still to come. `reader`: end the claim of that
        participant, who was announced by name (`publish(readers=[...])`, `add_reader`); False: it
        has none, or has come.
        """
        real = self._real(handle)
        if reader is not None:
            return self.state.forgo_named(real, reader)
        self.state.forgo(real, _whole("claims", claims))
        return True

    def add_reader(self, handle: BlockHandle, reader: ParticipantId) -> None:
        """Announce published blocks to one more participant, by name, as `publish(readers=[...])`
        does.

        Whoever calls this must know that the blocks are there meanwhile: it has a lease on them, or
        a claim. Raises `PeerDiedError` when that participant is not attached any more,
        `StaleHandleError` when the blocks were freed, `InvalidStateError` when they are not
        published, `TooManyLeasesError`.
        """
        self.state.add_reader(self._real(handle), reader)

    def available_blocks(self) -> int:
        """Blocks in no allocation, of this moment."""
        return self.state.available_blocks()

    def handle_at(self, start_block: int) -> BlockHandle:
        """The handle of the allocation that starts at a block, for those who kept only the number.

        Raises `StaleHandleError` when none starts there. It proves nothing: between the reading and
        the use of the number the blocks may have gone to another.
        """
        start_block = operator.index(start_block)
        total = self.state.layout.total_blocks
        if not 0 <= start_block < total:
            raise ValueError(f"start_block: expected 0 to {total - 1}, got {start_block}")
        return self.state.handle_at(start_block)

    def field(self, name: str) -> torch.Tensor:
        """A field of the whole pool, `[total_tokens, *shape]`, as stored; `"aux"`: `[blocks, 16]`.

        For engines that register memory; everyone else takes a view of an allocation.
        """
        tensors = self._open_tensors()
        return tensors.whole_aux() if name == AUX else tensors.whole(name)

    # ---- writing and publishing --------------------------------------------------------------

    def view(self, handle: BlockHandle) -> BlockView:
        """The fields of a reservation of this process, to write (or, after a landing, to read)."""
        tensors, core = self._tensors, self.state.core
        if core is not None and tensors is not None and not self._is_on_gpu:
            view = core.view(handle, tensors, self._guard, self)
            if isinstance(view, BlockView):
                return view
        real = self._real(handle)
        if not self.state.seems_mine(real) and self.state.require_mine(real):
            self.streams.wait_for_writers(real)
        if self._is_on_gpu:
            self.streams.will_write(real)
        return BlockView(self._tensors or self._open_tensors(), real, self._guard, self)

    def _open_tensors(self) -> FieldTensors:
        tensors = self._tensors
        if tensors is None:
            raise self.state.mutex.closed()
        return tensors

    def _means(self, *, for_write: bool) -> LeaseMeans:
        """What a lease needs, prepared: each `open` asks."""
        if for_write or not self._read_only_leases or self.streams.begun is not None:
            return self._write_means or self._open_means()
        means = self._read_means
        if means is None:
            self._open_tensors()
            means = LeaseMeans(self.state, self.streams, read_only_tensors(self.state))
            self._read_means = means
        return means

    def _open_means(self) -> LeaseMeans:
        self._write_means = LeaseMeans(self.state, self.streams, self._open_tensors())
        return self._write_means

    def open_for_write(self, handle: BlockHandle, stream: Stream | None = None) -> Lease:
        """A writer's lease on a reservation, whoever owns it (a landing allocation).

        While it is open the blocks are not used again, even when their owner frees them. With a
        stream it is open until the stream has come to its release.
        """
        return self._open(handle, stream, for_write=True)

    def publish(
        self,
        handle: BlockHandle,
        *,
        readers: Readers = 1,
        num_tokens: int | None = None,
        stream: Stream | None = None,
        key: bytes | None = None,
        hold: float = 0.0,
    ) -> BlockHandle:
        """Make a reservation readable by `readers` leases; the last one released frees the blocks.

        `num_tokens` is the length actually written, if it is not the handle's. Give the handle that
        this returns to the readers. Unopened for the config's `unclaimed_timeout`, it is freed;
        with `readers=UNBOUNDED` any number may open it, until it is freed.

        `readers` may name who is to read, up to 32 participants (`find_participant`). Each of them,
        and nobody else, can open it once. A claim ends with the death of the participant that it
        was announced to, at the next `reap`; else after `unclaimed_timeout`, or with `forgo`.
        Raises `PeerDiedError` when one of them is not attached any more; nothing is published then.

        `stream`: what was enqueued there before is what writes; readers' streams wait for it. This
        returns at once, and the handle may travel at once. In a CUDA pool: torch's current stream.
        In a pool in host memory only when it is given, after `pin`.

        `key` (16 or 32 bytes, see `keys.py`) makes it an entry of the content cache, in the same
        commit: `get` finds it, and with `readers=UNBOUNDED` it stays until an allocation needs the
        room, but not before `hold` seconds. Raises `KeyExistsError` when the key has an entry; the
        reservation is free then.
        """
        real = self._real(handle)
        readers, named = _readers(readers, key)
        length = handle.num_tokens if num_tokens is None else _whole("num_tokens", num_tokens)
        self._require_capacity(handle.num_blocks, length)
        if stream is None and not self._is_on_gpu:
            if key is None:
                self.state.publish(real, length, readers, named=named)
            else:
                there = self.cache_state.publish(
                    real, length, readers, key, _seconds("hold", hold), False
                )
                if there is not None:
                    raise _key_exists(there)
        else:
            order = self.streams.order(stream)
            order.use.writing.discard(handle.generation)
            if key is None:
                self.state.publish(real, length, readers, True, named)
            else:
                there = self.cache_state.publish(
                    real, length, readers, key, _seconds("hold", hold), True
                )
                if there is not None:
                    self.streams.free_behind(order, real)
                    raise _key_exists(there)
            self.streams.make_ready(order, real)
        if length == handle.num_tokens:
            return handle
        start, blocks = handle.start_block, handle.num_blocks
        return BlockHandle(start, blocks, length, handle.generation, handle.pool_id)

    def channel(
        self,
        name: str,
        capacity: int = 1024,
        *,
        redeliver: bool = False,
        spin: float = LONGEST_SPIN,
    ) -> Channel:
        """The channel of that name, made if there is none; see `Channel`.

        name       1 to 63 bytes
        capacity   messages that senders may leave in it; of a channel that exists: what it has
        redeliver  the message of a receiver that dies goes to the next one; likewise
        spin       seconds that this process spins for a message before it sleeps

        Raises ValueError when the pool has no room for another channel
        (`PoolConfig(channels=..., channel_slots=...)`).
        """
        if not 1 <= len(name.encode()) <= NAME_BYTES:
            raise ValueError(f"name: expected 1 to {NAME_BYTES} bytes, got {name!r}")
        index = self.channel_state.make(name, _whole("capacity", capacity), redeliver)
        channel = Channel(self, self.channel_state, index, name, spin)
        self._channels.add(channel)
        return channel

    def send(
        self,
        channels: Sequence[Channel],
        blocks: Reservation | BlockHandle,
        *,
        readers: int | None = None,
        message: bytes = b"",
        num_tokens: int | None = None,
        stream: Stream | None = None,
        timeout: float | None = None,
    ) -> BlockHandle:
        """Publish blocks and announce them to several channels, in one commit: all or none.

        `readers`: None: one for each channel. The rest as in `Channel.send`.
        """
        return send(
            channels,
            blocks,
            readers=readers,
            message=message,
            num_tokens=num_tokens,
            stream=stream,
            timeout=timeout,
        )

    def prepare_send(
        self, handle: BlockHandle, readers: int, num_tokens: int | None, stream: Stream | None
    ) -> ReadyToSend:
        """Check what a channel is to publish; for `Channel`."""
        real = self._real(handle)
        if readers != UNBOUNDED:
            readers = _whole("readers", readers)
        length = handle.num_tokens if num_tokens is None else _whole("num_tokens", num_tokens)
        self._require_capacity(handle.num_blocks, length)
        order = None
        if stream is not None or self._is_on_gpu:
            order = self.streams.order(stream)
            order.use.writing.discard(handle.generation)
        start, blocks = handle.start_block, handle.num_blocks
        published = BlockHandle(start, blocks, length, handle.generation, handle.pool_id)
        return ReadyToSend(real, published, readers, order)

    def reading_means(self) -> LeaseMeans | None:
        """What leases of this process need, for the compiled core; None: streams order them."""
        means = self._read_means
        if means is not None and self.streams.begun is None:
            return means
        return None if self._is_on_gpu or self.is_closed else self._means(for_write=False)

    def lease_received(self, handle: BlockHandle, opened: Opened, message: bytes) -> Lease:
        """The lease that came by a channel; for `Channel`."""
        order = None
        if self._is_on_gpu:
            order = self.streams.order(None)
            order.use.memory()
        if not opened.is_ready:
            self.streams.wait_ready(handle, order)
        means = self._means(for_write=False)
        return Lease(handle, opened.key, means, self, order, opened.is_ready, message)

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
        return self._open(handle, stream)

    def _open(
        self, handle: BlockHandle, stream: Stream | None, *, for_write: bool = False
    ) -> Lease:
        core = self.state.core
        if core is not None and stream is None and not (for_write or self._is_on_gpu):
            made: list[Lease] = []
            try:
                if core.open(handle, self._means(for_write=False), self, made) is not None:
                    return made[0]
            except BaseException:
                self._undo_opens(made)
                raise
        return self._open_slowly(handle, stream, for_write)

    def _undo_opens(self, made: list[Lease]) -> None:
        """Interrupted before the caller had them: their readers are still to come."""
        for lease in made:
            self.state.undo_opens(lease.disown())

    def _open_slowly(self, handle: BlockHandle, stream: Stream | None, for_write: bool) -> Lease:
        real = self._real(handle)
        order = None
        if stream is not None or self._is_on_gpu:
            order = self.streams.order(stream)
            if self._is_on_gpu:
                order.use.memory()
        opened: Opened | None = None
        try:
            opened = self.state.open(real, for_write=for_write)
            if not opened.is_ready:
                self.streams.wait_ready(real, order)
            means = self._means(for_write=for_write)
            return Lease(real, opened.key, means, self, order, opened.is_ready)
        except BaseException:
            if opened is not None:
                self.state.undo_open(opened.key)
            raise

    async def open_async(self, handle: BlockHandle) -> Lease:
        """`open` for asyncio: what a producer's stream is to finish is awaited.

        In a CUDA pool torch's current stream waits for it, and this returns at once.
        """
        real = self._real(handle)
        if self._is_on_gpu:
            return self.open(real)
        opened: Opened | None = None
        try:
            opened = self.state.open(real)
            if not opened.is_ready:
                await self.streams.wait_ready_async(real)
            means = self._means(for_write=False)
            return Lease(real, opened.key, means, self, None, True)
        except BaseException:
            if opened is not None:
                self.state.undo_open(opened.key)
            raise

    # ---- the content cache -------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch that keys are to be made with; see `Namespace.key`. Lock-free."""
        return self.cache_state.epoch

    def bump_epoch(self) -> int:
        """Raise the epoch: keys that are made from now on reach nothing that was published before.

        For weights that were changed: pause the encoders, bump, resume. Old entries go when their
        room is needed (`drop_all` frees them now).
        """
        return self.cache_state.bump_epoch()

    def find(self, key: bytes) -> Found | None:
        """The entry of a key at this moment: its handle, and whether it is complete.

        Touches nothing, counts nothing, takes no lock. Only a hint: `get` decides.
        """
        return self.cache_state.find(key)

    def touch(self, key: bytes, hold: float = 0.0) -> bool:
        """Make an entry as young as one just used, and keep it for `hold` seconds at least; False:
        there is none."""
        return self.cache_state.touch(key, _seconds("hold", hold))

    def get(
        self, key: bytes, *, leases: int = 1, num_tokens: int | None = None
    ) -> list[Lease] | None:
        """So many leases on the entry of a key, in one commit; None: a miss.

        An entry with another number of tokens than `num_tokens` (None: any), one that a stream has
        not completed, or one to which fewer readers than `leases` are to come, is a miss. Release
        every lease; a lease may travel (`Lease.ticket`).
        """
        leases = _whole("leases", leases)
        core = self.state.core
        if core is not None and leases == 1 and not self._is_on_gpu:
            made: list[Lease] = []
            try:
                answer = core.get(key, num_tokens, self._means(for_write=False), self, made)
                if answer is not None:
                    return made or None
            except BaseException:
                self._undo_opens(made)
                raise
        taken: list[tuple[BlockHandle, Opened]] = []
        found: list[Lease] = []
        try:
            taken = self.cache_state.get(key, leases, num_tokens)
            for handle, opened in taken:
                found.append(self._lease_of(handle, opened.key))
            return found or None
        except BaseException:
            # What was made is known here: a list that is lost half-made would release its leases.
            for lease in found:
                lease.disown()
            for _, opened in taken:
                self.state.undo_open(opened.key)
            raise

    def get_tickets(self, key: bytes, *, leases: int = 1) -> Tickets | None:
        """As many leases as `get` takes, as tickets for those who will read; None: a miss.

        For a scheduler that promises an entry to its workers: it needs neither torch nor CUDA, also
        in a CUDA pool. Until a ticket is adopted its lease is this process's: `revoke` ends it.
        """
        leases = _whole("leases", leases)
        given: list[Ticket] = []
        try:
            given = self.cache_state.get_given(key, leases)
            if not given:
                return None
            handle = given[0].handle
            aux = bytes(self._open_tensors().aux_bytes(handle.start_block))
            return Tickets(handle, aux, [encode_ticket(ticket) for ticket in given])
        except BaseException:
            for ticket in given:
                self.cache_state.revoke(ticket)
            raise

    def _lease_of(self, handle: BlockHandle, key: LeaseKey) -> Lease:
        order = None
        if self._is_on_gpu:
            order = self.streams.order(None)
            order.use.memory()
        return Lease(handle, key, self._means(for_write=False), self, order, True)

    def adopt(self, ticket: bytes) -> Lease:
        """Make the lease that a ticket carries this process's own.

        Raises `StaleHandleError` when the ticket was used or revoked, or its giver has died or left
        before; `MalformedHandleError` for bytes that are no ticket.
        """
        decoded = decode_ticket(ticket)
        self._real(decoded.handle)
        opened: Opened | None = None
        try:
            opened = self.cache_state.adopt(decoded)
            return self._lease_of(decoded.handle, opened.key)
        except BaseException:
            if opened is not None:
                self.state.undo_open(opened.key)
            raise

    def revoke(self, ticket: bytes) -> bool:
        """Take back the lease of a ticket that this process gave; False: it was adopted, or has
        ended."""
        decoded = decode_ticket(ticket)
        self._real(decoded.handle)
        return self.cache_state.revoke(decoded)

    def drop(self, key: bytes) -> bool:
        """Free the entry of a key, at once or with its last lease; False: there is none."""
        return self.cache_state.drop(key)

    def drop_all(self) -> int:
        """Free every entry; how many there were."""
        return self.cache_state.drop_all()

    def claim(self, key: bytes) -> ClaimAnswer:
        """Say that this process is going to encode a key, unless it is there or somebody does.

        `.state` is `mine`: encode it, then `publish(key=...)`, or `end_claim`; `busy`: `.owner`
        does, since `.since_ns`; wait with `wait_for_claim`; `ready`: `get` it. A claim ends with
        the death of its owner.
        """
        return self.cache_state.claim(key)

    def end_claim(self, key: bytes, answer: ClaimAnswer | None = None) -> bool:
        """Give up this process's claim on a key; False: it has none.

        `answer`: the claim that was given with it, and no later one. An answer may travel: who has
        it gives the claim up for its owner.
        """
        return self.cache_state.end_claim(key, answer)

    def claimant(self, key: bytes) -> ParticipantId | None:
        """The living process that has claimed a key; None: nobody encodes it. Claims nothing."""
        return self.cache_state.claimant(key)

    def wait_for_claim(self, answer: ClaimAnswer, timeout: float) -> None:
        """Sleep until the claim of a `busy` answer has ended, in whatever way, `timeout` seconds at
        most; claim again then."""
        self._claim_waiters.wait(answer, timeout)

    async def wait_for_claim_async(self, answer: ClaimAnswer, timeout: float) -> None:
        """As `wait_for_claim`, from asyncio."""
        await self._claim_waiters.wait_async(answer, timeout)

    def entries(self) -> list[EntryInfo]:
        """Every entry of the cache, the one that was used the longest ago first."""
        return self.cache_state.entries()

    def cache_stats(self) -> CacheStats:
        """Counts of the cache, over all processes."""
        return self.cache_state.stats()

    # ---- looking after it --------------------------------------------------------------------

    def stats(self) -> PoolStats:
        """Counts of blocks by state, allocations, leases and participants."""
        return self.state.stats()

    def allocations(self) -> list[AllocationInfo]:
        """Every allocation: who holds it, for which request, since when, under which leases."""
        return self.state.allocations()

    def participants(self) -> list[ParticipantInfo]:
        """Everyone attached, and the dead who were not reaped yet."""
        return self.state.participant_infos()

    def waiters(self) -> list[WaiterInfo]:
        """Everyone in the wait queue for blocks, first come first."""
        return self.state.waiter_infos()

    def find_participant(self, role: str) -> ParticipantId | None:
        """A living participant with that role; a role may be an address, of up to 63 bytes."""
        return self.state.find_participant(role)

    def lock_timeout(self, seconds: float) -> contextlib.AbstractContextManager[None]:
        """In this context calls of this thread wait for the pool's lock for so many seconds only,
        and not the config's `lock_timeout`; then `PoolTimeoutError`.

        For threads that must not stand still, whatever another process does. No `await` within it.
        """
        return self.state.mutex.with_timeout(_seconds("seconds", seconds))

    def is_alive(self, who: ParticipantId) -> bool:
        """Whether that process is attached and lives."""
        return self.state.is_alive(who)

    def describe(self, who: ParticipantId) -> str:
        """For messages: `participant 3 (pid 4242, embedding)`."""
        return self.state.describe(who)

    def check(self) -> list[Violation]:
        """Every invariant that does not hold; empty when the pool is right."""
        return self.state.check()

    def reap(self) -> ReapReport:
        """Give back what the dead held and what nobody claimed in time.

        Runs by itself when an allocation would otherwise fail.
        """
        return self.state.reap()

    def reap_if_due(self) -> bool:
        """`reap`, if somebody died or a deadline passed; whether it did.

        For processes that live long and allocate nothing.
        """
        return self.state.reap_if_due()

    # ---- inside ------------------------------------------------------------------------------

    def _require_open(self) -> None:
        if self.is_closed:
            raise self.state.mutex.closed()

    def _real(self, handle: BlockHandle) -> BlockHandle:
        """The handle, if it can be one of this pool."""
        if _handle(handle).pool_id != self.state.pool_id:
            raise ForeignHandleError(
                f"{handle}: it is of pool {handle.pool_id:#x}, this is {self.name} "
                f"({self.pool_id:#x}): attach the pool that made it"
            )
        if handle.generation == 0:
            raise InvalidStateError(
                f"{handle}: a fake handle names no blocks; it can only be freed"
            )
        return handle


# The pools of this process, by their ids: one that is unpickled again is the same object.
_open_pools: weakref.WeakValueDictionary[int, BlockPool] = weakref.WeakValueDictionary()


def _reattach(
    name: str, pool_id: int, role: str, prefault: Prefault, read_only_leases: bool
) -> BlockPool:
    """Unpickling: this process's own pool object, or else attach, if it is still the same pool."""
    there = _open_pools.get(pool_id)
    if there is not None and not there.is_closed:
        return there
    pool = BlockPool.attach(name, role=role, prefault=prefault, read_only_leases=read_only_leases)
    if pool.pool_id != pool_id:
        pool.close()
        raise PoolNotFoundError(
            f"pool {name}: the pool that was sent is gone, another has taken its name"
        )
    return pool


def _copied(view: BlockView) -> dict[str, torch.Tensor]:
    import torch

    with torch.no_grad():
        copies = {name: view[name].clone() for name in view}
        copies[AUX] = view.aux.clone()
        return copies


def _waited(error: PoolNotFoundError, timeout: float) -> PoolNotFoundError:
    waited = f" (waited {timeout:g} s)" if timeout else ""
    return PoolNotFoundError(f"{error}{waited}")


def _key_exists(there: BlockHandle) -> KeyExistsError:
    return KeyExistsError(
        f"the key has an entry already, {there}: another process was faster; use that one (`get`)",
        there,
    )


def _readers(readers: Readers, key: bytes | None) -> tuple[int, Sequence[ParticipantId]]:
    """How many readers of no name, and those who have one."""
    if not isinstance(readers, Sequence):
        return (readers if readers == UNBOUNDED else _whole("readers", readers)), ()
    if not 1 <= len(readers) <= MOST_NAMED_READERS:
        raise ValueError(
            f"readers: expected 1 to {MOST_NAMED_READERS} participants, got {len(readers)}; "
            "announce the others with `add_reader`"
        )
    if key is not None:
        raise ValueError("readers: an entry of the cache has no readers by name; give a number")
    return 0, tuple(readers)


def _seconds(what: str, value: float) -> float:
    if not 0 <= value <= MAX_SECONDS:
        raise ValueError(f"{what}: expected seconds from 0 to {MAX_SECONDS:g}, got {value}")
    return value


def _require_known(prefault: Prefault) -> None:
    if prefault not in get_args(Prefault):
        raise ValueError(
            f"prefault: expected one of {', '.join(get_args(Prefault))}, got {prefault!r}"
        )


def _role(role: str) -> str:
    if not isinstance(role, str):
        raise TypeError(f"role: expected str, got {type(role).__name__}")
    return role


def _handle(handle: BlockHandle) -> BlockHandle:
    """Any handle, of whatever pool; TypeError for anything else."""
    if not isinstance(handle, BlockHandle):
        raise TypeError(f"handle: expected BlockHandle, got {type(handle).__name__}")
    return handle


def _whole(what: str, value: int) -> int:
    """A whole number of at least 1 that no pool's arithmetic can overflow."""
    number = operator.index(value)
    if not 1 <= number <= _MOST:
        raise ValueError(f"{what}: expected a whole number from 1 to {_MOST}, got {value}")
    return number
