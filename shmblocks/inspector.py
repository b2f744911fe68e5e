"""The pools and queues of this node: list them, look into one without joining it, remove one.

An inspector is not a participant. It keeps no pool alive: when the last participant leaves, the
pool is removed even while an inspector has it open.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Literal

import msgspec

from shmblocks._os.filelock import FileLocks
from shmblocks._os.segment import (
    SHM_DIRECTORY,
    file_identity,
    normal_name,
    open_existing,
    unlink_file,
)
from shmblocks._state.cache_state import CacheState
from shmblocks._state.identity import is_ours, is_pool
from shmblocks._state.info import (
    AllocationInfo,
    CacheStats,
    EntryInfo,
    ParticipantInfo,
    PoolSnapshot,
    PoolStats,
    PoolSummary,
    ReapReport,
    Violation,
    WaiterInfo,
)
from shmblocks._state.naming import anyone_lives, unlink_dead
from shmblocks._state.pool_state import PoolState
from shmblocks._state.queue_state import QueueState
from shmblocks.config import PoolConfig
from shmblocks.errors import (
    DamagedPoolError,
    IncompatiblePoolError,
    PoolExistsError,
    PoolNotFoundError,
    PoolPermissionError,
    ShmBlocksError,
)

# Seconds that a listing or a removal waits for the lock of each segment. Smaller: a busy pool is
# listed without its counts. Larger: each stopped process that holds a lock delays the listing.
LOCK_TIMEOUT = 1.0

Kind = Literal["pool", "queue"]


class QueueSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to know of a queue, at one moment: `messages` of `capacity` are waiting."""

    name: str
    size_bytes: int
    messages: int
    capacity: int
    message_bytes: int
    participants: list[ParticipantInfo]


class PoolInspector:
    """Read access to one pool, living or dead. Close it, or use it in a `with` statement."""

    def __init__(self, name: str, lock_timeout: float | None = None) -> None:
        """Open the pool of that name.

        `lock_timeout`: seconds to wait for the pool's lock; None: as long as its config says.

        Raises `PoolNotFoundError`, `IncompatiblePoolError`, `PoolPermissionError`.
        """
        self._state = PoolState.open_unjoined(name, lock_timeout)
        self._cache = CacheState(self._state)

    @property
    def name(self) -> str:
        """With its leading slash."""
        return self._state.name

    @property
    def config(self) -> PoolConfig:
        """As its creator gave it."""
        return self._state.config

    @property
    def pool_id(self) -> int:
        """The random 64-bit number that handles of this pool carry."""
        return self._state.pool_id

    @property
    def is_alive(self) -> bool:
        """Whether any process is attached."""
        return anyone_lives(self._state.locks)

    def stats(self) -> PoolStats:
        """As `BlockPool.stats`."""
        return self._state.stats()

    def allocations(self) -> list[AllocationInfo]:
        """As `BlockPool.allocations`."""
        return self._state.allocations()

    def participants(self) -> list[ParticipantInfo]:
        """As `BlockPool.participants`."""
        return self._state.participant_infos()

    def waiters(self) -> list[WaiterInfo]:
        """As `BlockPool.waiters`."""
        return self._state.waiter_infos()

    def cache_stats(self) -> CacheStats:
        """As `BlockPool.cache_stats`."""
        return self._cache.stats()

    def entries(self) -> list[EntryInfo]:
        """As `BlockPool.entries`."""
        return self._cache.entries()

    def bump_epoch(self) -> int:
        """As `BlockPool.bump_epoch`."""
        return self._cache.bump_epoch()

    def drop_all(self) -> int:
        """As `BlockPool.drop_all`."""
        return self._cache.drop_all()

    def snapshot(self) -> PoolSnapshot:
        """`stats`, `allocations`, `participants` and `waiters` of one and the same moment."""
        return self._state.snapshot()

    def check(self) -> list[Violation]:
        """As `BlockPool.check`."""
        return self._state.check()

    def reap(self) -> ReapReport:
        """As `BlockPool.reap`."""
        return self._state.reap()

    def close(self) -> None:
        """End the access. The pool is not affected."""
        self._state.close()

    def __enter__(self) -> PoolInspector:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def queue_snapshot(name: str) -> QueueSnapshot:
    """Look into the queue of that name, living or dead, without joining it.

    Raises `PoolNotFoundError`, `IncompatiblePoolError`, `PoolPermissionError`.
    """
    with contextlib.closing(QueueState.open_unjoined(name)) as queue:
        return QueueSnapshot(
            name=queue.name,
            size_bytes=queue.segment.size_bytes,
            messages=queue.messages,
            capacity=queue.capacity,
            message_bytes=queue.message_bytes,
            participants=queue.participant_infos(),
        )


def list_pools(lock_timeout: float = LOCK_TIMEOUT) -> list[PoolSummary]:
    """Every pool of this node that this user can read, by name.

    `lock_timeout`: seconds to wait for the lock of each, else it is listed without its counts.
    """
    return [each for each in list_segments(lock_timeout) if each.kind == "pool"]


def list_segments(lock_timeout: float = LOCK_TIMEOUT) -> list[PoolSummary]:
    """As `list_pools`, with the queues."""
    summaries = []
    for entry in sorted(os.listdir(SHM_DIRECTORY)):
        # ValueError: no pool can have that name. Not found: removed since the directory was read.
        with contextlib.suppress(ValueError, PoolNotFoundError):
            summary = _summary(normal_name(entry), lock_timeout)
            if summary is not None:
                summaries.append(summary)
    return summaries


