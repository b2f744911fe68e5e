"""Run as a program: the second process of the check `pool-sharing`. NAME and a handle's hex."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from shmblocks.doctor.child import report
from shmblocks.doctor.result import CheckResult
from shmblocks.errors import ShmBlocksError
from shmblocks.handle import BlockHandle
from shmblocks.pool import BlockPool


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


if __name__ == "__main__":
    report(use(sys.argv[1], bytes.fromhex(sys.argv[2])))
