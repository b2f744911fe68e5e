"""Where the microseconds of a handoff go: each step, and the price of the journal.

Everything runs in one process with nobody beside it. Steps are timed one by one within whole
handoffs, so that they find the caches as a handoff leaves them.
"""

from __future__ import annotations

import fcntl
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from benchmarks.report import Experiment
from benchmarks.transport import unique_name
from benchmarks.transports.shmblocks_pool import FIELD, allocate
from shmblocks import BlockHandle, BlockPool, HandleQueue, PoolConfig, multimodal_fields

TOKENS = 2000
STEPS = (
    "alloc", "view", "view[name]", "publish", "queue.put", "queue.get", "open", "lease[name]",
    "release",
)  # fmt: skip

Queue = HandleQueue[BlockHandle]


def steps(times: int) -> Experiment:
    with pool_and_queue() as (pool, queue):
        found = handoff_steps(pool, queue, times)
        handle = pool.publish(allocate(pool, TOKENS))

        def put_get() -> None:
            queue.put(handle)
            queue.get()

        numbers = {
            "put + get": _loop(put_get, times),
            "lock and unlock, system calls": _lock_and_unlock(times),
            "encoding and decoding a handle": _loop(
                lambda: BlockHandle.decode(handle.encode()), times
            ),
            **_price_of_the_journal(pool, times),
        }
    rows = [["whole handoff", sum(found.values())]]
    rows += [[f"  {name}", took] for name, took in found.items()]
    rows += [[name, took] for name, took in numbers.items()]
    return Experiment(
        name="steps",
        title="What a handoff is made of, one process",
        note="Medians, in microseconds. Each step but `view`, `view[name]` and `lease[name]` "
        "enters one critical section. The price of the journal is a ratio.",
        header=["", "us"],
        rows=[[str(name), f"{took:.2f}"] for name, took in rows],
        numbers=numbers,
    )


@contextmanager
def pool_and_queue() -> Iterator[tuple[BlockPool, Queue]]:
    config = PoolConfig(total_tokens=65_536, fields=multimodal_fields(hidden_size=64))
    queue_name = unique_name("steps-queue")
    with (
        BlockPool.create(unique_name("steps"), config, prefault="now") as pool,
        closing(HandleQueue.create(queue_name, message_type=BlockHandle)) as queue,
    ):
        yield pool, queue


def handoff_steps(pool: BlockPool, queue: Queue, times: int) -> dict[str, float]:
    """Microseconds of each step, the median of so many handoffs one after the other.

    It calls only what every version of shmblocks has: `scripts/bench --against` times others too.
    """
    now = time.perf_counter_ns
    took: list[list[int]] = []
    for _ in range(times):
        stamps = [now()]
        handle = pool.alloc(TOKENS)
        stamps.append(now())
        if handle is None:
            raise RuntimeError(f"no free blocks: {pool.stats()}")
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
    return {
        name: statistics.median(one[step + 1] - one[step] for one in took) / 1_000
        for step, name in enumerate(STEPS)
    }


def _price_of_the_journal(pool: BlockPool, times: int) -> dict[str, float]:
    """alloc + free as it is, and with its stores made at once instead of through the journal."""
    from benchmarks.experiments.internals import without_journal

    def pair() -> None:
        pool.free(allocate(pool, TOKENS))

    safe, unsafe = [], []
    # By Python on both sides: the compiled core has a journal of its own.
    core, pool.state.core = pool.state.core, None
    for _ in range(7):
        safe.append(_loop(pair, times // 4))
        with without_journal():
            unsafe.append(_loop(pair, times // 4))
    pool.state.core = core
    with_it, without = statistics.median(safe), statistics.median(unsafe)
    return {
        "alloc + free": with_it,
        "alloc + free without the journal": without,
        "price of the journal": with_it / without,
    }


def _lock_and_unlock(times: int) -> float:
    with tempfile.TemporaryFile() as file:

        def pair() -> None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_UN)

        return _loop(pair, times)


def _loop(call: Callable[[], object], times: int) -> float:
    """Microseconds of one call: the median of seven loops."""
    took = []
    for _ in range(7):
        start = time.perf_counter_ns()
        for _ in range(times):
            call()
        took.append((time.perf_counter_ns() - start) / times / 1_000)
    return statistics.median(took)
