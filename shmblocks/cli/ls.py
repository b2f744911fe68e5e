"""`shmblocks ls`: every pool on this node, the dead and the unreadable among them."""

from __future__ import annotations

from argparse import Namespace

from shmblocks.cli import gather
from shmblocks.cli.command import Command
from shmblocks.cli.document import Column, Document, Line, Table, Text
from shmblocks.cli.reports import LsReport, PoolRow
from shmblocks.cli.words import POOL_STYLES, share_text
from shmblocks.doctor.words import bytes_text

_COLUMNS = (
    Column("name"),
    Column("state"),
    Column("size", right=True),
    Column("alive", right=True),
    Column("dead", right=True),
    Column("blocks used", right=True),
    Column("use", right=True),
    Column(""),
)


def _gather(_: Namespace) -> LsReport:
    return LsReport(pools=gather.pools())


def _show(report: LsReport, _: Namespace) -> Document:
    rows = tuple(_row(pool) for pool in report.pools)
    return (Table(Text(""), _COLUMNS, rows, "no pools on this node"),)


def _row(pool: PoolRow) -> Line:
    return (
        Text(pool.name, "title"),
        Text(pool.state, POOL_STYLES.get(pool.state, "plain")),
        Text(bytes_text(pool.size_bytes)),
        Text(_number(pool.participants)),
        Text(_number(pool.dead_participants), "bad" if pool.dead_participants else "plain"),
        *_use(pool),
        Text(pool.problem, "dim"),
    )


def _number(count: int | None) -> str:
    return "-" if count is None else str(count)


def _use(pool: PoolRow) -> tuple[Text, Text]:
    if pool.total_blocks is None or pool.free_blocks is None:
        return Text("-"), Text("-")
    used = pool.total_blocks - pool.free_blocks
    return Text(f"{used}/{pool.total_blocks}"), Text(share_text(used, pool.total_blocks))


LS = Command(
    name="ls",
    summary="all pools on this node: size, participants, use",
    description=(
        "List all pools on this node. A pool is alive while a process is attached to it, and dead\n"
        "when all of them were killed; `shmblocks reap --all` removes dead ones. Incompatible\n"
        "pools belong to another version, or are damaged. Queues are listed too. Other segments,\n"
        "and those of other users, are left out."
    ),
    examples=(
        ("shmblocks ls", "a table"),
        ("shmblocks ls --json | jq '.pools[].name'", "for programs"),
    ),
    report=LsReport,
    gather=_gather,
    show=_show,
)
