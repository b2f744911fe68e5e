"""The command `shmblocks`: reads arguments, runs one command, answers with an exit code.

    0   done; for `check` and `doctor`: nothing is wrong
    1   it said no: the pool is not there, violations were found, somebody still lives in it
    2   the arguments make no sense
    130 interrupted (Ctrl-C)

Results go to standard output, errors as one line to standard error. When the reader of standard
output goes away (`| head`), the rest is dropped without a word.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from shmblocks.cli import output
from shmblocks.cli.check import CHECK
from shmblocks.cli.command import AnyCommand, UsageError
from shmblocks.cli.doctor import DOCTOR
from shmblocks.cli.jsonhelp import keys_text
from shmblocks.cli.ls import LS
from shmblocks.cli.map import MAP
from shmblocks.cli.reap import REAP
from shmblocks.cli.rm import RM
from shmblocks.cli.stat import STAT
from shmblocks.errors import ShmBlocksError

SAID_NO = 1
USAGE = 2
INTERRUPTED = 130

_ALL: tuple[AnyCommand, ...] = (LS, STAT, MAP, CHECK, RM, REAP, DOCTOR)
COMMANDS = {command.name: command for command in _ALL}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and where the help is."""

    def error(self, message: str) -> NoReturn:
        output.write_error(f"{message} (see: {self.prog} --help)", sys.stderr)
        raise SystemExit(USAGE)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="shmblocks",
        description="Look at the pools of shared memory on this node, and clean up after the dead.",
        epilog="shmblocks COMMAND --help shows examples and the keys of the JSON output.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for command in COMMANDS.values():
        _add_command(subparsers, command)
    return parser


def _add_command(subparsers: argparse._SubParsersAction[_Parser], command: AnyCommand) -> None:
    parser = subparsers.add_parser(
        command.name,
        help=command.summary,
        description=command.description,
        epilog=_epilog(command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def _epilog(command: AnyCommand) -> str:
    width = max(len(call) for call, _ in command.examples)
    examples = "\n".join(f"  {call:<{width}}  {what}" for call, what in command.examples)
    return f"examples:\n{examples}\n\nJSON keys:\n{keys_text(command.report)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code instead of leaving."""
    try:
        arguments = build_parser().parse_args(argv)
        return _answer(arguments)
    except SystemExit as stop:  # argparse: after --help, or for wrong arguments
        return stop.code if isinstance(stop.code, int) else 0
    except UsageError as error:
        output.write_error(str(error), sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED


def _answer(arguments: argparse.Namespace) -> int:
    if arguments.version:
        output.write_text(f"shmblocks {_version()}\n", sys.stdout)
        return 0
    if arguments.command is None:
        raise UsageError(
            f"expected a command, one of: {', '.join(COMMANDS)} (see: shmblocks --help)"
        )
    try:
        return _run(COMMANDS[arguments.command], arguments)
    except (ShmBlocksError, OSError) as error:
        output.write_error(str(error), sys.stderr)
        return SAID_NO


def _version() -> str:
    from importlib import metadata  # slow to import, and only this needs it

    try:
        return metadata.version("shmblocks")
    except metadata.PackageNotFoundError:
        return "(not installed: run from its source)"


def _run(command: AnyCommand, arguments: argparse.Namespace) -> int:
    outcome = command.run(arguments)
    try:
        if arguments.json:
            output.write_json(outcome.report, sys.stdout)
        elif not outcome.refusal:
            output.write_document(outcome.show(), sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError:
        output.silence_stdout()
    if outcome.refusal:
        output.write_error(outcome.refusal, sys.stderr)
    return outcome.exit_code
