"""What a process holds: leases on published blocks, and reservations that it writes.

Contract
- A lease ends once, however often it is released; after its pool was closed, or in a forked child,
  releasing it does nothing. A reservation is published once, or freed.
- Both keep their pool alive, and end when they are dropped, with a ResourceWarning: at once, or
  from a helper thread when the collector runs inside a transaction.
- Both own something, so that they refuse to be copied and pickled: two owners would end it twice.
"""

from __future__ import annotations

import mmap
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, NoReturn, Protocol

from shmblocks import _core
from shmblocks._state.blocks import LeaseKey
from shmblocks._state.cache_state import CacheState, Ticket
from shmblocks._state.info import ParticipantId
from shmblocks._state.mutex import is_inside
from shmblocks._state.pool_state import PoolState
from shmblocks.cuda.order import StreamOrder
from shmblocks.errors import InvalidStateError, ShmBlocksError
from shmblocks.handle import BlockHandle
from shmblocks.tickets import encode_ticket
from shmblocks.view import BlockView, FieldTensors, HostMemory, LeaseGuard, bytes_as_tensor

if TYPE_CHECKING:
    import torch

    from shmblocks.cuda.use import Order, Stream


# How many readers are announced, or which.
Readers = int | Sequence[ParticipantId]


class _Owner(Mapping[str, "torch.Tensor"]):
    """A claim of this process that cannot be copied; gives the fields of its allocation."""

    __slots__ = ("__weakref__",)

    @property
    def view(self) -> BlockView:
        """The fields of the allocation, in place."""
        raise NotImplementedError

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.view[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.view)

    def __len__(self) -> int:
        return len(self.view)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    @property
    def aux(self) -> torch.Tensor:
        """int32[16] of the allocation."""
        return self.view.aux

    def memory(self, name: str) -> memoryview:
        """The bytes of a field's rows, in place; see `BlockView.memory`."""
        return self.view.memory(name)

    def tensor(self, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """In a byte pool (`byte_config`): the first bytes of the blocks as a contiguous tensor of
        that dtype and shape, in place. ValueError when it does not fit."""
        return bytes_as_tensor(self.view, dtype, shape)

    def __copy__(self) -> NoReturn:
        raise TypeError(f"{self!r}: it is owned and cannot be copied; {self._instead}")

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise TypeError(f"{self!r}: it is owned and cannot be copied; {self._instead}")

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self!r}: it is owned and cannot be pickled; {self._instead}")

    _instead = "send its `handle`, which the other process opens"


class LeaseMeans(NamedTuple):
    """What leases of one pool need of it."""

    state: PoolState
    streams: StreamOrder
    tensors: FieldTensors


