"""`TensorCache`: tensors of any dtype and shape, found by what they are, shared by all processes.

    cache = TensorCache(BlockPool.ensure("vision", byte_config(8 << 30)))
    found = cache.get_or_claim(key, timeout=30.0)
    if found.is_claim:
        with found:                                   # encode it; nobody else does meanwhile
            found.put(encoder(picture))
    else:
        with found:
            language_model(found.tensor)              # over the pool's memory, no copy

Contract
- One entry is one tensor. Its dtype and shape stand with it, and are compared by whoever says what
  it expects: a reused key for something else is a miss.
- An entry stays until an allocation needs the room; what is leased or held is never evicted.
- A tensor of a lease lies in the pool's memory and is valid until the lease is released.
- A claim ends when its key is put, when it is abandoned or dropped, and with its owner's death.

The pool is a *byte pool*: it has one field of raw bytes, so that any process can create it before a
width is known, and several models share it. What does not fit a block's `aux` is not supported:
tensors of more than 8 dimensions.
"""

from __future__ import annotations

import contextlib
import math
import struct
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, NoReturn

from shmblocks._state.cache_state import ClaimAnswer
from shmblocks._state.counters import Counter
from shmblocks._state.layout import UNBOUNDED
from shmblocks._state.mutex import is_inside
from shmblocks.config import DTYPES, Field, PoolConfig, dtype_name
from shmblocks.errors import (
    IncompatibleConfigError,
    KeyExistsError,
    PoolTimeoutError,
    ShmBlocksError,
)
from shmblocks.handle import BlockHandle
from shmblocks.lease import Lease, Reservation
from shmblocks.pool import BlockPool

if TYPE_CHECKING:
    import torch

    from shmblocks.cuda.use import Stream
    from shmblocks.nodes import Nodes

# A token of a byte pool. 4 KiB: a page, so that a copy-on-write view of an entry is possible.
ROW_BYTES = 4096
FIELD = "bytes"
MAX_DIMS = 8
# Seconds between two looks at an entry that a stream is to complete.
READY_POLL = 1e-3
# In `aux`: a mark, the dtype's number, the number of dimensions, and the dimensions; behind them
# 16 bytes of the user's.
_ENTRY = struct.Struct(f"<2sBB{MAX_DIMS}I")
_MARK = b"T1"
_DTYPES = tuple(DTYPES)


def byte_config(
    size_bytes: int,
    *,
    block_bytes: int = 64 * 1024,
    max_leases: int = 4096,
    max_participants: int = 64,
    group: str | None = None,
    device: str = "cpu",
) -> PoolConfig:
    """The config of a byte pool of about `size_bytes`, in blocks of `block_bytes`.

    Every process of a node can compute it alike, so that `BlockPool.ensure` makes or finds the
    pool, whoever comes first.
    """
    rows = block_bytes // ROW_BYTES
    if rows < 1 or block_bytes % ROW_BYTES:
        raise ValueError(f"block_bytes: expected a multiple of {ROW_BYTES}, got {block_bytes}")
    blocks = size_bytes // block_bytes
    if blocks < 1:
        raise ValueError(f"size_bytes: expected at least {block_bytes}, got {size_bytes}")
    return PoolConfig(
        total_tokens=blocks * rows,
        fields=(Field(FIELD, (ROW_BYTES,), "uint8"),),
        block_size=rows,
        default_num_blocks=1,
        # Measured: what hits by bytes differs by a point (`scripts/bench hit_rates`).
        allocation="first fit",
        max_leases=max_leases,
        max_participants=max_participants,
        group=group,
        device=device,
    )


