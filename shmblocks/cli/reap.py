"""`shmblocks reap NAME | --all`: give back what the dead held; remove dead pools (`--all`)."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from shmblocks.cli import gather
from shmblocks.cli.command import Command, UsageError, pool_name
from shmblocks.cli.document import Document, Line, Lines, Text, line
from shmblocks.cli.reports import ReapAnswer, ReapRow
from shmblocks.doctor.words import bytes_text, count_text


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="?", type=pool_name, help="the pool to reap")
    parser.add_argument(
        "--all", action="store_true", help="reap all living pools, and remove the dead ones"
    )


def _gather(arguments: Namespace) -> ReapAnswer:
    if arguments.all == (arguments.name is not None):
        raise UsageError("reap: expected either NAME or --all (see: shmblocks reap --help)")
    if arguments.all:
        return ReapAnswer(pools=gather.reap_all())
    return ReapAnswer(pools=(gather.reap(arguments.name),))


def _show(report: ReapAnswer, _: Namespace) -> Document:
    lines = tuple(_line(row) for row in report.pools)
    return (Lines(lines or (line("no pools on this node"),)),)


def _line(row: ReapRow) -> Line:
    name = Text(row.name, "title")
    if row.skipped:
        return line(name, Text(f": left alone: {row.skipped}", "dim"))
    if row.removed:
        return line(
            name, ": removed, nobody lived in it; ", bytes_text(row.freed_bytes), " are free"
        )
    done = _done(row)
    what = f"gave back {count_text(row.blocks, 'block')}: {', '.join(done)}"
    hint = f" (nobody lives in it: shmblocks rm {row.name[1:]})" if row.state == "dead" else ""
    return line(name, f": {what if done else 'nothing to reap'}", Text(hint, "dim"))


def _done(row: ReapRow) -> list[str]:
    counts = (
        (row.participants, "dead participant", "dead participants"),
        (row.reservations, "reservation of the dead", "reservations of the dead"),
        (row.leases, "lease of the dead", "leases of the dead"),
        (row.unclaimed, "unclaimed publication", "unclaimed publications"),
    )
    return [count_text(count, one, many) for count, one, many in counts if count]


REAP = Command(
    name="reap",
    summary="give back what dead processes held; --all also removes dead pools",
    description=(
        "Free the reservations of dead processes, release their leases, empty their places, and\n"
        "free published blocks that nobody opened in time. What a living process holds is never\n"
        "taken. Pools reap by themselves when they run out of room; this does it now."
    ),
    examples=(
        ("shmblocks reap my-pool", "one pool"),
        ("shmblocks reap --all", "all pools, and remove those that nobody lives in"),
    ),
    report=ReapAnswer,
    gather=_gather,
    show=_show,
    add_arguments=_add_arguments,
)
