"""`shmblocks stat NAME`: what a pool is made of, and who holds which blocks since when."""

from __future__ import annotations

from argparse import Namespace

from shmblocks.cli import gather
from shmblocks.cli.command import Command, add_name
from shmblocks.cli.document import Column, Document, Facts, Line, Table, Text, line
from shmblocks.cli.reports import AllocationRow, DeviceRow, LeaseRow, ParticipantRow, StatReport
from shmblocks.cli.words import POOL_STYLES, account, age_text, alive, state, who
from shmblocks.config import Field
from shmblocks.doctor.words import bytes_text

_PARTICIPANTS = (
    Column("place", right=True),
    Column("pid", right=True),
    Column("pid namespace", right=True),
    Column("role"),
    Column("state"),
    Column("attached", right=True),
    Column(""),
)
_ALLOCATIONS = (
    Column("blocks"),
    Column("tokens", right=True),
    Column("generation", right=True),
    Column("state"),
    Column("age", right=True),
    Column("request"),
    Column("owner"),
    Column("leases"),
)
_LEASES = (
    Column("blocks"),
    Column("generation", right=True),
    Column("kind"),
    Column("age", right=True),
    Column("holder"),
)
_FIELDS = (
    Column("name"),
    Column("dtype"),
    Column("shape"),
    Column("bytes per token", right=True),
)


def _gather(arguments: Namespace) -> StatReport:
    return gather.stat(arguments.name)


def _show(report: StatReport, _: Namespace) -> Document:
    return (
        Facts(Text(report.name, "title"), _facts(report)),
        Table(Text("fields", "title"), _FIELDS, _fields(report), "none"),
        Table(
            Text("participants", "title"),
            _PARTICIPANTS,
            tuple(_participant(row) for row in report.participants),
            "none",
        ),
        Table(
            Text("allocations", "title"),
            _ALLOCATIONS,
            tuple(_allocation(row) for row in report.allocations),
            "none",
        ),
        Table(
            Text("leases", "title"),
            _LEASES,
            tuple(_lease(row, lease) for row in report.allocations for lease in row.leases),
            "none",
        ),
    )


def _facts(report: StatReport) -> tuple[tuple[str, Line], ...]:
    config = report.config
    return (
        ("state", line(Text(report.state, POOL_STYLES.get(report.state, "plain")))),
        ("pool id", line(report.pool_id)),
        ("size", line(bytes_text(report.size_bytes))),
        (
            "tokens",
            line(f"{config.total_tokens} in {config.total_blocks} blocks of {config.block_size}"),
        ),
        ("landing", line(f"{config.default_num_blocks} blocks")),
        (
            "limits",
            line(f"{config.max_participants} participants, {config.max_leases} leases"),
        ),
        (
            "timeouts",
            line(f"unclaimed {config.unclaimed_timeout:g} s, lock {config.lock_timeout:g} s"),
        ),
        ("group", line(config.group or "none: its user only")),
        *_device(report.device),
        ("blocks", account(report.blocks)),
    )


def _device(row: DeviceRow | None) -> tuple[tuple[str, Line], ...]:
    """Only for a pool that has to do with a GPU."""
    if row is None or not (row.device_bytes or row.gpu_users):
        return ()
    memory: tuple[tuple[str, Line], ...] = ()
    if row.device_bytes:
        text = f"{bytes_text(row.device_bytes)}, {row.state}, open in {row.openers}"
        memory = (("device", line(f"{row.device}: {text}")),)
    pinned = f"{row.gpu_users} processes, {bytes_text(row.pinned_bytes)} pinned"
    waits = f"{row.pending_leases} leases, {row.settling_allocations} allocations"
    return (*memory, ("GPU users", line(pinned)), ("wait for streams", line(waits)))


def _fields(report: StatReport) -> tuple[Line, ...]:
    aux = line("aux", "int32", "[16] per block", "-")
    return (*(_field(field) for field in report.config.fields), aux)


def _field(field: Field) -> Line:
    shape = ", ".join(("tokens", *map(str, field.shape)))
    if field.transposed:
        shape = ", ".join((*map(str, field.shape), "tokens"))
    return line(field.name, field.dtype, f"[{shape}]", str(field.token_bytes))


def _participant(row: ParticipantRow) -> Line:
    return (
        Text(str(row.place)),
        Text(str(row.pid)),
        Text(str(row.pid_namespace)),
        Text(row.role or "-"),
        alive(row.alive),
        Text(f"{age_text(row.age_seconds)} ago"),
        Text(_marks(row), "dim"),
    )


def _marks(row: ParticipantRow) -> str:
    marks = ["creator"] if row.creator else []
    marks += ["GPU"] if row.uses_gpu else []
    marks += ["CUDA memory open"] if row.has_device_memory else []
    marks += [f"{bytes_text(row.pinned_bytes)} pinned"] if row.pinned_bytes else []
    return ", ".join(marks)


def _allocation(row: AllocationRow) -> Line:
    return (
        Text(_blocks_text(row)),
        Text(str(row.num_tokens)),
        Text(str(row.generation)),
        state(row.state),
        Text(age_text(row.age_seconds)),
        Text(row.request_id or "-"),
        who(row.owner),
        Text(_leases_text(row)),
    )


def _leases_text(row: AllocationRow) -> str:
    parts = [f"{len(row.leases)} open"] if row.leases else []
    parts += [f"{row.readers_left} to come"] if row.readers_left else []
    return ", ".join(parts) or "-"


def _lease(row: AllocationRow, lease: LeaseRow) -> Line:
    return (
        Text(_blocks_text(row)),
        Text(str(row.generation)),
        Text(lease.kind),
        Text(age_text(lease.age_seconds)),
        who(lease.holder),
    )


def _blocks_text(row: AllocationRow) -> str:
    return f"{row.start_block}-{row.start_block + row.num_blocks - 1}"


STAT = Command(
    name="stat",
    summary="one pool: config, participants, who holds which blocks since when",
    description=(
        "Show one pool: its config and fields, the account of its blocks, the attached processes\n"
        "(pids as their own pid namespace counts them), and every allocation with its owner,\n"
        "request id, state, age and open leases. Looking does not keep the pool alive."
    ),
    examples=(
        ("shmblocks stat my-pool", "everything"),
        ("shmblocks stat my-pool --json | jq .blocks", "the account only"),
    ),
    report=StatReport,
    gather=_gather,
    show=_show,
    add_arguments=add_name,
)
