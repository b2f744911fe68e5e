"""What is shown, without saying how: lines, facts and tables of styled text.

Both renderers get the same document, so that plain text says everything that colours say.
Text may come from a foreign segment or another process (roles, request ids): it is made harmless
here, once, so that no renderer writes somebody's escape sequences to a terminal.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Style = Literal[
    "plain",
    "title",
    "dim",
    "good",
    "warn",
    "bad",
    "free",
    "reserved",
    "published",
    "leased",
    "draining",
    "owner-1",
    "owner-2",
    "owner-3",
    "owner-4",
    "owner-5",
    "owner-6",
]
OWNER_STYLES: tuple[Style, ...] = (
    "owner-1",
    "owner-2",
    "owner-3",
    "owner-4",
    "owner-5",
    "owner-6",
)


class Text(msgspec.Struct, frozen=True):
    """A piece of text in one style. Never contains a line end or a control character."""

    text: str
    style: Style = "plain"

    def __post_init__(self) -> None:
        if not self.text.isprintable():
            msgspec.structs.force_setattr(self, "text", harmless(self.text))


Line = tuple[Text, ...]


class Lines(msgspec.Struct, frozen=True):
    """Lines shown as they are."""

    lines: tuple[Line, ...]


class Facts(msgspec.Struct, frozen=True):
    """Names and values, one pair a line."""

    title: Text
    rows: tuple[tuple[str, Line], ...]


class Column(msgspec.Struct, frozen=True):
    """Heading of a table's column; numbers stand to the right."""

    heading: str
    right: bool = False


class Table(msgspec.Struct, frozen=True):
    """Rows of as many cells as there are columns; `empty` is said where there is no row."""

    title: Text
    columns: tuple[Column, ...]
    rows: tuple[Line, ...]
    empty: str


Document = tuple[Lines | Facts | Table, ...]


def harmless(text: str) -> str:
    """Control characters written as escapes: `\\x1b` instead of what it does to a terminal."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def line(*parts: Text | str) -> Line:
    """A line of strings and styled texts."""
    return tuple(part if isinstance(part, Text) else Text(part) for part in parts)
