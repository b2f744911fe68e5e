"""A worker that does everything at random: allocate, write, publish, hand on, read, free, reap, and
use the content cache, whose payloads are computed from their keys.

It puts what it publishes into one queue, which all mixers put to and get from. A handle in that
queue may be stale: its deadline passed, or it was freed; that is counted, not wrong.
"""

from __future__ import annotations

import queue
import random
import time
from collections.abc import Callable

from shmblocks import (
    UNBOUNDED,
    BlockHandle,
    BlockPool,
    HandleQueue,
    InvalidStateError,
    KeyExistsError,
    PoolTimeoutError,
    StaleHandleError,
    TooManyLeasesError,
    content_key,
)
from soaking import payload
from soaking.counters import Count, Counters

# Keys of the content cache: more than the pool has room for beside everything else.
KEYS = 150
# Stands where other payloads have a generation.
CACHED = -1


class Mixer:
    """One life of one worker."""

    def __init__(
        self,
        worker: int,
        seed: int,
        pool_name: str,
        queue_name: str,
        counters: Counters,
        pace: float,
    ) -> None:
        """`pace`: seconds of rest between two operations, on average."""
        self._pace = pace
        self._worker = worker
        self._random = random.Random(seed)
        self._name = pool_name
        self._counters = counters
        self._pool = BlockPool.attach(pool_name, timeout=10, role="mixer", prefault="off")
        self._queue = HandleQueue.attach(queue_name, timeout=10, message_type=BlockHandle)
        self._held: list[BlockHandle] = []

    def run(self) -> None:
        """Until the soak is over."""
        operations: list[tuple[int, Callable[[], None]]] = [
            (30, self._reserve),
            (6, self._reserve_waiting),
            (10, self._grow),
            (28, self._publish),
            (30, self._read),
            (8, self._free),
            (16, self._use_cache),
            (2, self._reap),
            (2, self._check),
            (1, self._attach_again),
        ]
        weights = [weight for weight, _ in operations]
        while not self._counters.is_over:
            (_, operation) = self._random.choices(operations, weights)[0]
            operation()
            if self._pace:
                time.sleep(self._random.expovariate(1 / self._pace))
        self._pool.close()
        self._queue.close()

    def _tokens(self) -> int:
        """Mostly a few blocks, sometimes many."""
        blocks = min(self._random.expovariate(1 / 4), self._pool.config.total_blocks // 3)
        return max(1, int(blocks * self._pool.config.block_size))

    def _reserve(self) -> None:
        with self._counters.timed(self._worker):
            handle = self._pool.alloc(self._tokens(), req_id=f"mixer-{self._worker}")
        self._keep(handle)

    def _reserve_waiting(self) -> None:
        try:
            self._keep(self._pool.alloc(self._tokens(), timeout=self._random.random() * 0.2))
        except PoolTimeoutError:
            self._counters.add(self._worker, Count.TIMEOUTS)

    def _keep(self, handle: BlockHandle | None) -> None:
        if handle is None:
            self._counters.add(self._worker, Count.NO_FREE_BLOCKS)
        else:
            self._held.append(handle)
            if len(self._held) > 6:
                self._free()

    def _grow(self) -> None:
        if self._held:
            handle = self._held.pop()
            with self._counters.timed(self._worker):
                grown = self._pool.grow(handle, handle.num_tokens + self._tokens() // 2)
            self._held.append(grown or handle)

    def _free(self) -> None:
        if self._held:
            handle = self._held.pop(self._random.randrange(len(self._held)))
            with self._counters.timed(self._worker):
                self._pool.free(handle)

    def _publish(self) -> None:
        if not self._held:
            return
        handle = self._held.pop()
        view = self._pool.view(handle)
        view["rows"].copy_(payload.rows(self._worker, handle.generation, handle.num_tokens))
        view["marks"].copy_(payload.marks(self._worker, handle.num_tokens))
        view.aux[0] = handle.num_tokens
        view.aux[1] = self._worker
        readers = self._random.choice((1, 1, 2, 3))
        with self._counters.timed(self._worker):
            handle = self._pool.publish(handle, readers=readers)
        for _ in range(readers):
            try:
                self._queue.put(handle, timeout=0.05)
            except queue.Full:
                break
        if self._random.random() < 0.02:
            self._try(lambda: self._pool.free(handle))

    def _read(self) -> None:
        try:
            handle = self._queue.get(timeout=0.02)
        except queue.Empty:
            return
        self._try(lambda: self._read_one(handle))

    def _try(self, operation: Callable[[], None]) -> None:
        try:
            operation()
        except (StaleHandleError, InvalidStateError, TooManyLeasesError):
            self._counters.add(self._worker, Count.STALE)

    def _read_one(self, handle: BlockHandle) -> None:
        with self._counters.timed(self._worker):
            lease = self._pool.open(handle)
        with lease:
            writer = int(lease.aux[1])
            problem = payload.wrong(
                lease["rows"], lease["marks"], writer, handle.generation, handle.num_tokens
            )
            if problem:
                self._counters.violation(self._worker, f"{handle}: {problem}")
            self._counters.add(self._worker, Count.PAYLOADS)

    def _use_cache(self) -> None:
        """Look a key up; what is not there is put, unless somebody else does."""
        number = self._random.randrange(KEYS)
        key = content_key(b"soak", str(number))
        num_tokens = 1 + number * 7 % 90
        try:
            with self._counters.timed(self._worker):
                leases = self._pool.get(key, num_tokens=num_tokens)
        except TooManyLeasesError:
            self._counters.add(self._worker, Count.STALE)
            return
        if leases is not None:
            lease = leases[0]
            if self._random.random() < 0.2:
                lease = self._pool.adopt(lease.ticket())
            with lease:
                rows, marks = lease["rows"], lease["marks"]
                problem = payload.wrong(rows, marks, number, CACHED, num_tokens)
                if problem:
                    self._counters.violation(self._worker, f"entry {number}: {problem}")
            self._counters.add(self._worker, Count.CACHE_HITS)
            return
        answer = self._pool.claim(key)
        if answer.state == "busy":
            self._pool.wait_for_claim(answer, 0.01)
        if answer.state == "mine":
            self._fill_cache(key, number, num_tokens)

    def _fill_cache(self, key: bytes, number: int, num_tokens: int) -> None:
        """Put what its number says; sometimes drop it, or give up."""
        reservation = self._pool.reserve_now(num_tokens)
        if reservation is None or self._random.random() < 0.05:
            self._counters.add(self._worker, Count.NO_FREE_BLOCKS, reservation is None)
            self._pool.end_claim(key)
            if reservation is not None:
                reservation.free()
            return
        with reservation:
            reservation["rows"].copy_(payload.rows(number, CACHED, num_tokens))
            reservation["marks"].copy_(payload.marks(number, num_tokens))
            try:
                reservation.publish(readers=UNBOUNDED, key=key, hold=self._random.random() * 0.01)
            except KeyExistsError:
                self._counters.add(self._worker, Count.STALE)
        if self._random.random() < 0.05:
            self._pool.drop(key)

    def _reap(self) -> None:
        with self._counters.timed(self._worker):
            self._pool.reap()

    def _check(self) -> None:
        for violation in self._pool.check():
            self._counters.violation(self._worker, str(violation))

    def _attach_again(self) -> None:
        """What was held comes back by leaving."""
        self._held.clear()
        self._pool.close()
        self._pool = BlockPool.attach(self._name, timeout=10, role="mixer", prefault="off")
        self._counters.add(self._worker, Count.REATTACHED)
