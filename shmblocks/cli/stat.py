"""`shmblocks stat NAME`: what a pool or queue is made of, and who holds or awaits which blocks."""

from __future__ import annotations

from argparse import Namespace
from typing import Literal

import msgspec

from shmblocks._state.info import (
    AllocationInfo,
    CounterValues,
    HistogramValues,
    LeaseInfo,
    NodePeerInfo,
    ParticipantInfo,
    PoolSnapshot,
    PoolStats,
    WaiterInfo,
)
from shmblocks._state.layout import UNBOUNDED
from shmblocks._words import bytes_text, count_text
from shmblocks.cli.commands import Answer, Command, add_name
from shmblocks.cli.render import (
    Document,
    Line,
    Text,
    account,
    age_text,
    counted_blocks,
    counted_cache,
    facts,
    joined,
    line,
    participant_text,
    state_text,
    table,
)
from shmblocks.config import Field, PoolConfig
from shmblocks.inspector import PoolInspector, QueueSnapshot, queue_snapshot, segment_state


class PoolReport(PoolSnapshot, frozen=True, kw_only=True):
    """Answer of `shmblocks stat` for a pool: one moment of it."""

    kind: Literal["pool"] = "pool"
    state: Literal["alive", "dead"]
    config: PoolConfig


class QueueReport(QueueSnapshot, frozen=True, kw_only=True):
    """Answer of `shmblocks stat` for a queue."""

    kind: Literal["queue"] = "queue"
    state: Literal["alive", "dead"]


_FIELDS = "name | dtype | shape | >bytes per token"
_PARTICIPANTS = ">slot | >pid | >pid namespace | role | state | >attached | "
_ALLOCATIONS = "blocks | >tokens | >generation | state | >age | request | owner | leases"
_LEASES = "blocks | >generation | kind | >age | holder | "
_PEERS = "address | served by | >connected | >fetches | >bytes"
_WAITERS = "> | >blocks | >waits | >last poll | request | who"


def _stat(arguments: Namespace) -> Answer:
    kind, state = segment_state(arguments.name)
    if kind == "queue":
        queue = queue_snapshot(arguments.name)
        report = QueueReport(state=state, **msgspec.structs.asdict(queue))
        return Answer(report, _show_queue(report))
    with PoolInspector(arguments.name) as pool:
        snapshot = msgspec.structs.asdict(pool.snapshot())
        config = pool.config
    pool_report = PoolReport(state=state, config=config, **snapshot)
    return Answer(pool_report, _show_pool(pool_report))


def _show_queue(report: QueueReport) -> Document:
    rows = [
        ("kind", line("queue")),
        ("state", line(state_text(report.state))),
        ("size", line(bytes_text(report.size_bytes))),
        ("messages", line(f"{report.messages} of at most {report.capacity}")),
        ("message size", line(f"at most {bytes_text(report.message_bytes)}")),
    ]
    return joined(facts(report.name, rows), _participants(report.participants))


def _show_pool(report: PoolReport) -> Document:
    allocations = report.allocations
    leases = [_lease(each, lease) for each in allocations for lease in each.leases]
    waiters = [_waiter(number, each) for number, each in enumerate(report.waiters, 1)]
    return joined(
        facts(report.stats.name, _facts(report)),
        facts("since it was made, over all processes", _counters(report.stats.counters)),
        table("fields", _FIELDS, _fields(report.config), "none"),
        _participants(report.participants),
        table("allocations", _ALLOCATIONS, list(map(_allocation, allocations)), "none"),
        table("leases", _LEASES, leases, "none"),
        table("waiting for blocks, in order of arrival", _WAITERS, waiters, "nobody"),
        _peers(report.peers),
    )


def _peers(peers: list[NodePeerInfo]) -> Document:
    """Nothing for a pool that no server has readers for."""
    return table("peers on other nodes", _PEERS, list(map(_peer, peers)), "none") if peers else []


