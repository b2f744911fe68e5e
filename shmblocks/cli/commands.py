"""What a command is, and the short ones: ls, check, rm, reap, doctor.

Each command asks for all that it needs once and answers with a report (data) and a document made
from it, so that `--json` and the text always agree.
"""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from typing import Literal, NamedTuple

import msgspec

from shmblocks._os.segment import normal_name, remove_abandoned
from shmblocks._state.info import ParticipantInfo, PoolSummary, ReapReport, Violation
from shmblocks._words import bytes_text, count_text
from shmblocks.cli.render import (
    Document,
    Line,
    Text,
    joined,
    line,
    share_text,
    state_text,
    table,
)
from shmblocks.doctor import CHECKS, SGLANG_CHECKS, VLLM_CHECKS, CheckResult, run_checks
from shmblocks.errors import PoolExistsError, ShmBlocksError
from shmblocks.inspector import (
    PoolInspector,
    list_segments,
    remove_pool,
    segment_state,
    users_of,
)


class UsageError(Exception):
    """The arguments make no sense together; exit code 2."""


class Answer(NamedTuple):
    """What a command found.

    report      what `--json` prints
    document    what is shown otherwise
    refusal     why the command did nothing: one line for standard error, instead of the document
    """

    report: msgspec.Struct
    document: Document
    exit_code: int = 0
    refusal: str = ""


def add_nothing(_: ArgumentParser) -> None:
    """For a command without arguments of its own."""


class Command(NamedTuple):
    """One command. `examples` are calls and what they do; `reports` are the types of its JSON."""

    name: str
    summary: str
    description: str
    examples: tuple[tuple[str, str], ...]
    reports: tuple[type[msgspec.Struct], ...]
    run: Callable[[Namespace], Answer]
    add_arguments: Callable[[ArgumentParser], None] = add_nothing


def add_name(parser: ArgumentParser) -> None:
    """The argument NAME, as most commands take it."""
    parser.add_argument("name", metavar="NAME", type=pool_name, help="with or without a leading /")


