"""Leases: claims on blocks, as one process takes and ends them.

    take       under the lock: the record says one lease more
    release    under the lock, at once; or on a stream: when that has come here
    dropped    by the collector, without a release: the pool's next call does it

Contract
- A lease ends once, however often it is released; after its pool was closed, or in a forked child,
  releasing it does nothing.
- A lease keeps its view, and with it the pool, alive.
"""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from types import TracebackType
from typing import TYPE_CHECKING

from shmblocks._os.wait import Run
from shmblocks._state.blocks import READS, WRITES, LeaseKey
from shmblocks._state.layout import FAILED
from shmblocks._state.pool_state import Ledger
from shmblocks._state.states import STATES, State
from shmblocks.cuda.order import Streams
from shmblocks.errors import InvalidStateError, TooManyLeasesError
from shmblocks.handle import BlockHandle
from shmblocks.view import BlockView

if TYPE_CHECKING:
    import torch

    from shmblocks.cuda.use import Order, Stream


class Leases:
    """What one process does with leases of one pool; borrows the ledger."""

    def __init__(self, ledger: Ledger, run: Run, streams: Streams) -> None:
        """`run` runs an operation under the lock, as a participant."""
        self._ledger = ledger
        self._run = run
        self.streams = streams
        # Leases that were dropped without release where it could not be done at once.
        self.dropped: list[LeaseKey] = []
        # The streams of those among them that have one.
        self.dropped_on: dict[LeaseKey, Order] = {}

    @property
    def is_closed(self) -> bool:
        """Whether this process has left the pool."""
        return self._ledger.is_closed

    def take(self, handle: BlockHandle, kind: int, made: list[LeaseKey]) -> tuple[LeaseKey, bool]:
        """Under the lock: the lease, and whether the blocks are ready for it."""
        blocks = self._ledger.blocks
        record = blocks.find_exact(handle)
        ready = record.ready
        if ready & FAILED:
            raise blocks.died(handle)
        is_ready = kind == WRITES or ready == handle.generation
        if not record.readers_left and kind == READS and STATES[record.state] is State.LEASED:
            raise InvalidStateError(
                f"{handle}: every reader that `publish(readers=...)` announced is there already"
            )
        now = time.monotonic_ns()
        me = self._ledger.participants.me
        who = me.word if me else 0
        try:
            return blocks.open(handle.start_block, record, kind, who, now, made), is_ready
        except TooManyLeasesError:
            if not self._ledger.collect() and not self._ledger.reap().leases:
                raise
            record = blocks.find_exact(handle)
            return blocks.open(handle.start_block, record, kind, who, now, made), is_ready

    def release(self, key: LeaseKey, unread: bool = False) -> None:
        """End it now; `unread`: as if it had never been there."""
        me = self._ledger.participants.me
        if me is None or key.holder != me.word:
            # Closed: given back already. Forked: it is the parent's.
            return
        self._run(self._end, key, unread)

    def _end(self, key: LeaseKey, unread: bool) -> None:
        if self._ledger.blocks.release_key(key, unread=unread):
            self._ledger.ring()

    def release_on(self, key: LeaseKey, order: Order) -> None:
        """The stream says when the lease has ended.

        Enqueued first, marked second: killed or interrupted between the two, it is an open lease,
        which ends with its holder or is released again. The other way round it could stay pending
        for ever.
        """
        me = self._ledger.participants.me
        if me is not None and key.holder == me.word:
            order.write(self._ledger.layout.acknowledged_word(key.slot), key.generation)
            self._run(self._ledger.blocks.mark_pending, key)

    def release_dropped(self) -> None:
        """Before an operation of the pool: what the collector could not release."""
        ledger = self._ledger
        while self.dropped:
            key = self.dropped[0]
            me = ledger.participants.me
            if me is not None and key.holder == me.word:
                order = self.dropped_on.get(key)
                if order is not None:
                    order.write(ledger.layout.acknowledged_word(key.slot), key.generation)
                    ledger.run(ledger.blocks.mark_pending, key)
                else:
                    ledger.run(self._end, key, False)
            self.dropped_on.pop(key, None)
            # Only now: an interrupt before this releases it again, to no effect.
            with contextlib.suppress(ValueError):
                self.dropped.remove(key)


class Lease:
    """A claim on blocks of a pool; release it, or use it in a `with` statement.

    Owns the claim, keeps the pool alive. `lease[name]` is a field as in `lease.view[name]`.
    """

    __slots__ = ("__weakref__", "_is_ready", "_key", "_leases", "_order", "view")

    def __init__(
        self,
        leases: Leases,
        view: BlockView,
        key: LeaseKey,
        order: Order | None,
        is_ready: bool,
    ) -> None:
        self._leases = leases
        self.view = view
        self._order = order
        # The CPU waits before there is a lease; a stream waits by itself.
        self._is_ready = is_ready or order is None
        # Last: whoever has a key is whole, for `__del__`.
        self._key: LeaseKey | None = key

    @property
    def handle(self) -> BlockHandle:
        """The handle of the allocation."""
        return self.view.handle

    @property
    def is_released(self) -> bool:
        """Whether it was released, or its pool closed in this process."""
        return self._key is None or self._leases.is_closed

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._open_view[name]

    @property
    def aux(self) -> torch.Tensor:
        """int32[16] of the allocation."""
        return self._open_view.aux

    @property
    def _open_view(self) -> BlockView:
        if self._key is None or self._leases.is_closed:
            raise InvalidStateError(f"{self.handle}: the lease was released; read within it")
        if not self._is_ready:
            self._is_ready = self._leases.streams.has_arrived(self.handle)
        return self.view

    @property
    def is_ready(self) -> bool:
        """Whether the producer's stream has come to its `publish`.

        False: what is enqueued on the lease's stream waits for it. Raises `PeerDiedError` when the
        producer died before.
        """
        _ = self._open_view
        return self._is_ready

    def release(self, stream: Stream | None = None) -> None:
        """End the claim; idempotent.

        A lease on a stream ends when that stream has come here (`stream`: another one than it was
        opened on); this returns at once.
        """
        key = self._key
        leases = self._leases
        if key is not None and not leases.is_closed:
            order = self._order
            if stream is not None:
                order = leases.streams.order(stream)
            elif order is not None:
                order.refuse_capture()
            if order is None:
                leases.release(key)
            else:
                leases.release_on(key, order)
        self._key = None

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def __del__(self) -> None:
        key = getattr(self, "_key", None)
        if key is None or sys.is_finalizing() or self._leases.is_closed:
            return
        # Not released here: the collector may run in the middle of an operation on the same pool.
        # The pool's next call does it.
        if self._order is not None:
            self._leases.dropped_on[key] = self._order
        self._leases.dropped.append(key)
        warnings.warn(f"{self.handle}: lease was not released", ResourceWarning, stacklevel=2)

    def __repr__(self) -> str:
        return f"Lease({self.handle}, {'released' if self.is_released else 'open'})"
