"""Where the microseconds of a handoff go: each operation, and what it is made of.

Everything runs in one process with nobody beside it. Operations are timed one by one within whole
handoffs, so that they find the caches as a handoff leaves them; parts in loops of their own, which
is why they add up to a little less.
"""

from __future__ import annotations

import fcntl
import statistics
import time
from collections.abc import Callable
from contextlib import closing

from benchmarks.links.buffers import unique_name
from benchmarks.results import Study
from shmblocks import BlockHandle, BlockPool, HandleQueue, PoolConfig, multimodal_fields
from shmblocks._os.filelock import ENTER, LEAVE
from shmblocks._state.bitmap import find_zeros
from shmblocks._state.journal import Journal, Store

TOKENS = 2000
FIELD = "input_embeddings"
OPERATIONS = (
    "alloc", "view", "view[name]", "publish", "queue.put", "queue.get", "open", "lease[name]",
    "release",
)  # fmt: skip


def budget(times: int) -> Study:
    config = PoolConfig(total_tokens=65_536, fields=multimodal_fields(hidden_size=64))
    queue_name = unique_name("budget-queue")
    with (
        BlockPool.create(unique_name("budget"), config, prefault="now") as pool,
        closing(HandleQueue.create(queue_name, message_type=BlockHandle)) as queue,
    ):
        operations = _operations(pool, queue, times)
        pairs = {
            "alloc + free": _loop(lambda: _alloc_free(pool), times),
            "put + get": _loop(lambda: _put_get(queue), times),
        }
        parts = _parts(pool, times)
        safe, unsafe = _price_of_safety(pool, times)
    rows = [["whole handoff", *_row(sum(operations.values()))]]
    rows += [[f"  {name}", *_row(took)] for name, took in operations.items()]
    rows += [[name, *_row(took)] for name, took in pairs.items()]
    rows += [[f"  {name}", *_row(took)] for name, took in parts.items()]
    rows += [["alloc + free without the journal", *_row(unsafe)]]
    return Study(
        name="budget",
        title="What a handoff is made of, one process",
        note="Medians, in microseconds. Each operation but `view[name]` and `lease[name]` enters "
        "one critical section; `view` of one's own reservation enters none.",
        header=["", "us"],
        rows=rows,
        numbers={**pairs, "price of the journal": safe / unsafe},
    )


def _operations(pool: BlockPool, queue: HandleQueue[BlockHandle], times: int) -> dict[str, float]:
    """Microseconds of each operation of one handoff after the other."""
    now = time.perf_counter_ns
    took: list[list[int]] = []
    for _ in range(times):
        stamps = [now()]
        handle = pool.alloc(TOKENS)
        stamps.append(now())
        if handle is None:
            raise RuntimeError(f"no room: {pool.stats()}")
        view = pool.view(handle)
        stamps.append(now())
        view[FIELD]
        stamps.append(now())
        handle = pool.publish(handle)
        stamps.append(now())
        queue.put(handle)
        stamps.append(now())
        handle = queue.get()
        stamps.append(now())
        lease = pool.open(handle)
        stamps.append(now())
        lease[FIELD]
        stamps.append(now())
        lease.release()
        stamps.append(now())
        took.append(stamps)
    found = {}
    for place, name in enumerate(OPERATIONS):
        found[name] = statistics.median(one[place + 1] - one[place] for one in took) / 1000
    return found


def _parts(pool: BlockPool, times: int) -> dict[str, float]:
    """Microseconds of what operations are made of."""
    ledger = pool.state
    file = ledger.locks.file
    handle = BlockHandle(8, 16, TOKENS, 77, 1 << 60)
    encoded = handle.encode()
    word = ledger.layout.aux
    stores = [(word, bytes(24)), (word + 64, bytes(8)), (word + 128, bytes(160))]

    def lock_and_unlock() -> None:
        fcntl.flock(file, ENTER)
        fcntl.flock(file, LEAVE)

    return {
        "lock and unlock, system calls": _loop(lock_and_unlock, times),
        "a critical section that does nothing": _loop(lambda: ledger.mutex.run(_nothing), times),
        "a commit of three stores": _loop(lambda: ledger.journal.commit(stores), times),
        "reading a record": _loop(lambda: ledger.blocks.record(0), times),
        "a search of 4,096 blocks": _loop(lambda: find_zeros(3 << 64, 4096, 16), times),
        "encoding and decoding a handle": _loop(
            lambda: (handle.encode(), BlockHandle.decode(encoded)), times
        ),
    }


def _price_of_safety(pool: BlockPool, times: int) -> tuple[float, float]:
    """alloc + free as it is, and with its stores made at once instead of through the journal."""
    commit = Journal.commit

    def at_once(journal: Journal, stores: list[Store]) -> None:
        memory = journal._memory
        for offset, data in stores:
            memory[offset : offset + len(data)] = data

    safe, unsafe = [], []
    for _ in range(7):
        safe.append(_loop(lambda: _alloc_free(pool), times // 4))
        try:
            Journal.commit = at_once  # type: ignore[assignment,method-assign]
            unsafe.append(_loop(lambda: _alloc_free(pool), times // 4))
        finally:
            Journal.commit = commit  # type: ignore[method-assign]
    return statistics.median(safe), statistics.median(unsafe)


def _loop(call: Callable[[], object], times: int) -> float:
    """Microseconds of one call: the median of seven loops."""
    took = []
    for _ in range(7):
        start = time.perf_counter_ns()
        for _ in range(times):
            call()
        took.append((time.perf_counter_ns() - start) / times / 1000)
    return statistics.median(took)


def _alloc_free(pool: BlockPool) -> None:
    handle = pool.alloc(TOKENS)
    if handle is not None:
        pool.free(handle)


def _put_get(queue: HandleQueue[BlockHandle]) -> None:
    queue.put(_HANDLE)
    queue.get()


_HANDLE = BlockHandle(8, 16, TOKENS, 77, 1 << 60)


def _nothing() -> None:
    """A critical section's empty body."""


def _row(microseconds: float) -> list[str]:
    return [f"{microseconds:.2f}"]