def pool_name(text: str) -> str:
    """A name as `PoolInspector` wants it."""
    try:
        return normal_name(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def count_argument(text: str) -> int:
    """A whole number of at least 1."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


# ---- ls ----------------------------------------------------------------------------------------


class ListReport(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `shmblocks ls`: every pool and queue, by name."""

    pools: list[PoolSummary]


_HEADINGS = "name | kind | state | >size | >alive | >dead | >blocks used | >use | >hits | "


def _ls(_: Namespace) -> Answer:
    report = ListReport(pools=list_segments())
    rows = [_summary_row(summary) for summary in report.pools]
    return Answer(report, table("", _HEADINGS, rows, "no pools on this node"))


def _summary_row(summary: PoolSummary) -> Line:
    stats = summary.stats
    dead = used = use = hits = "-"
    dead_style = ""
    if stats:
        dead = str(stats.dead_participants)
        dead_style = "dead" if stats.dead_participants else ""
        used_blocks = stats.total_blocks - stats.free_blocks
        used = f"{used_blocks}/{stats.total_blocks}"
        use = share_text(used_blocks, stats.total_blocks)
        hits = share_text(stats.counters.hits, stats.counters.lookups)
    return (
        Text(summary.name, "title"),
        Text(summary.kind),
        state_text(summary.state),
        Text(bytes_text(summary.size_bytes)),
        Text("-" if summary.problem else str(summary.participants)),
        Text(dead, dead_style),
        Text(used),
        Text(use),
        Text(hits),
        Text(summary.problem, "dim"),
    )


LS = Command(
    name="ls",
    summary="all pools and queues of this node: size, participants, use",
    description=(
        "List all pools and queues of this node. One is alive while a process is attached to it,\n"
        "and dead when all its processes were killed; `shmblocks reap --all` removes the dead.\n"
        "`hits` is the share of the cache's lookups that found an entry, since the pool was made.\n"
        "An incompatible one belongs to another version, or is damaged. Other segments, and those\n"
        "of other users, are left out."
    ),
    examples=(
        ("shmblocks ls", "a table"),
        ("shmblocks ls --json | jq '.pools[].name'", "for programs"),
    ),
    reports=(ListReport,),
    run=_ls,
)

# ---- check -------------------------------------------------------------------------------------


class CheckReport(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `shmblocks check`: no violations, or exit code 1."""

    name: str
    violations: list[Violation]


def _check(arguments: Namespace) -> Answer:
    with PoolInspector(arguments.name) as pool:
        report = CheckReport(name=pool.name, violations=pool.check())
    if not report.violations:
        return Answer(report, [line(f"{report.name}: ", Text("all invariants hold", "ok"))])
    found = Text(count_text(len(report.violations), "violation"), "fail")
    document = [line(f"{report.name}: ", found)]
    for violation in report.violations:
        number = Text(f"  invariant {violation.invariant}: ", "fail")
        document.append(line(number, violation.message))
    return Answer(report, document, exit_code=1)


CHECK = Command(
    name="check",
    summary="check the invariants of a pool; exit code 1 on a violation",
    description=(
        "Read the shared state of one pool and name every invariant that does not hold. Exit code\n"
        "0: all hold; 1: some do not, each is printed."
    ),
    examples=(
        ("shmblocks check my-pool", "say what is wrong"),
        ("shmblocks check my-pool && echo fine", "for scripts"),
    ),
    reports=(CheckReport,),
    run=_check,
    add_arguments=add_name,
)

# ---- rm ----------------------------------------------------------------------------------------


class RemoveReport(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `shmblocks rm`. `participants`: the living ones, who are the reason of a refusal,
    or who go on without a name (`--force`)."""

    name: str
    removed: bool
    participants: list[ParticipantInfo]


def _rm(arguments: Namespace) -> Answer:
    name = arguments.name
    users = users_of(name)
    try:
        remove_pool(name, force=arguments.force)
    except PoolExistsError as error:
        # Asked again: those who use it now are the reason.
        report = RemoveReport(name=name, removed=False, participants=users_of(name))
        return Answer(report, [], exit_code=1, refusal=str(error))
    users_lines = [line(f"  still used by {info}") for info in users]
    report = RemoveReport(name=name, removed=True, participants=users)
    return Answer(report, [line(f"removed {name}"), *users_lines])


def _add_rm_arguments(parser: ArgumentParser) -> None:
    add_name(parser)
    parser.add_argument(
        "--force",
        action="store_true",
        help="also while processes are attached: they keep the memory, nobody can join them",
    )


RM = Command(
    name="rm",
    summary="remove a pool or queue; refuses while a process uses it",
    description=(
        "Remove a pool or a queue. While processes are attached it refuses, names them, and ends\n"
        "with exit code 1. With --force it removes the name anyway: attached processes keep\n"
        "working in the memory that they have mapped, and a new pool can take the name."
    ),
    examples=(
        ("shmblocks rm my-pool", "a leftover"),
        ("shmblocks rm my-pool --force", "whoever is attached"),
    ),
    reports=(RemoveReport,),
    run=_rm,
    add_arguments=_add_rm_arguments,
)

# ---- reap --------------------------------------------------------------------------------------


class ReapedSegment(msgspec.Struct, frozen=True, kw_only=True):
    """What was done to one pool or queue.

    `state`: before. `report` is null unless it was reaped; `removed`: it was dead, and is gone;
    `freed_bytes`: of shared memory; `skipped`: why nothing was done.
    """

    name: str
    kind: Literal["pool", "queue"]
    state: Literal["alive", "dead", "incompatible"]
    report: ReapReport | None = None
    removed: bool = False
    freed_bytes: int = 0
    skipped: str = ""


class ReapAllReport(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `shmblocks reap`."""

    pools: list[ReapedSegment]


def _reap(arguments: Namespace) -> Answer:
    if arguments.all == (arguments.name is not None):
        raise UsageError("reap: expected either NAME or --all (see: shmblocks reap --help)")
    if arguments.all:
        report = ReapAllReport(pools=[_reap_or_remove(each) for each in list_segments()])
        remove_abandoned()  # nameless segments of creators that were killed halfway
    else:
        report = ReapAllReport(pools=[_reap_one(arguments.name)])
    document = [_reaped_line(each) for each in report.pools]
    return Answer(report, document or [line("no pools on this node")])


def _reap_one(name: str) -> ReapedSegment:
    kind, state = segment_state(name)
    with PoolInspector(name) as pool:
        return ReapedSegment(name=name, kind=kind, state=state, report=pool.reap())


def _reap_or_remove(summary: PoolSummary) -> ReapedSegment:
    """For `--all`: what cannot be reaped or removed is reported and does not stop the others."""
    name = summary.name
    found = ReapedSegment(name=name, kind=summary.kind, state=summary.state)
    try:
        if summary.state == "dead":
            remove_pool(name)
            return msgspec.structs.replace(found, removed=True, freed_bytes=summary.size_bytes)
        if summary.state == "alive" and summary.kind == "pool":
            return _reap_one(name)
    except ShmBlocksError as error:
        return msgspec.structs.replace(found, skipped=str(error))
    return msgspec.structs.replace(found, skipped=summary.problem or "a queue in use")


def _reaped_line(reaped: ReapedSegment) -> Line:
    name = Text(reaped.name, "title")
    if reaped.skipped:
        return line(name, Text(f": left alone: {reaped.skipped}", "dim"))
    if reaped.removed:
        return line(name, f": removed, no process used it; {bytes_text(reaped.freed_bytes)} freed")
    hint = f" (no process uses it: shmblocks rm {reaped.name[1:]})"
    return line(name, f": {_done(reaped.report)}", Text(hint if reaped.state == "dead" else ""))


def _done(report: ReapReport | None) -> str:
    if report is None or report == ReapReport():
        return "nothing to reap"
    counts = (
        (report.participants, "dead participant", "dead participants"),
        (report.reservations, "reservation of the dead", "reservations of the dead"),
        (report.leases, "lease of the dead", "leases of the dead"),
        (report.unclaimed, "unclaimed publication", "unclaimed publications"),
    )
    parts = [count_text(count, one, many) for count, one, many in counts if count]
    return f"freed {count_text(report.blocks, 'block')}: {', '.join(parts)}"


def _add_reap_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="?", type=pool_name, help="the pool to reap")
    parser.add_argument(
        "--all", action="store_true", help="reap all living pools, remove dead pools and queues"
    )


REAP = Command(
    name="reap",
    summary="free what dead processes held; --all also removes dead pools and queues",
    description=(
        "Free the reservations of dead processes, release their leases, empty their slots, and\n"
        "free published blocks that nobody opened in time. What a living process holds is never\n"
        "taken. An allocation that finds too few free blocks reaps by itself; this does it now."
    ),
    examples=(
        ("shmblocks reap my-pool", "one pool"),
        ("shmblocks reap --all", "all pools; those that no process uses are removed"),
    ),
    reports=(ReapAllReport,),
    run=_reap,
    add_arguments=_add_reap_arguments,
)

# ---- doctor ------------------------------------------------------------------------------------


class DoctorReport(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `shmblocks doctor`. `healthy`: no check failed."""

    healthy: bool
    checks: list[CheckResult]


def _doctor(arguments: Namespace) -> Answer:
    asked = CHECKS
    asked += VLLM_CHECKS if arguments.vllm else ()
    asked += SGLANG_CHECKS if arguments.sglang else ()
    checks = list(run_checks(checks=asked))
    report = DoctorReport(healthy=all(check.status != "fail" for check in checks), checks=checks)
    width = max((len(check.name) for check in checks), default=0)
    lines = [part for check in checks for part in _check_lines(check, width)]
    document = joined(lines, [_verdict(report)])
    return Answer(report, document, exit_code=0 if report.healthy else 1)


def _check_lines(check: CheckResult, width: int) -> Document:
    status = Text(f"{check.status:<4}", check.status)
    lines = [line(status, f"  {check.name:<{width}}  {check.found}")]
    if check.advice:
        lines.append(line(" " * (width + 8), Text(f"-> {check.advice}", check.status)))
    return lines


def _verdict(report: DoctorReport) -> Line:
    found = [check.status for check in report.checks]
    text = (
        f"{found.count('ok')} ok, {count_text(found.count('warn'), 'warning')}, "
        f"{count_text(found.count('fail'), 'failure')}, {found.count('skip')} skipped: "
    )
    if report.healthy:
        return line(text, Text("pools work here", "ok"))
    return line(text, Text("see the failures above", "fail"))


def _add_doctor_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--vllm", action="store_true", help="also compare the connector with the installed vLLM"
    )
    parser.add_argument(
        "--sglang",
        action="store_true",
        help="also what the plug-in for SGLang needs",
    )


DOCTOR = Command(
    name="doctor",
    summary="says before the start what will fail on this machine",
    description=(
        "Try what pools need: shared memory and its limits, kernel features, descriptors, CUDA,\n"
        "and a real pool between two processes. Nothing is left behind. Exit code 1 if any check\n"
        "failed. It takes seconds, since it imports torch in a process of its own."
    ),
    examples=(
        ("shmblocks doctor", "all checks, with advice"),
        ("shmblocks doctor --vllm", "and the connector for vLLM"),
        (
            "shmblocks doctor --json | jq '.checks[] | select(.status != \"ok\")'",
            "what is not fine",
        ),
        ("shmblocks doctor --sglang", "and the plug-in for SGLang"),
    ),
    reports=(DoctorReport,),
    run=_doctor,
    add_arguments=_add_doctor_arguments,
)