class CacheLease:
    """A tensor of the cache; release it, or use it in a `with` statement. Owns its lease."""

    is_claim: Literal[False] = False

    def __init__(self, lease: Lease, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """For `TensorCache`; takes over the lease."""
        self._lease = lease
        self.dtype = dtype
        self.shape = shape

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor in the pool's memory, contiguous; nobody may write to it.

        Valid until `release`; after it this raises `InvalidStateError`.
        """
        return self._lease.tensor(self.dtype, self.shape)

    @property
    def is_released(self) -> bool:
        """Whether it was released, or the pool closed in this process."""
        return self._lease.is_released

    def ticket(self) -> bytes:
        """Give the lease away; see `Lease.ticket` and `TensorCache.adopt`."""
        return self._lease.ticket()

    def release(self, stream: Stream | None = None) -> None:
        """End the lease; idempotent. `stream`: when it has come here (a CUDA or pinned pool)."""
        self._lease.release(stream)

    def __enter__(self) -> CacheLease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a lease cannot be copied or pickled; send its `ticket()`")

    def __repr__(self) -> str:
        return f"CacheLease({tuple(self.shape)}, {self.dtype}, {self._lease!r})"


class Claim:
    """The right, and the duty, to encode one key; `put` it, or `abandon`. Use it in a `with`
    statement: what was not put when the block ends is abandoned.

    One that is dropped is abandoned, too, with a ResourceWarning: nobody waits for it for ever.
    """

    is_claim: Literal[True] = True

    def __init__(self, cache: TensorCache, key: bytes, answer: ClaimAnswer | None) -> None:
        """For `TensorCache`; takes over the claim. Without an answer nobody else knows of it: the
        key has an entry of another shape or dtype."""
        self._cache = cache
        self.key = key
        # Set last: `__del__` treats an object with `_answer` as fully constructed.
        self._answer = answer

    def put(self, tensor: torch.Tensor, *, hold: float = 0.0, stream: Stream | None = None) -> bool:
        """As `TensorCache.put` under the claim's key, which ends the claim."""
        is_stored = self._cache.put(self.key, tensor, hold=hold, stream=stream)
        self._answer = None
        return is_stored

    @property
    def is_known(self) -> bool:
        """Whether others wait for its end, and what is put under it is stored."""
        return self._answer is not None

    def abandon(self) -> None:
        """Let another one encode it; idempotent."""
        answer, pool = self._answer, self._cache.pool
        # (In a forked child it is the parent's.)
        if answer is not None and answer.slot >= 0 and pool.participant == answer.owner:
            pool.end_claim(self.key, answer)
        self._answer = None

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()

    def __del__(self) -> None:
        answer = getattr(self, "_answer", None)
        if answer is None or answer.slot < 0 or sys.is_finalizing():
            return
        if self._cache.pool.is_closed or self._cache.pool.participant != answer.owner:
            return  # it has ended; in a forked child: it is the parent's
        if is_inside():
            # The collector runs inside a transaction of this thread.
            helper = threading.Thread(target=_abandon_quietly, args=(self,), daemon=True)
            with contextlib.suppress(RuntimeError):
                helper.start()
        else:
            _abandon_quietly(self)
        warnings.warn(
            f"key {self.key.hex()}: the claim was neither put nor abandoned",
            ResourceWarning,
            stacklevel=2,
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError("a claim cannot be copied or pickled; it is this process's")

    def __repr__(self) -> str:
        return f"Claim({self.key.hex()}, {'over' if self._answer is None else 'open'})"


def _abandon_quietly(claim: Claim) -> None:
    with contextlib.suppress(ShmBlocksError):  # closed meanwhile: it has ended
        claim.abandon()


class TensorTickets(NamedTuple):
    """Leases on one tensor that travel: a ticket for each; its dtype by name (`bf16`), its shape,
    its size."""

    tickets: list[bytes]
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


class TensorCache:
    """A cache of tensors in a byte pool, shared by every process that is attached to it.

    Borrows the pool. All methods may be called from any thread.
    """

    def __init__(
        self, pool: BlockPool, *, nodes: Nodes | Sequence[tuple[str, int] | str] = ()
    ) -> None:
        """`pool`: of a config like `byte_config` makes.

        `nodes`: all nodes that share their caches, as (host, port) or "host:port", this one among
        them; the key between them is the content of the file that SHMBLOCKS_KEY_FILE names. Or a
        `shmblocks.nodes.Nodes`, which stays the caller's. What this node has not is then fetched
        from the key's owner (`Nodes.owner_of`), and becomes an entry here.
        """
        fields = pool.config.fields
        if len(fields) != 1 or fields[0].name != FIELD or fields[0].dtype != "uint8":
            raise IncompatibleConfigError(
                f"pool {pool.name}: expected a byte pool (`byte_config`), got the fields "
                f"{', '.join(field.name for field in fields) or '(none)'}"
            )
        self.pool = pool
        self._row_bytes = fields[0].token_bytes
        self._nodes = _nodes_of(pool, nodes) if nodes != () else None
        self._owns_nodes = self._nodes is not nodes

    def close(self) -> None:
        """End the connections to other nodes that this made; the pool stays open. Idempotent.

        Call it before the pool is closed. Without `nodes` there is nothing to do.
        """
        if self._nodes is not None and self._owns_nodes:
            self._nodes.close()

    # ---- putting -----------------------------------------------------------------------------

    def put(
        self, key: bytes, tensor: torch.Tensor, *, hold: float = 0.0, stream: Stream | None = None
    ) -> bool:
        """Copy a tensor into the cache, and end this process's claim on its key.

        False when it is not stored by this call: there is no room that may be evicted (then nothing
        is), or the key has an entry already. Never waits for room. `hold`: seconds in which it is
        not evicted. `stream`: the copy is enqueued there, and readers' streams wait for it.
        """
        is_over = False
        try:
            reservation = self._reserve(tensor)
            if reservation is None:
                self.pool.cache_state.count(Counter.SKIPPED)
                return False
            with reservation:
                self._fill(reservation, tensor, stream)
                reservation.publish(readers=UNBOUNDED, key=key, hold=hold, stream=stream)
            is_over = True
            return True
        except KeyExistsError:
            is_over = True
            return False
        finally:
            if not is_over:  # else the publish has ended it
                self.pool.end_claim(key)

    def put_many(
        self,
        items: Iterable[tuple[bytes, torch.Tensor]],
        *,
        hold: float = 0.0,
        stream: Stream | None = None,
    ) -> int:
        """`put` each of them; how many were stored."""
        return sum(self.put(key, tensor, hold=hold, stream=stream) for key, tensor in items)

    async def put_async(
        self, key: bytes, tensor: torch.Tensor, *, hold: float = 0.0, stream: Stream | None = None
    ) -> bool:
        """`put` that copies in a thread, so that the event loop goes on meanwhile."""
        import asyncio

        return await asyncio.to_thread(self.put, key, tensor, hold=hold, stream=stream)

    def _reserve(self, tensor: torch.Tensor) -> Reservation | None:
        dtype_name(tensor.dtype)  # ValueError: not supported
        if tensor.dim() > MAX_DIMS or not tensor.numel():
            raise ValueError(
                f"tensor: expected 0 to {MAX_DIMS} dimensions and at least one element, got "
                f"{list(tensor.shape)}"
            )
        num_rows = self._rows_of(tensor.numel() * tensor.dtype.itemsize)
        if self.pool.config.blocks_for(num_rows) > self.pool.config.total_blocks:
            return None
        return self.pool.reserve_now(num_rows)

    def _fill(self, reservation: Reservation, tensor: torch.Tensor, stream: Stream | None) -> None:
        import torch

        with torch.no_grad(), _on(stream):
            rows = reservation.tensor(tensor.dtype, tensor.shape)
            # Without a stream nobody would wait for a copy that goes on behind this call.
            rows.copy_(tensor, non_blocking=stream is not None or rows.is_cuda)
        number = _DTYPES.index(dtype_name(tensor.dtype))
        shape = (*tensor.shape, *(0,) * (MAX_DIMS - tensor.dim()))
        aux = reservation.memory("aux")
        aux[: _ENTRY.size] = _ENTRY.pack(_MARK, number, tensor.dim(), *shape)

    # ---- getting -----------------------------------------------------------------------------

    def get(
        self,
        key: bytes,
        *,
        shape: tuple[int, ...] | None = None,
        dtype: torch.dtype | None = None,
    ) -> CacheLease | None:
        """The tensor of a key; None: a miss.

        One of another shape or dtype than given (None: any) is a miss, and counted as mismatch.
        With `nodes` this fetches it, if no other process of this node is at it.
        """
        lease = self._lease_here(key) or self._fetch(key)
        return None if lease is None else self.as_expected(lease, shape, dtype)

    def _lease_here(self, key: bytes) -> Lease | None:
        leases = self.pool.get(key)
        return leases[0] if leases else None

    def get_here(
        self, key: bytes, shape: tuple[int, ...] | None, dtype: torch.dtype | None
    ) -> CacheLease | None:
        """`get` of this node's entries alone."""
        lease = self._lease_here(key)
        return None if lease is None else self.as_expected(lease, shape, dtype)

    def _fetch(self, key: bytes) -> Lease | None:
        """The entry of the key's owner, unless somebody of this node is at it already."""
        if self._nodes is None:
            return None
        answer = self.pool.claim(key)
        if answer.state != "mine":
            return None
        try:
            return self._nodes.fetch_key(key)
        finally:
            self.pool.end_claim(key, answer)

    def as_expected(
        self, lease: Lease, shape: tuple[int, ...] | None, dtype: torch.dtype | None
    ) -> CacheLease | None:
        """The tensor that a lease is on; None, and no lease, when another one was expected."""
        found = self._lease_of(lease)
        if (shape is not None and found.shape != tuple(shape)) or (
            dtype is not None and found.dtype != dtype
        ):
            found.release()
            self.pool.cache_state.count(Counter.MISMATCHES)
            return None
        return found

    def get_tickets(self, key: bytes, *, leases: int = 1) -> TensorTickets | None:
        """So many leases on the tensor of a key, as tickets for others to adopt; None: a miss.

        Needs neither torch nor CUDA; see `BlockPool.get_tickets`.
        """
        found = self.pool.get_tickets(key, leases=leases)
        if found is None:
            return None
        try:
            dtype, shape = self._entry_of(found.aux, found.handle)
            return TensorTickets(found.tickets, dtype, shape, math.prod(shape) * DTYPES[dtype][0])
        except BaseException:
            for ticket in found.tickets:
                self.pool.revoke(ticket)
            raise

    def adopt(self, ticket: bytes) -> CacheLease:
        """Make the lease that a ticket carries this process's own; see `BlockPool.adopt`."""
        return self._lease_of(self.pool.adopt(ticket))

    def _lease_of(self, lease: Lease) -> CacheLease:
        import torch

        try:
            name, shape = self._entry_of(lease.memory("aux"), lease.handle)
            dtype: torch.dtype = getattr(torch, DTYPES[name][1])
            return CacheLease(lease, dtype, shape)
        except BaseException:
            lease.release()
            raise

    def _entry_of(
        self, aux: bytes | memoryview, handle: BlockHandle
    ) -> tuple[str, tuple[int, ...]]:
        """The dtype and the shape that stand in `aux`; IncompatibleConfigError when the entry's
        rows are not those of such a tensor."""
        mark, number, dims, *lengths = _ENTRY.unpack_from(aux)
        if mark == _MARK and number < len(_DTYPES) and dims <= MAX_DIMS:
            dtype, shape = _DTYPES[number], tuple(lengths[:dims])
            if self._rows_of(math.prod(shape) * DTYPES[dtype][0]) == handle.num_tokens:
                return dtype, shape
        raise IncompatibleConfigError(f"{handle}: expected an entry that a TensorCache has put")

    def _rows_of(self, num_bytes: int) -> int:
        """Rows of the pool that a tensor takes."""
        return -(-num_bytes // self._row_bytes)

    def get_or_claim(
        self,
        key: bytes,
        *,
        timeout: float | None = None,
        shape: tuple[int, ...] | None = None,
        dtype: torch.dtype | None = None,
    ) -> CacheLease | Claim:
        """The tensor of a key, or the claim on it: then this process encodes it.

        While another process encodes it, this waits up to `timeout` seconds (None: for ever), then
        raises `PoolTimeoutError`, which names that process. When it dies, the next one in wait gets
        the claim. With `nodes` the key's owner is asked under the claim, before it is given: that
        takes as long as the fetch does, and some seconds at most.
        """
        wanted = _Wanted(self, key, timeout, shape, dtype)
        while (found := wanted.attempt()) is None:
            if wanted.answer.state == "ready":
                time.sleep(wanted.seconds)
            else:
                self.pool.wait_for_claim(wanted.answer, wanted.seconds)
        if self._nodes is None or not (found.is_claim and found.is_known):
            return found
        try:
            fetched = self._nodes.fetch_key(key)
        except BaseException:
            found.abandon()
            raise
        return wanted.fetched(found, fetched)

    async def get_or_claim_async(
        self,
        key: bytes,
        *,
        timeout: float | None = None,
        shape: tuple[int, ...] | None = None,
        dtype: torch.dtype | None = None,
    ) -> CacheLease | Claim:
        """`get_or_claim` that waits in asyncio."""
        import asyncio

        wanted = _Wanted(self, key, timeout, shape, dtype)
        while (found := wanted.attempt()) is None:
            if wanted.answer.state == "ready":
                await asyncio.sleep(wanted.seconds)
            else:
                await self.pool.wait_for_claim_async(wanted.answer, wanted.seconds)
        if self._nodes is None or not (found.is_claim and found.is_known):
            return found
        try:
            fetched = await self._nodes.fetch_key_async(key)
        except BaseException:
            found.abandon()
            raise
        return wanted.fetched(found, fetched)


class _Wanted:
    """One `get_or_claim`: what is asked for, and what to wait for between two attempts."""

    def __init__(
        self,
        cache: TensorCache,
        key: bytes,
        timeout: float | None,
        shape: tuple[int, ...] | None,
        dtype: torch.dtype | None,
    ) -> None:
        self._cache = cache
        self._key = key
        self._timeout = timeout
        self._shape = shape
        self._dtype = dtype
        self._started = time.monotonic()
        self._is_first = True

    def attempt(self) -> CacheLease | Claim | None:
        """The tensor, or the claim on it; None: wait for `answer`, at most `seconds`, then again.

        Raises `PoolTimeoutError` when the time is over.
        """
        found: CacheLease | Claim | None = None
        if self._is_first:  # afterwards the claim tells; one request is one lookup
            self._is_first = False
            found = self._get()
        if found is not None:
            return found
        self.answer = answer = self._cache.pool.claim(self._key)
        if answer.state == "mine":
            return Claim(self._cache, self._key, answer)
        if answer.state == "ready":
            found = self._get() or self._claim_in_vain()
            if found is not None:
                return found
        left = _left(self._started, self._timeout)
        if left <= 0:
            raise self._overdue()
        self.seconds = min(left, READY_POLL) if answer.state == "ready" else left
        return None

    def _get(self) -> CacheLease | None:
        return self._cache.get_here(self._key, self._shape, self._dtype)

    def _claim_in_vain(self) -> Claim | None:
        """The entry that is there has another shape or dtype: encode it here; it cannot be stored.
        None: a stream has not completed the entry yet."""
        there = self._cache.pool.find(self._key)
        is_any = self._shape is None and self._dtype is None
        if there is None or not there.is_ready or is_any:
            return None
        return Claim(self._cache, self._key, None)

    def fetched(self, claim: Claim, lease: Lease | None) -> CacheLease | Claim:
        """What came of asking the key's owner under the claim."""
        if lease is None:
            return claim
        claim.abandon()  # published, so that it has ended
        found = self._cache.as_expected(lease, self._shape, self._dtype)
        # Of another shape or dtype: encode it here; it cannot be stored.
        return Claim(self._cache, self._key, None) if found is None else found

    def _overdue(self) -> PoolTimeoutError:
        pool, answer = self._cache.pool, self.answer
        waited = time.monotonic() - self._started
        begin = f"pool {pool.name}: waited {waited:.1f} s for key {self._key.hex()}, which "
        if answer.owner is None:
            return PoolTimeoutError(f"{begin}its producer's stream has not completed; wait longer")
        age = (time.monotonic_ns() - answer.since_ns) / 1e9
        return PoolTimeoutError(
            f"{begin}{pool.describe(answer.owner)} has claimed {age:.1f} s ago; encode it "
            "here, or wait longer"
        )


def _nodes_of(pool: BlockPool, nodes: Nodes | Sequence[tuple[str, int] | str]) -> Nodes | None:
    """None: there is no other node."""
    # Here: who has one node needs no network.
    from shmblocks.nodes import Nodes
    from shmblocks.nodes.handshake import key_from_environment

    if isinstance(nodes, Nodes):
        return nodes
    if isinstance(nodes, str):
        raise TypeError(f"nodes: expected a list of addresses, got the text {nodes!r}")
    return Nodes(pool, nodes, key=key_from_environment()) if nodes else None


def _left(started: float, timeout: float | None) -> float:
    return math.inf if timeout is None else started + timeout - time.monotonic()


def _on(stream: Stream | None) -> contextlib.AbstractContextManager[object]:
    """What is enqueued in this context is enqueued on `stream`."""
    if stream is None:
        return contextlib.nullcontext()
    import torch

    if isinstance(stream, int):
        return torch.cuda.stream(torch.cuda.ExternalStream(stream))  # type: ignore[no-untyped-call]
    return torch.cuda.stream(stream)
