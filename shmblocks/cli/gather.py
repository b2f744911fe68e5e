"""Asks the node and its pools, and fills the reports. The only part that touches shared memory.

Looks through inspectors, never as a participant: a pool whose last process leaves while somebody
looks at it goes all the same.
"""

from __future__ import annotations

from shmblocks._state.check import AllocationInfo, LeaseInfo, PoolStats
from shmblocks._state.participants import ParticipantInfo
from shmblocks.cli.reports import (
    AllocationRow,
    Blocks,
    CheckReport,
    DeviceRow,
    Holder,
    LeaseRow,
    MapReport,
    ParticipantRow,
    PoolRow,
    ReapRow,
    RmReport,
    StatReport,
    ViolationRow,
)
from shmblocks.errors import (
    IncompatiblePoolError,
    PoolExistsError,
    PoolTimeoutError,
    ShmBlocksError,
)
from shmblocks.inspector import PoolSummary, list_segments, open_inspector, remove_pool


def pools() -> tuple[PoolRow, ...]:
    """All pools and queues of the node, by name."""
    return tuple(_pool(summary) for summary in list_segments())


def _pool(summary: PoolSummary) -> PoolRow:
    stats = summary.stats
    return PoolRow(
        name=summary.name,
        state=summary.state,
        size_bytes=summary.size_bytes,
        participants=stats.participants if stats else None,
        dead_participants=stats.dead_participants if stats else None,
        block_size=stats.block_size if stats else None,
        total_blocks=stats.total_blocks if stats else None,
        free_blocks=stats.free_blocks if stats else None,
        problem=summary.problem,
    )


def stat(name: str) -> StatReport:
    """Everything about one pool."""
    with open_inspector(name) as pool:
        stats = pool.stats()
        return StatReport(
            name=pool.name,
            pool_id=f"{pool.pool_id:016x}",
            state="alive" if pool.is_alive else "dead",
            size_bytes=stats.size_bytes,
            config=pool.config,
            blocks=_blocks(stats),
            participants=tuple(_participant(info) for info in pool.participants()),
            allocations=tuple(_allocation(info) for info in pool.allocations()),
            device=_device(stats),
        )


def block_map(name: str) -> MapReport:
    """What the picture of one pool is drawn from."""
    with open_inspector(name) as pool:
        return MapReport(
            name=pool.name,
            block_size=pool.config.block_size,
            blocks=_blocks(pool.stats()),
            participants=tuple(_participant(info) for info in pool.participants()),
            allocations=tuple(_allocation(info) for info in pool.allocations()),
        )


def check(name: str) -> CheckReport:
    """The violations of one pool."""
    with open_inspector(name) as pool:
        rows = tuple(
            ViolationRow(invariant=violation.invariant, message=violation.message)
            for violation in pool.check()
        )
        return CheckReport(name=pool.name, whole=not rows, violations=rows)


def remove(name: str, *, force: bool) -> RmReport:
    """Remove a pool, unless somebody lives in it and no force is to be used."""
    living = _living(name)
    try:
        remove_pool(name, force=force)
    except PoolExistsError:
        # Asked again: who lives there now is what kept it.
        return RmReport(name=name, removed=False, participants=_living(name))
    return RmReport(name=name, removed=True, participants=living)


def _living(name: str) -> tuple[ParticipantRow, ...]:
    """Who lives in a pool, as far as this version can read it."""
    try:
        with open_inspector(name) as pool:
            infos = pool.participants()
    except (IncompatiblePoolError, PoolTimeoutError):
        return ()  # whether anybody lives there is asked of the kernel, not of its bytes
    return tuple(_participant(info) for info in infos if info.is_alive)


def reap(name: str) -> ReapRow:
    """Give back what the dead of one pool held."""
    with open_inspector(name) as pool:
        state = "alive" if pool.is_alive else "dead"
        report = pool.reap()
    return ReapRow(
        name=name,
        state=state,
        reservations=report.reservations,
        leases=report.leases,
        unclaimed=report.unclaimed,
        blocks=report.blocks,
        participants=report.participants,
    )


def reap_all() -> tuple[ReapRow, ...]:
    """Reap all living pools, remove all that is dead; what cannot be is told, not fatal."""
    return tuple(_reap_or_remove(summary) for summary in list_segments())


def _reap_or_remove(summary: PoolSummary) -> ReapRow:
    name, state = summary.name, summary.state
    try:
        if state == "alive" and not summary.is_queue:
            return reap(name)
        if state == "dead":
            remove_pool(name)
            return ReapRow(name=name, state=state, removed=True, freed_bytes=summary.size_bytes)
    except ShmBlocksError as error:
        return ReapRow(name=name, state=state, skipped=str(error))
    return ReapRow(name=name, state=state, skipped=summary.problem)


def _blocks(stats: PoolStats) -> Blocks:
    parts = (
        stats.free_blocks,
        stats.reserved_blocks,
        stats.published_blocks,
        stats.leased_blocks,
        stats.draining_blocks,
    )
    free, reserved, published, leased, draining = parts
    return Blocks(
        free=free,
        reserved=reserved,
        published=published,
        leased=leased,
        draining=draining,
        all=stats.total_blocks,
        balanced=sum(parts) == stats.total_blocks,
    )


def _participant(info: ParticipantInfo) -> ParticipantRow:
    return ParticipantRow(
        place=info.place,
        incarnation=info.incarnation,
        pid=info.pid,
        pid_namespace=info.pid_namespace,
        alive=info.is_alive,
        creator=info.is_creator,
        role=info.role,
        age_seconds=info.age,
        uses_gpu=info.uses_gpu,
        has_device_memory=info.has_device_memory,
        pinned_bytes=info.pinned_bytes,
    )


def _device(stats: PoolStats) -> DeviceRow:
    return DeviceRow(
        device=stats.device,
        device_bytes=stats.device_bytes,
        state=stats.device_state,
        openers=stats.device_openers,
        gpu_users=stats.gpu_users,
        pinned_bytes=stats.pinned_bytes,
        pending_leases=stats.pending_leases,
        settling_allocations=stats.settling_allocations,
    )


def _allocation(info: AllocationInfo) -> AllocationRow:
    return AllocationRow(
        start_block=info.start_block,
        num_blocks=info.num_blocks,
        num_tokens=info.num_tokens,
        generation=info.generation,
        state=str(info.state),
        owner=_holder(info.owner_place, info.owner_incarnation, info.owner),
        request_id=info.req_id or None,
        age_seconds=info.age,
        readers_left=info.readers_left,
        leases=tuple(_lease(lease) for lease in info.leases),
    )


def _lease(info: LeaseInfo) -> LeaseRow:
    holder = _holder(info.place, info.incarnation, info.holder)
    return LeaseRow(holder=holder, kind=info.kind, age_seconds=info.age)


def _holder(place: int, incarnation: int, info: ParticipantInfo | None) -> Holder:
    if info is None:
        return Holder(place=place, incarnation=incarnation, pid=None, role="", alive=False)
    return Holder(
        place=place, incarnation=incarnation, pid=info.pid, role=info.role, alive=info.is_alive
    )
