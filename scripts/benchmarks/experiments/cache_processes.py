"""1 to 16 processes on one content cache: hits, publishes under a key, claims of the dead.

A hit is `get` and release of one of a thousand entries, a publish reserves one block, publishes it
under a key of its own and drops it. Nothing is copied.

For the takeover one process waits for a key that a second has claimed; the second is killed. Its
time is counted from the moment when the kernel says that it is dead (`waitpid`) until the first
has the claim.
"""

from __future__ import annotations

import os
import secrets
import signal
import statistics
import threading
import time
from functools import partial

from benchmarks.experiments.contention import per_second, unfairness
from benchmarks.report import Done, Experiment, Turn
from benchmarks.transport import Context, unique_name
from benchmarks.workers import Make, Repeated, Workers, fresh_processes
from shmblocks import UNBOUNDED, BlockPool, PoolConfig, content_key
from shmblocks.cache import TensorCache, byte_config

ENTRIES = 1_000
# Seconds that the one who waits is given to fall asleep.
ASLEEP = 0.1


def cache_processes(processes: tuple[int, ...], seconds: float, takeovers: int) -> Experiment:
    rows, numbers = [], {}
    context = fresh_processes()
    name = unique_name("cache")
    config = PoolConfig(total_tokens=2 * ENTRIES, block_size=1, default_num_blocks=1)
    with BlockPool.create(name, config, prefault="off") as pool:
        for number in range(ENTRIES):
            _publish(pool, _key(number))
        for count in processes:
            row = [str(count)]
            for what, make in (("hits", hits), ("publishes", publishes)):
                done = _measure(context, partial(make, name), count, seconds)
                numbers[f"{what} a second, {count} processes"] = per_second(done)
                longest = max(one.longest_ns for one in done) / 1e6
                row += [f"{per_second(done):,.0f}", f"{unfairness(done):.2f}", f"{longest:.0f} ms"]
            rows.append(row)
    waits = [_takeover() * 1e3 for _ in range(takeovers)]
    numbers["takeover ms, median"] = statistics.median(waits)
    numbers["takeover ms, worst"] = max(waits)
    return Experiment(
        name="cache_processes",
        title="Processes on one content cache",
        note="Operations a second of all processes together; fairness is the largest share against "
        "the smallest; the longest single operation. On 2 cores, more than 2 take turns. A claim "
        f"was taken over {statistics.median(waits):.0f} ms after its owner's death, "
        f"{max(waits):.0f} ms at most, in {takeovers} rounds.",
        header=["processes", "hits", "max/min", "longest", "publishes", "max/min", "longest"],
        rows=rows,
        numbers=numbers,
    )


def _key(number: int) -> bytes:
    return content_key(b"bench", str(number))


def _publish(pool: BlockPool, key: bytes) -> None:
    with pool.reserve(1) as reservation:
        reservation.publish(readers=UNBOUNDED, key=key)


def _measure(context: Context, make: Make, count: int, seconds: float) -> list[Done]:
    roles = [(f"process {number}", make) for number in range(count)]
    with Workers(context, roles) as workers:
        workers.wait_ready()
        return workers.turn(Turn(warm_up=50, seconds=seconds))


def hits(name: str) -> Repeated:
    pool = BlockPool.attach(name, prefault="off")
    keys = [_key(number) for number in range(ENTRIES)]
    turn = os.getpid()

    def step() -> None:
        nonlocal turn
        turn += 7919
        for lease in pool.get(keys[turn % ENTRIES]) or ():
            lease.release()

    return Repeated(step, pool.close)


def publishes(name: str) -> Repeated:
    pool = BlockPool.attach(name, prefault="off")
    key = secrets.token_bytes(16)

    def step() -> None:
        _publish(pool, key)
        pool.drop(key)

    return Repeated(step, pool.close)


def _takeover() -> float:
    """Seconds from an owner's death until another has its claim."""
    with BlockPool.create(unique_name("takeover"), byte_config(1 << 20), prefault="off") as pool:
        key = b"a picture".ljust(16)
        says, is_told = os.pipe()
        pid = os.fork()
        if pid == 0:
            pool.claim(key)
            os.write(is_told, b"!")
            signal.pause()
        os.read(says, 1)
        died: list[float] = []

        def kill() -> None:
            time.sleep(ASLEEP)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            died.append(time.monotonic())

        killer = threading.Thread(target=kill)
        killer.start()
        found = TensorCache(pool).get_or_claim(key)
        ended = time.monotonic()
        killer.join()
        os.close(says)
        os.close(is_told)
        found.abandon() if found.is_claim else found.release()
        # Reaped by the one who waits before `waitpid` came back: no time at all.
        return max(0.0, ended - died[0])