class Lease(_Owner):
    """A claim on blocks of a pool; release it, or use it in a `with` statement.

    It is a mapping of field names to tensors, `lease["input_embeddings"]`, in place. On a host pool
    that was attached with `read_only_leases` (the default) writing to such a tensor is a
    segmentation fault: other readers see the same memory. Owns the claim, keeps the pool alive.
    """

    __slots__ = (
        "_guard",
        "_key",
        "_order",
        "_owner",
        "_state",
        "_streams",
        "_tensors",
        "handle",
        "message",
    )

    def __init__(
        self,
        handle: BlockHandle,
        key: LeaseKey,
        means: LeaseMeans,
        owner: object,
        order: Order | None,
        is_ready: bool,
        message: bytes = b"",
    ) -> None:
        """For `BlockPool.open` and its like; takes over the claim of `key`, keeps `owner` alive."""
        self.handle = handle
        # What the sender of a channel said with it.
        self.message = message
        self._state = means.state
        self._streams = means.streams
        self._tensors = means.tensors
        self._owner = owner
        self._order = order
        # The CPU waits before there is a lease; a stream waits by itself.
        self._guard = LeaseGuard(means.state, is_ready or order is None)
        # Set last: `__del__` treats an object with `_key` as fully constructed.
        self._key: LeaseKey | None = key

    @property
    def is_released(self) -> bool:
        """Whether it was released, or its pool closed in this process."""
        return self._key is None or self._state.is_closed

    @property
    def view(self) -> BlockView:
        """The fields of the allocation; raises `InvalidStateError` after the release."""
        self._guard.require(self.handle)
        return BlockView(self._tensors, self.handle, self._guard, self)

    def __getitem__(self, name: str) -> torch.Tensor:
        handle, tensors = self.handle, self._tensors
        self._guard.require(handle)
        return tensors.rows(name, handle.start_block * tensors.block_size, handle.num_tokens)

    @property
    def is_ready(self) -> bool:
        """Whether the producer's stream has come to its `publish`.

        False: what is enqueued on the lease's stream waits for it. Raises `PeerDiedError` when the
        producer died before.
        """
        self._guard.require(self.handle)
        return self._guard.is_ready

    def release(self, stream: Stream | None = None) -> None:
        """End the claim; idempotent.

        A lease on a stream ends when that stream has come here (`stream`: another one than it was
        opened on); this returns at once.
        """
        core = self._state.core
        if core is not None and stream is None and core.release(self):
            return
        key = self._key
        if key is not None and not self._state.is_closed:
            order = self._order
            if stream is not None:
                order = self._streams.order(stream)
            elif order is not None:
                order.refuse_capture()
            _end(self._state, key, order)
        self._is_over()

    def end_with(self, owner: object) -> None:
        """Release the lease when `owner` is collected, if it was not released before.

        For engines that keep a tensor of it in an object of theirs. The lease is kept until then;
        `owner` must allow weak references.
        """
        self._guard.require(self.handle)
        finalizer = weakref.finalize(owner, _end_with_owner, self)
        # At the end of the process the pool is left, which gives back everything.
        finalizer.atexit = False

    def private(self, name: str) -> torch.Tensor:
        """The rows of a field as this process's own, copy-on-write: it may write to them, and
        nobody else sees it. No byte is copied before.

        The lease goes over to the tensor's memory and ends with it; here it is over. Raises
        `InvalidStateError` for a CUDA pool, a lease on a stream, and one that has ended.
        """
        self._guard.require(self.handle)
        state, key = self._state, self._key
        if self._order is not None or state.config.is_on_gpu or key is None:
            raise InvalidStateError(
                f"{self.handle}: private memory needs a pool in host memory, and a lease without a "
                "stream; clone the tensor instead"
            )
        rows, mapping = self._private_rows(name)
        means = LeaseMeans(state, self._streams, self._tensors)
        heir: Lease | None = None
        try:
            heir = Lease(self.handle, key, means, self._owner, None, True)
            self._is_over()
            heir.end_with(mapping)
            return rows
        except BaseException:
            # Nobody has the tensor: the lease is to be released here.
            if heir is not None:
                heir.disown()
            self._key = key
            self._guard.is_open = True
            raise

    def _private_rows(self, name: str) -> tuple[torch.Tensor, mmap.mmap]:
        """The rows of a field in a mapping of their own, and that mapping, which the tensor holds;
        a lease has to last as long."""
        state, handle = self._state, self.handle
        first = handle.start_block * state.config.block_size
        row_bytes = self._tensors.field(name).token_bytes
        begin = state.layout.fields[name] + first * row_bytes
        start = begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        length = begin + handle.num_tokens * row_bytes - start
        mapping = state.segment.private_mapping(start, length)
        fields = FieldTensors(state.config, state.layout, HostMemory(mapping, start))
        return fields.rows(name, first, handle.num_tokens), mapping

    def give_back(self) -> None:
        """End the claim as if it had never been opened: its reader is still to come. Idempotent.

        For one who could not pass on what it read. Nothing may read the blocks on a stream.
        """
        key = self._key
        if key is not None and not self._state.is_closed:
            self._state.release(key, unread=True)
        self._is_over()

    def _is_over(self) -> None:
        self._key = None
        self._guard.is_open = False

    def disown(self) -> int:
        """Somebody else ends the claim; when it was opened, in ns. For this package alone."""
        key = self._key
        self._is_over()
        return key.opened_ns if key is not None else 0

    def ticket(self) -> bytes:
        """Give the claim away, as at most 64 bytes, to whoever calls `BlockPool.adopt` with them.

        The lease is over here then. Until it is adopted the claim is still this process's: it ends
        when this process dies or leaves the pool, and `BlockPool.revoke` takes it back. Raises
        `InvalidStateError` for a lease that has ended, or that a stream works under.
        """
        self._guard.require(self.handle)
        if self._order is not None or self._key is None:
            raise InvalidStateError(
                f"{self.handle}: a lease on a stream cannot travel; wait for the stream first"
            )
        key = self._key
        try:
            number = CacheState(self._state).give(key)
            ticket = encode_ticket(Ticket(key.slot, number, self.handle))
            self._is_over()
            return ticket
        except BaseException:
            # Nobody has the ticket: the lease is to be released here.
            self._key = key
            self._guard.is_open = True
            raise

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        if self._end_if_held():
            warnings.warn(f"{self.handle}: lease was not released", ResourceWarning, stacklevel=2)

    def _end_if_held(self) -> bool:
        """For the collector: end the claim, from a thread if need be; False: it had ended."""
        key = getattr(self, "_key", None)
        if key is None or sys.is_finalizing():
            return False
        state = self._state
        self._is_over()
        if state.is_closed or key.holder != state.participants.me_word:
            return False  # given back already; in a forked child: it is the parent's
        _end_dropped(state, key, self._order)
        return True

    def __repr__(self) -> str:
        return f"Lease({self.handle}, {'released' if self.is_released else 'open'})"


def _end_with_owner(lease: Lease) -> None:
    lease._end_if_held()


