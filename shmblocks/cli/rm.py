"""`shmblocks rm NAME`: remove a pool that nobody lives in, or (`--force`) any."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from shmblocks.cli import gather
from shmblocks.cli.command import Command, add_name
from shmblocks.cli.document import Document, Line, Lines, line
from shmblocks.cli.reports import RmReport
from shmblocks.cli.words import who, who_text


def _add_arguments(parser: ArgumentParser) -> None:
    add_name(parser)
    parser.add_argument(
        "--force",
        action="store_true",
        help="also while processes are attached: they keep the memory, nobody can join them",
    )


def _gather(arguments: Namespace) -> RmReport:
    return gather.remove(arguments.name, force=arguments.force)


def _show(report: RmReport, _: Namespace) -> Document:
    lines: list[Line] = [line(f"removed {report.name}")]
    lines += [line("  still used by ", who(row)) for row in report.participants]
    return (Lines(tuple(lines)),)


def _refusal(report: RmReport) -> str:
    if report.removed:
        return ""
    living = ", ".join(who_text(row) for row in report.participants) or "somebody"
    return f"pool {report.name} is in use by {living}; end them first, or use --force"


RM = Command(
    name="rm",
    summary="remove a pool; refuses while somebody lives in it",
    description=(
        "Remove a pool. Refuses, with exit code 1 and the names of those who live in it, while\n"
        "processes are attached. With --force the name goes anyway: attached processes keep\n"
        "working in the memory they have mapped, and a new pool can take the name."
    ),
    examples=(
        ("shmblocks rm my-pool", "a leftover"),
        ("shmblocks rm my-pool --force", "whoever is attached"),
    ),
    report=RmReport,
    gather=_gather,
    show=_show,
    add_arguments=_add_arguments,
    refusal=_refusal,
)