def _peer(info: NodePeerInfo) -> Line:
    return (
        Text(info.address),
        Text(f"slot {info.server_slot}"),
        Text(age_text(info.age_seconds)),
        Text(str(info.fetched)),
        Text(bytes_text(info.sent_bytes)),
    )


def _facts(report: PoolReport) -> list[tuple[str, Line]]:
    config, stats = report.config, report.stats
    tokens = f"{config.total_tokens} in {config.total_blocks} blocks of {config.block_size}"
    limits = f"{config.max_participants} participants, {config.max_leases} leases"
    timeouts = f"unclaimed {config.unclaimed_timeout:g} s, lock {config.lock_timeout:g} s"
    return [
        ("kind", line("pool")),
        ("state", line(state_text(report.state))),
        ("pool id", line(f"{stats.pool_id:016x}")),
        ("size", line(bytes_text(stats.size_bytes))),
        ("tokens", line(tokens)),
        ("landing", line(f"{config.default_num_blocks} blocks")),
        ("limits", line(limits)),
        ("timeouts", line(timeouts)),
        ("group", line(config.group or "none: its user only")),
        *_device(stats),
        ("blocks", account(stats)),
    ]


def _device(stats: PoolStats) -> list[tuple[str, Line]]:
    """Nothing for a pool in host memory that no GPU uses."""
    rows: list[tuple[str, Line]] = []
    if stats.device_bytes:
        size = f"{bytes_text(stats.device_bytes)}, {stats.device_state}"
        rows.append(
            ("device", line(f"{stats.device}: {size}, open in {stats.device_openers} processes"))
        )
    if stats.device_bytes or stats.gpu_users:
        pinned = f"{stats.gpu_users} processes, {bytes_text(stats.pinned_bytes)} pinned"
        waits = f"{stats.pending_leases} leases, {stats.settling_allocations} allocations"
        rows += [("GPU users", line(pinned)), ("wait for streams", line(waits))]
    return rows


def _counters(counted: CounterValues) -> list[tuple[str, Line]]:
    deaths = f"{counted.reaped_blocks} blocks reaped, {counted.lock_takeovers} changes completed"
    rows = [
        ("blocks", line(counted_blocks(counted))),
        ("of the dead", line(deaths)),
        ("wait for blocks", line(_durations(counted.alloc_wait))),
        ("publish to open", line(_durations(counted.publish_to_open))),
        ("lock held", line(f"{_durations(counted.lock_held)} (one section in 64 is timed)")),
    ]
    cache = counted_cache(counted)
    if cache:
        rows.append(("cache", line(cache)))
    return [*rows, *_nodes(counted)]


def _nodes(counted: CounterValues) -> list[tuple[str, Line]]:
    """What crossed between nodes; nothing for a pool that no other node has to do with."""
    rows = []
    if counted.node_reads or counted.node_given_back or counted.node_refusals:
        served = (
            f"{counted.node_reads} fetches, {bytes_text(counted.node_sent_bytes)}; "
            f"{counted.node_given_back} given back, {counted.node_refusals} refused, "
            f"{counted.node_turned_away} connections turned away"
        )
        rows.append(("to other nodes", line(served)))
    if counted.node_fetches or counted.node_failures:
        fetched = (
            f"{counted.node_fetches} fetches, {bytes_text(counted.node_received_bytes)}; "
            f"{counted.node_failures} failed"
        )
        if counted.node_quarantined:
            fetched += f", {count_text(counted.node_quarantined, 'block')} quarantined"
        rows.append(("from other nodes", line(fetched)))
    return rows


def _durations(histogram: HistogramValues) -> str:
    """How many, and below which bound half and 99% of them are."""
    if not histogram.count:
        return "none"
    half, most = histogram.bound(0.5), histogram.bound(0.99)
    return f"{histogram.count}: half under {_short(half)}, 99% under {_short(most)}"


