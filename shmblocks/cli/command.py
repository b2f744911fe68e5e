"""What a command is: how it is called, what it gathers, how that is shown, what it answers.

Gathering returns a report (data), showing turns a report into a document (no more questions asked),
so that `--json` and the picture on a terminal can never disagree.
"""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

import msgspec

from shmblocks._os.segment import normal_name
from shmblocks.cli.document import Document

R = TypeVar("R", bound=msgspec.Struct)


class UsageError(Exception):
    """The arguments make no sense together; exit code 2."""


def _no_arguments(_: ArgumentParser) -> None:
    """For commands without arguments of their own."""


def _always_fine(_: object) -> int:
    return 0


def _never_refused(_: object) -> str:
    return ""


@dataclass(frozen=True)
class Outcome:
    """What a command answers, whatever its report is; `show` draws it when it is wanted."""

    report: msgspec.Struct
    show: Callable[[], Document]
    exit_code: int
    refusal: str


class AnyCommand(Protocol):
    """A command as `main` sees it, whatever its report is."""

    @property
    def name(self) -> str: ...
    @property
    def summary(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def examples(self) -> tuple[tuple[str, str], ...]: ...
    @property
    def report(self) -> type[msgspec.Struct]: ...
    @property
    def add_arguments(self) -> Callable[[ArgumentParser], None]: ...
    def run(self, arguments: Namespace, /) -> Outcome: ...


@dataclass(frozen=True)
class Command(Generic[R]):
    """One command.

    examples    (call, what it does) for the help
    report      the type of what it gathers: its JSON, and the documentation of that
    refusal     why it did nothing, as one line for standard error; exit code 1
    """

    name: str
    summary: str
    description: str
    examples: tuple[tuple[str, str], ...]
    report: type[R]
    gather: Callable[[Namespace], R]
    show: Callable[[R, Namespace], Document]
    add_arguments: Callable[[ArgumentParser], None] = _no_arguments
    exit_code: Callable[[R], int] = _always_fine
    refusal: Callable[[R], str] = _never_refused

    def run(self, arguments: Namespace) -> Outcome:
        """Gather the report and judge it."""
        report = self.gather(arguments)
        refusal = self.refusal(report)
        code = 1 if refusal else self.exit_code(report)
        return Outcome(report, partial(self.show, report, arguments), code, refusal)


def add_name(parser: ArgumentParser) -> None:
    """The argument NAME, as most commands take it."""
    parser.add_argument(
        "name", metavar="NAME", type=pool_name, help="the pool's name, with or without '/'"
    )


def pool_name(text: str) -> str:
    """The name as the registry wants it; wrong ones are a matter of usage."""
    try:
        return normal_name(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)
