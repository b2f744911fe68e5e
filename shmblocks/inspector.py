"""The pools of this node: listing them, looking into one without joining it, removing one.

Queues are listed and removed too: their leftovers take up shared memory as well.

An inspector is no participant: it keeps no pool alive, and a pool that it looks at is removed by
its last participant as if nobody looked.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import TracebackType

import msgspec

from shmblocks._os.filelock import FileLocks
from shmblocks._os.segment import (
    SHM_DIRECTORY,
    file_identity,
    normal_name,
    open_existing,
    unlink_file,
)
from shmblocks._state import check as inspection
from shmblocks._state.check import AllocationInfo, PoolStats, Violation
from shmblocks._state.identity import is_ours, is_pool
from shmblocks._state.naming import anyone_lives, unlink_dead
from shmblocks._state.participants import ParticipantInfo
from shmblocks._state.pool_state import Ledger
from shmblocks._state.reclaim import ReapReport
from shmblocks.config import PoolConfig
from shmblocks.errors import (
    IncompatiblePoolError,
    PoolExistsError,
    PoolNotFoundError,
    PoolPermissionError,
    ShmBlocksError,
)

# Seconds that a listing or a removal waits for one pool whose lock a stopped process holds.
LOCK_TIMEOUT = 1.0


class PoolSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One pool (or queue) in a listing.

    `state`: `alive`, `dead` (all its processes died: a leftover), `incompatible` (of another layout
    version, or damaged). `stats` is None when they cannot be read; `problem` says why.
    `is_queue`: it is a `HandleQueue`, which has no stats.
    """

    name: str
    size_bytes: int
    state: str
    stats: PoolStats | None = None
    problem: str = ""
    is_queue: bool = False


class PoolSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """All that there is to know of a pool, of one moment."""

    stats: PoolStats
    allocations: list[AllocationInfo]
    participants: list[ParticipantInfo]
    violations: list[Violation]


class PoolInspector:
    """Read access to one pool, living or dead. Close it, or use it in a `with` statement."""

    def __init__(self, name: str, lock_timeout: float | None = None) -> None:
        """`lock_timeout`: seconds to wait for a stopped holder of the lock; None: the config's."""
        self._ledger = Ledger.open(name, lock_timeout)

    @property
    def name(self) -> str:
        return self._ledger.name

    @property
    def config(self) -> PoolConfig:
        return self._ledger.config

    @property
    def pool_id(self) -> int:
        return self._ledger.pool_id

    @property
    def is_alive(self) -> bool:
        """Whether any process is attached."""
        return anyone_lives(self._ledger.locks)

    def stats(self) -> PoolStats:
        """As `BlockPool.stats`."""
        return self._ledger.run(inspection.stats, self._ledger)

    def allocations(self) -> list[AllocationInfo]:
        """As `BlockPool.allocations`."""
        return self._ledger.run(inspection.allocations, self._ledger)

    def participants(self) -> list[ParticipantInfo]:
        """As `BlockPool.participants`."""
        return self._ledger.run(self._ledger.participants.infos)

    def check(self) -> list[Violation]:
        """As `BlockPool.check`."""
        return self._ledger.run(inspection.check, self._ledger)

    def snapshot(self) -> PoolSnapshot:
        """`stats`, `allocations`, `participants` and `check` of one and the same moment."""
        return self._ledger.run(self._snapshot)

    def _snapshot(self) -> PoolSnapshot:
        ledger = self._ledger
        return PoolSnapshot(
            stats=inspection.stats(ledger),
            allocations=inspection.allocations(ledger),
            participants=ledger.participants.infos(),
            violations=inspection.check(ledger),
        )

    def reap(self) -> ReapReport:
        """As `BlockPool.reap`."""
        return self._ledger.run(self._ledger.reap)

    def close(self) -> None:
        """End the access; the pool goes on as before."""
        self._ledger.close()

    def __enter__(self) -> PoolInspector:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def open_inspector(name: str, *, lock_timeout: float | None = None) -> PoolInspector:
    """Look into a pool without joining it; see `PoolInspector`."""
    return PoolInspector(name, lock_timeout)


def list_pools() -> list[PoolSummary]:
    """Every pool of the node that can be seen, by name. Other segments are left out."""
    return [summary for summary in list_segments() if not summary.is_queue]


def list_segments() -> list[PoolSummary]:
    """Every pool and every queue of the node that can be seen, by name."""
    summaries = []
    for entry in sorted(os.listdir(SHM_DIRECTORY)):
        # A name that no pool can have is no pool, and one that goes while we look is gone.
        with contextlib.suppress(ValueError, PoolNotFoundError):
            summary = _summary(normal_name(entry))
            if summary is not None:
                summaries.append(summary)
    return summaries


def _summary(name: str) -> PoolSummary | None:
    try:
        with _opened(name) as (fd, locks):
            if not is_ours(fd):
                return None
            is_queue = not is_pool(fd)
            size = os.fstat(fd).st_size
            state = "alive" if anyone_lives(locks) else "dead"
    except (PoolPermissionError, IncompatiblePoolError):
        return None
    if is_queue:
        return PoolSummary(
            name=name, size_bytes=size, state=state, problem="a queue", is_queue=True
        )
    try:
        with open_inspector(name, lock_timeout=LOCK_TIMEOUT) as inspector:
            return PoolSummary(name=name, size_bytes=size, state=state, stats=inspector.stats())
    except IncompatiblePoolError as error:
        return PoolSummary(name=name, size_bytes=size, state="incompatible", problem=str(error))
    except ShmBlocksError as error:
        return PoolSummary(name=name, size_bytes=size, state=state, problem=str(error))


@contextlib.contextmanager
def _opened(name: str) -> Iterator[tuple[int, FileLocks]]:
    with open_existing(name) as file, contextlib.closing(FileLocks(file.fileno())) as locks:
        yield file.fileno(), locks


def remove_pool(name: str, force: bool = False) -> None:
    """Remove the name of a pool or queue. With `force` even while processes use it: they go on,
    nobody joins.

    Raises `PoolExistsError` when somebody lives in it, `PoolNotFoundError`, and
    `IncompatiblePoolError` for a segment that is no pool.
    """
    name = normal_name(name)
    with _opened(name) as (fd, locks):
        if not is_ours(fd):
            raise IncompatiblePoolError(f"pool {name}: the segment of that name is not a pool")
        if force:
            unlink_file(name, file_identity(fd))
        elif not unlink_dead(fd, locks, name, LOCK_TIMEOUT):
            raise PoolExistsError(
                f"pool {name}: {_who_lives(name)} still use it; end them, or remove it by force"
            )


def _who_lives(name: str) -> str:
    try:
        with open_inspector(name, lock_timeout=LOCK_TIMEOUT) as inspector:
            living = [str(info) for info in inspector.participants() if info.is_alive]
    except ShmBlocksError:
        living = []
    return ", ".join(living) or "some processes"
