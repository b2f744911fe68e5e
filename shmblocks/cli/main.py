"""The command `shmblocks`: reads arguments, runs one command, ends with an exit code.

    0   done; for `check` and `doctor`: nothing is wrong
    1   it said no: there is no such pool, an invariant does not hold, a process still uses it
    2   the arguments make no sense
    130 interrupted (Ctrl-C)

Results go to standard output, errors as one line to standard error. When the reader of standard
output goes away (`| head`), the rest is dropped and that is no error.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn, TextIO

import msgspec

from shmblocks.cli.cache import CACHE
from shmblocks.cli.commands import CHECK, DOCTOR, LS, REAP, RM, Command, UsageError
from shmblocks.cli.jsonhelp import keys_text
from shmblocks.cli.keep import KEEP
from shmblocks.cli.map import MAP
from shmblocks.cli.metrics import METRICS
from shmblocks.cli.render import harmless, write_document, write_text
from shmblocks.cli.serve import SERVE
from shmblocks.cli.stat import STAT
from shmblocks.cli.top import TOP
from shmblocks.errors import ShmBlocksError

SAID_NO = 1
USAGE = 2
INTERRUPTED = 130

COMMANDS = {
    command.name: command
    for command in (LS, STAT, MAP, TOP, CACHE, METRICS, CHECK, RM, REAP, KEEP, SERVE, DOCTOR)
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code instead of leaving."""
    try:
        return _run(_parser().parse_args(argv))
    except SystemExit as stop:  # argparse: after --help, or for wrong arguments
        return stop.code if isinstance(stop.code, int) else 0
    except UsageError as error:
        write_error(str(error), sys.stderr)
        return USAGE
    except (ShmBlocksError, OSError) as error:
        write_error(str(error), sys.stderr)
        return SAID_NO
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(arguments: argparse.Namespace) -> int:
    if arguments.version:
        write_text(f"shmblocks {_version()}\n", sys.stdout)
        return 0
    if arguments.command is None:
        raise UsageError(
            f"expected a command, one of: {', '.join(COMMANDS)} (see: shmblocks --help)"
        )
    answer = COMMANDS[arguments.command].run(arguments)
    try:
        if arguments.json:
            text = msgspec.json.format(msgspec.json.encode(answer.report), indent=2).decode()
            write_text(f"{text}\n", sys.stdout)
        elif not answer.refusal:
            write_document(answer.document, sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError:
        _silence_stdout()
    if answer.refusal:
        write_error(answer.refusal, sys.stderr)
    return answer.exit_code


def _version() -> str:
    from importlib import metadata  # slow to import, and only this needs it

    try:
        return metadata.version("shmblocks")
    except metadata.PackageNotFoundError:
        return "(not installed: run from its source)"


def write_error(text: str, file: TextIO) -> None:
    """One line, whatever is in the message."""
    write_text(f"shmblocks: {harmless(' '.join(text.split()))}\n", file)


def _silence_stdout() -> None:
    """After a broken pipe: the interpreter flushes once more at exit, into this."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


# ---- arguments ---------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and where the help is."""

    def error(self, message: str) -> NoReturn:
        write_error(f"{message} (see: {self.prog} --help)", sys.stderr)
        raise SystemExit(USAGE)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="shmblocks",
        description="Look at the pools and queues of this node, and clean up after the dead.",
        epilog="shmblocks COMMAND --help shows examples and the keys of the JSON output.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for command in COMMANDS.values():
        subparser = subparsers.add_parser(
            command.name,
            help=command.summary,
            description=command.description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.add_argument("--json", action="store_true", help="print one JSON document")
        subparser.epilog = _epilog(command)
    return parser


def _epilog(command: Command) -> str:
    width = max(len(call) for call, _ in command.examples)
    examples = "\n".join(f"  {call:<{width}}  {what}" for call, what in command.examples)
    return f"examples:\n{examples}\n\nJSON keys:\n{keys_text(command.reports)}"
