"""`shmblocks check NAME`: does the shared state keep its invariants?"""

from __future__ import annotations

from argparse import Namespace

from shmblocks.cli import gather
from shmblocks.cli.command import Command, add_name
from shmblocks.cli.document import Document, Lines, Text, line
from shmblocks.cli.reports import CheckReport
from shmblocks.doctor.words import count_text


def _gather(arguments: Namespace) -> CheckReport:
    return gather.check(arguments.name)


def _show(report: CheckReport, _: Namespace) -> Document:
    if report.whole:
        return (Lines((line(f"{report.name}: ", Text("all invariants hold", "good")),)),)
    found = count_text(len(report.violations), "violation")
    return (
        Lines(
            (
                line(f"{report.name}: ", Text(found, "bad")),
                *(
                    line(Text(f"  invariant {violation.invariant}: ", "bad"), violation.message)
                    for violation in report.violations
                ),
            )
        ),
    )


def _exit_code(report: CheckReport) -> int:
    return 0 if report.whole else 1


CHECK = Command(
    name="check",
    summary="check the invariants of a pool; exit code 1 on a violation",
    description=(
        "Read the shared state of one pool under its lock and name every violation of its\n"
        "invariants. Exit code 0: none; 1: there are some, each printed."
    ),
    examples=(
        ("shmblocks check my-pool", "say what is wrong"),
        ("shmblocks check my-pool && echo fine", "for scripts"),
    ),
    report=CheckReport,
    gather=_gather,
    show=_show,
    add_arguments=add_name,
    exit_code=_exit_code,
)
