"""Can pools be shared here, and are there leftovers of dead processes?

`pool_shared` is the check that makes a pool; `main` is the second process that uses it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from shmblocks._state.info import PoolSummary
from shmblocks._words import bytes_text, count_text
from shmblocks.config import PoolConfig
from shmblocks.doctor.child import report, run_module
from shmblocks.doctor.host import CheckResult, Host
from shmblocks.errors import ShmBlocksError
from shmblocks.handle import BlockHandle
from shmblocks.inspector import list_segments
from shmblocks.pool import BlockPool

# Seconds for a Python to start on a busy machine. Smaller: such machines fail. Larger: a hang holds
# the doctor up longer.
ATTACH_SECONDS = 30.0


def pool_shared(host: Host) -> Iterator[CheckResult]:
    """A tiny pool, made here and used by a second process, and gone afterwards."""
    name = f"shmblocks-doctor-{os.getpid()}-{os.urandom(4).hex()}"
    config = PoolConfig(total_tokens=16, block_size=4, default_num_blocks=1)
    try:
        with BlockPool.create(name, config, prefault="off", role="doctor") as pool:
            yield from _hand_over(pool)
    except (ShmBlocksError, OSError) as error:
        found = f"a pool of {config.total_tokens} tokens could not be used: {error}"
        yield CheckResult("pool-sharing", "fail", found, "see the failed checks above")


def _hand_over(pool: BlockPool) -> Iterator[CheckResult]:
    """Publish blocks; the second process opens them, and its release frees them."""
    handle = pool.alloc_default()
    if handle is None:
        yield CheckResult("pool-sharing", "fail", "a new pool has no free blocks")
        return
    handle = pool.publish(handle, readers=1)
    arguments = [pool.name, handle.encode().hex()]
    results = run_module("pool-sharing", "shmblocks.doctor.sharing", arguments, ATTACH_SECONDS)
    free, every = pool.available_blocks(), pool.config.total_blocks
    if free != every and all(result.status == "ok" for result in results):
        found = f"after the second process's release {free} of {every} blocks are free"
        results = [CheckResult("pool-sharing", "fail", found, "please report this")]
    yield from results


def use(name: str, handle: bytes) -> Iterator[CheckResult]:
    """Attach by name, see the first process live, open what it published, release it."""
    try:
        with BlockPool.attach(name, prefault="off", role="doctor") as pool:
            alive = sum(participant.is_alive for participant in pool.participants())
            with pool.open(BlockHandle.decode(handle)):
                pass
    except (ShmBlocksError, OSError) as error:
        found = f"a second process cannot use a pool of the first: {error}"
        yield CheckResult("pool-sharing", "fail", found, "see the failed checks above")
        return
    if alive == 2:
        found = "a second process attached by name and read what the first published"
        yield CheckResult("pool-sharing", "ok", found)
    else:
        found = f"a second process sees {alive} living participants instead of 2"
        advice = "see the check ofd-locks: who lives cannot be told on this file system"
        yield CheckResult("pool-sharing", "fail", found, advice)


def main(arguments: list[str]) -> None:
    """In the second process: the name of a pool, and a handle in hexadecimal."""
    name, handle = arguments
    report(use(name, bytes.fromhex(handle)))


def leftovers(host: Host) -> Iterator[CheckResult]:
    """Pools and queues without a living process: they take memory until they are removed."""
    try:
        pools = list_segments()
    except OSError as error:
        yield CheckResult("leftover-pools", "skip", f"cannot be listed: {error}")
        return
    dead = [pool for pool in pools if pool.state == "dead"]
    if not dead:
        found = count_text(len(pools), "pool") + " on this node, none without a living process"
        yield CheckResult("leftover-pools", "ok", found)
        return
    yield CheckResult("leftover-pools", "warn", _dead_text(dead), "shmblocks reap --all")


def _dead_text(dead: list[PoolSummary]) -> str:
    size = bytes_text(sum(pool.size_bytes for pool in dead))
    names = ", ".join(pool.name for pool in dead[:3]) + (", .." if len(dead) > 3 else "")
    return f"{count_text(len(dead), 'dead pool')} ({names}) with {size}"
