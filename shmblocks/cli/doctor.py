"""`shmblocks doctor`: says before the start what will fail on this machine."""

from __future__ import annotations

from argparse import Namespace

from shmblocks.cli.command import Command
from shmblocks.cli.document import Document, Line, Lines, Style, Text, line
from shmblocks.cli.reports import DoctorReport
from shmblocks.doctor import CheckResult, run_checks
from shmblocks.doctor.words import count_text

_STYLES: dict[str, Style] = {"ok": "good", "warn": "warn", "fail": "bad", "skip": "dim"}


def _gather(_: Namespace) -> DoctorReport:
    checks = tuple(run_checks())
    return DoctorReport(healthy=all(check.status != "fail" for check in checks), checks=checks)


def _show(report: DoctorReport, _: Namespace) -> Document:
    width = max((len(check.name) for check in report.checks), default=0)
    lines = tuple(part for check in report.checks for part in _lines(check, width))
    return (Lines(lines), Lines((_summary(report),)))


def _lines(check: CheckResult, width: int) -> tuple[Line, ...]:
    status = Text(f"{check.status:<4}", _STYLES[check.status])
    first = line(status, f"  {check.name:<{width}}  ", check.found)
    if not check.advice:
        return (first,)
    return (first, line(" " * (width + 8), Text(f"-> {check.advice}", _STYLES[check.status])))


def _summary(report: DoctorReport) -> Line:
    counts = {status: sum(check.status == status for check in report.checks) for status in _STYLES}
    text = (
        f"{counts['ok']} ok, {count_text(counts['warn'], 'warning')}, "
        f"{count_text(counts['fail'], 'failure')}, {counts['skip']} skipped: "
    )
    if report.healthy:
        return line(text, Text("pools work here", "good"))
    return line(text, Text("see the failures above", "bad"))


def _exit_code(report: DoctorReport) -> int:
    return 0 if report.healthy else 1


DOCTOR = Command(
    name="doctor",
    summary="says before the start what will fail on this machine",
    description=(
        "Try what pools stand on: shared memory and its limits, kernel features, descriptors,\n"
        "CUDA, and a real pool between two processes. Nothing is left behind. Exit code 1 if any\n"
        "check failed. Takes seconds, since torch is imported in a process of its own."
    ),
    examples=(
        ("shmblocks doctor", "all checks, with advice"),
        (
            "shmblocks doctor --json | jq '.checks[] | select(.status != \"ok\")'",
            "what is not fine",
        ),
    ),
    report=DoctorReport,
    gather=_gather,
    show=_show,
    exit_code=_exit_code,
)