def _short(seconds: float) -> str:
    for unit, size in (("us", 1e-6), ("ms", 1e-3)):
        if seconds < 1000 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def _fields(config: PoolConfig) -> list[Line]:
    return [*map(_field, config.fields), line("aux", "int32", "[16] per block", "-")]


def _field(field: Field) -> Line:
    sizes = [str(size) for size in field.shape]
    sizes.insert(len(sizes) if field.transposed else 0, "tokens")
    return line(field.name, field.dtype, f"[{', '.join(sizes)}]", str(field.token_bytes))


def _participants(infos: list[ParticipantInfo]) -> Document:
    return table("participants", _PARTICIPANTS, list(map(_participant, infos)), "none")


def _participant(info: ParticipantInfo) -> Line:
    marks = ["creator"] if info.is_creator else []
    marks += ["core"] if info.has_core else []
    marks += ["GPU"] if info.uses_gpu else []
    marks += ["CUDA memory open"] if info.has_device_memory else []
    marks += [f"{bytes_text(info.pinned_bytes)} pinned"] if info.pinned_bytes else []
    return (
        Text(str(info.slot)),
        Text(str(info.pid)),
        Text(str(info.pid_namespace)),
        Text(info.role or "-"),
        state_text("alive" if info.is_alive else "dead"),
        Text(f"{age_text(info.age_seconds)} ago"),
        Text(", ".join(marks), "dim"),
    )


def _allocation(info: AllocationInfo) -> Line:
    pending = sum(lease.is_pending for lease in info.leases)
    leases = [f"{len(info.leases) - pending} open"] if len(info.leases) > pending else []
    leases += [f"{pending} pending"] if pending else []
    if info.readers_left:
        leases.append(f"{_readers(info.readers_left)} to come")
    return (
        Text(_blocks_text(info)),
        Text(str(info.num_tokens)),
        Text(str(info.generation)),
        state_text(str(info.state)),
        Text(age_text(info.age_seconds)),
        Text(info.req_id or "-"),
        participant_text(info.owner_id, info.owner),
        Text(", ".join(leases) or "-"),
    )


def _readers(count: int) -> str:
    return "any number" if count >= UNBOUNDED else str(count)


def _lease(allocation: AllocationInfo, lease: LeaseInfo) -> Line:
    pending = "pending: released, its stream is still at work"
    return (
        Text(_blocks_text(allocation)),
        Text(str(allocation.generation)),
        Text(lease.kind),
        Text(age_text(lease.age_seconds)),
        participant_text(lease.holder_id, lease.holder),
        Text(pending if lease.is_pending else "", "dim"),
    )


def _waiter(number: int, info: WaiterInfo) -> Line:
    return (
        Text(f"{number}."),
        Text(str(info.num_blocks)),
        Text(age_text(info.age_seconds)),
        Text(f"{age_text(info.seconds_since_poll)} ago"),
        Text(info.req_id or "-"),
        participant_text(info.participant_id, info.participant),
    )


def _blocks_text(info: AllocationInfo) -> str:
    return f"{info.start_block}-{info.start_block + info.num_blocks - 1}"


STAT = Command(
    name="stat",
    summary="one pool or queue: participants, who holds or awaits which blocks since when",
    description=(
        "Show one pool: its config and fields, the account of its blocks, the attached processes\n"
        "(pids as their own pid namespace counts them), every allocation with its owner, request\n"
        "id, state, age and leases, and those who wait for blocks. Of a queue: its messages and\n"
        "the attached processes. Looking does not keep a pool alive."
    ),
    examples=(
        ("shmblocks stat my-pool", "everything"),
        ("shmblocks stat my-pool --json | jq .stats", "the counts only"),
        ("shmblocks stat my-pool --json | jq .waiters", "who waits for blocks"),
    ),
    reports=(PoolReport, QueueReport),
    run=_stat,
    add_arguments=add_name,
)