def _end(state: PoolState, key: LeaseKey, order: Order | None) -> None:
    """End a lease now, or when a stream has come here.

    On a stream it is enqueued first and marked second: killed or interrupted between the two, it is
    an open lease, which ends with its holder or is released again. The other way round it could
    stay pending for ever.
    """
    if order is None:
        state.release(key)
    elif key.holder == state.participants.me_word:
        order.write(state.layout.acknowledged_word(key.slot), key.generation)
        state.mark_pending(key)


def _end_dropped(state: PoolState, key: LeaseKey, order: Order | None) -> None:
    """The collector can run while its own thread holds the lock: a helper thread ends it then."""
    if not is_inside():
        _end_quietly(state, key, order)
        return
    helper = threading.Thread(
        target=_end_quietly, args=(state, key, order), name="shmblocks-releasing", daemon=True
    )
    try:
        helper.start()
    except RuntimeError:
        return  # no thread is to be had: it ends with the pool


def _end_quietly(state: PoolState, key: LeaseKey, order: Order | None) -> None:
    try:
        _end(state, key, order)
    except ShmBlocksError:
        return  # closed meanwhile, or its lock is held by a stopped process: it ends with the pool


_core.know("lease", Lease)


class Reserves(Protocol):
    """What a reservation asks of the pool that it is of."""

    state: PoolState

    @property
    def is_closed(self) -> bool: ...

    def view(self, handle: BlockHandle) -> BlockView: ...

    def grow(self, handle: BlockHandle, num_tokens: int) -> BlockHandle | None: ...

    def free_own(self, handle: BlockHandle) -> None: ...

    def publish(
        self,
        handle: BlockHandle,
        *,
        readers: Readers = 1,
        num_tokens: int | None = None,
        stream: Stream | None = None,
        key: bytes | None = None,
        hold: float = 0.0,
    ) -> BlockHandle: ...


class Reservation(_Owner):
    """Blocks that this process writes: publish them, or they are freed when the `with` block ends.

    It is a mapping of field names to tensors, `r["input_embeddings"]`, in place. Owns the blocks,
    keeps the pool alive.
    """

    __slots__ = ("_handle", "_is_over", "_pool")

    def __init__(self, pool: Reserves, handle: BlockHandle) -> None:
        """For `BlockPool.reserve`; takes over the reservation."""
        self._pool = pool
        self._handle = handle
        self._is_over = False

    @property
    def handle(self) -> BlockHandle:
        """The handle of the blocks; another one after `grow`."""
        return self._handle

    @property
    def is_over(self) -> bool:
        """Whether it was published or freed."""
        return self._is_over

    @property
    def view(self) -> BlockView:
        """The fields of the reservation; raises `InvalidStateError` once it is over."""
        self._require_open()
        return self._pool.view(self._handle)

    def _require_open(self) -> None:
        if self._is_over:
            raise InvalidStateError(
                f"{self._handle}: the reservation was published or freed; write within it"
            )

    def grow(self, num_tokens: int) -> bool:
        """Extend it in place to `num_tokens` tokens; False: the blocks behind it are taken.

        The content stays. Views that were taken before are stale.
        """
        self._require_open()
        grown = self._pool.grow(self._handle, num_tokens)
        if grown is None:
            return False
        self._handle = grown
        return True

    def publish(
        self,
        *,
        readers: Readers = 1,
        num_tokens: int | None = None,
        stream: Stream | None = None,
        key: bytes | None = None,
        hold: float = 0.0,
    ) -> BlockHandle:
        """Make it readable; see `BlockPool.publish`. The handle that this returns is to travel."""
        self._require_open()
        handle = self._pool.publish(
            self._handle,
            readers=readers,
            num_tokens=num_tokens,
            stream=stream,
            key=key,
            hold=hold,
        )
        self._is_over = True
        return handle

    def note_published(self) -> None:
        """A channel has published it."""
        self._is_over = True

    def free(self) -> None:
        """Give the blocks back, unless it is over; idempotent."""
        if not self._is_over and not self._pool.is_closed:
            self._pool.free_own(self._handle)
        self._is_over = True

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()

    async def __aenter__(self) -> Reservation:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.free()

    def __del__(self) -> None:
        if getattr(self, "_is_over", True) or sys.is_finalizing():
            return
        pool = self._pool
        if pool.is_closed or not pool.state.is_mine(self._handle):
            return  # given back already; published behind our back; in a fork: the parent's
        if is_inside():
            helper = threading.Thread(
                target=_free_quietly, args=(self._pool, self._handle), daemon=True
            )
            try:
                helper.start()
            except RuntimeError:
                return
        else:
            _free_quietly(self._pool, self._handle)
        warnings.warn(
            f"{self._handle}: reservation was neither published nor freed",
            ResourceWarning,
            stacklevel=2,
        )

    def __repr__(self) -> str:
        return f"Reservation({self._handle}, {'over' if self._is_over else 'open'})"


def _free_quietly(pool: Reserves, handle: BlockHandle) -> None:
    try:
        pool.free_own(handle)
    except ShmBlocksError:
        return  # closed meanwhile: it was given back
