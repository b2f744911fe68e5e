"""Can pools be shared here, and has anybody left some behind?"""

from __future__ import annotations

import os
from collections.abc import Iterator

from shmblocks._state.info import PoolSummary
from shmblocks.config import PoolConfig
from shmblocks.doctor.child import run_module
from shmblocks.doctor.host import Host
from shmblocks.doctor.result import CheckResult
from shmblocks.doctor.words import bytes_text, count_text
from shmblocks.errors import ShmBlocksError
from shmblocks.inspector import list_segments
from shmblocks.pool import BlockPool

# A Python that starts on a busy machine. Smaller: such machines fail. Larger: a hang holds us up.
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
    results = run_module(
        "pool-sharing", "shmblocks.doctor.sharing_probe", arguments, ATTACH_SECONDS
    )
    free, every = pool.available_blocks(), pool.config.total_blocks
    if free != every and all(result.status == "ok" for result in results):
        found = f"after the second process's release {free} of {every} blocks are free"
        results = [CheckResult("pool-sharing", "fail", found, "please report this")]
    yield from results


def leftovers(host: Host) -> Iterator[CheckResult]:
    """Pools and queues that nobody lives in any more: they take memory until they are removed."""
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