def pool_names() -> list[str]:
    """The names of the pools of this node that this user can read, whatever their state."""
    names = []
    for entry in sorted(os.listdir(SHM_DIRECTORY)):
        # Incompatible: a directory, or anything else that is no file.
        with contextlib.suppress(
            ValueError, PoolNotFoundError, PoolPermissionError, IncompatiblePoolError
        ):
            name = normal_name(entry)
            with open_existing(name) as file:
                if is_ours(file.fileno()) and is_pool(file.fileno()):
                    names.append(name)
    return names


def summary_of(name: str, lock_timeout: float = LOCK_TIMEOUT) -> PoolSummary | None:
    """The pool or queue of that name; None: there is none that this user can read."""
    try:
        return _summary(normal_name(name), lock_timeout)
    except PoolNotFoundError:
        return None


def segment_state(name: str) -> tuple[Kind, Literal["alive", "dead"]]:
    """What the segment of that name is, and whether any process is attached to it.

    Raises `PoolNotFoundError`, `PoolPermissionError`, and `IncompatiblePoolError` for a segment
    that is neither a pool nor a queue.
    """
    name = normal_name(name)
    with _opened(name) as (fd, locks):
        return _kind(fd, name), "alive" if anyone_lives(locks) else "dead"


def users_of(name: str) -> list[ParticipantInfo]:
    """The living participants of a pool or a queue; empty when its segment cannot be read.

    Raises `PoolNotFoundError`.
    """
    try:
        if segment_state(name)[0] == "queue":
            infos = queue_snapshot(name).participants
        else:
            with PoolInspector(name, LOCK_TIMEOUT) as pool:
                infos = pool.participants()
    except PoolNotFoundError:
        raise
    except ShmBlocksError:
        return []
    return [info for info in infos if info.is_alive]


def remove_pool(name: str, force: bool = False) -> None:
    """Remove the name of a pool or a queue.

    With `force` also while processes use it: they keep their memory, and nobody can join them.

    Raises `PoolExistsError` when a process uses it and `force` is not given, `PoolNotFoundError`,
    and `IncompatiblePoolError` for a segment that is neither a pool nor a queue.
    """
    name = normal_name(name)
    with _opened(name) as (fd, locks):
        kind = _kind(fd, name)
        if force:
            unlink_file(name, file_identity(fd))
        elif not unlink_dead(fd, locks, name, LOCK_TIMEOUT):
            users = ", ".join(map(str, users_of(name))) or "some processes"
            raise PoolExistsError(
                f"{kind} {name} is in use by {users}; end them, or remove its name by force "
                "(`shmblocks rm --force`): they keep the memory, nobody can join them"
            )


def remove_dead_pools(prefix: str) -> list[str]:
    """Remove the pools whose names begin with `prefix` and that no process uses; their names.

    What a supervisor's SIGKILL of all workers has left behind. Pools of other users, and whatever
    is in use, stay. Raises `ValueError` for an empty prefix: name what is yours.
    """
    if not prefix.strip("/"):
        raise ValueError(f"prefix: expected the beginning of your pools' names, got {prefix!r}")
    removed = []
    for name in pool_names():
        if name.startswith("/" + prefix.removeprefix("/")):
            with contextlib.suppress(PoolNotFoundError, PoolExistsError):  # gone, or in use
                remove_pool(name)
                removed.append(name)
    return removed


@contextlib.contextmanager
def _opened(name: str) -> Iterator[tuple[int, FileLocks]]:
    with open_existing(name) as file, contextlib.closing(FileLocks(file.fileno())) as locks:
        yield file.fileno(), locks


def _kind(fd: int, name: str) -> Kind:
    if not is_ours(fd):
        raise IncompatiblePoolError(f"pool {name}: the segment of that name is not a pool")
    return "pool" if is_pool(fd) else "queue"


def _summary(name: str, lock_timeout: float = LOCK_TIMEOUT) -> PoolSummary | None:
    """None for a segment that is not of this library, or of another user."""
    try:
        with _opened(name) as (fd, locks):
            kind = _kind(fd, name)
            size = os.fstat(fd).st_size
            is_alive = anyone_lives(locks)
    except (PoolPermissionError, IncompatiblePoolError):
        return None
    found = PoolSummary(
        name=name, kind=kind, size_bytes=size, state="alive" if is_alive else "dead"
    )
    try:
        return _with_counts(found, lock_timeout)
    except (IncompatiblePoolError, DamagedPoolError) as error:
        return msgspec.structs.replace(found, state="incompatible", problem=str(error))
    except PoolNotFoundError:
        raise
    except ShmBlocksError as error:
        return msgspec.structs.replace(found, problem=str(error))


def _with_counts(found: PoolSummary, lock_timeout: float) -> PoolSummary:
    if found.kind == "queue":
        participants = queue_snapshot(found.name).participants
        living = sum(info.is_alive for info in participants)
        return msgspec.structs.replace(found, participants=living)
    with PoolInspector(found.name, lock_timeout) as inspector:
        stats = inspector.stats()
    return msgspec.structs.replace(found, stats=stats, participants=stats.participants)
