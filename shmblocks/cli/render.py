"""How results are written for people: lines, facts and tables; colours on a terminal.

A document is a list of lines, and a line a tuple of styled texts. Plain text says everything that
the colours say. Everything written here is ASCII, except what comes from elsewhere (roles, request
ids); letters that the output's encoding lacks are written as escapes.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple, TextIO

from shmblocks._state.info import CounterValues, ParticipantId, ParticipantInfo, PoolStats

# The states of blocks, in the order in which an account lists them.
BLOCK_STATES = ("free", "reserved", "published", "leased", "draining", "settling")

# How each style looks, as ANSI codes (ECMA-48 SGR) of the terminal's own palette, dark or light.
# States and results are styles of the same name; a style that is not here is plain text.
CODES = {
    "title": "1",
    "dim": "2",
    "alive": "32",
    "dead": "1;31",
    "incompatible": "33",
    "ok": "32",
    "warn": "33",
    "fail": "1;31",
    "skip": "2",
    "free": "2",
    "reserved": "33",
    "published": "36",
    "leased": "32",
    "draining": "35",
    "settling": "34",
    "owner-0": "94",
    "owner-1": "93",
    "owner-2": "92",
    "owner-3": "95",
    "owner-4": "96",
    "owner-5": "91",
}
OWNER_STYLES = 6
_AGE_UNITS = (("d", 86400), ("h", 3600), ("min", 60))


class Text(NamedTuple):
    """A piece of text in one style."""

    text: str
    style: str = ""


Line = tuple[Text, ...]
Document = list[Line]


# ---- writing -----------------------------------------------------------------------------------


def write_document(document: Document, file: TextIO) -> None:
    """Write the lines: with colours to a terminal, unless `NO_COLOR` is set or TERM is `dumb`."""
    colours = wants_colours(file)
    lines = (line_text(parts, colours) for parts in document)
    write_text("".join(f"{text}\n" for text in lines), file)


def wants_colours(file: TextIO) -> bool:
    """Whether it is a terminal that can show colours, and nobody asked for none."""
    return file.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def write_text(text: str, file: TextIO) -> None:
    """Write text; letters that the file's encoding lacks become escapes instead of an error."""
    encoding = file.encoding or "utf-8"
    file.write(text.encode(encoding, "backslashreplace").decode(encoding))


def line_text(parts: Line, colours: bool) -> str:
    """One line as it is written."""
    shown = []
    for text, style in parts:
        code = CODES.get(style, "") if colours and text else ""
        shown.append(f"\x1b[{code}m{harmless(text)}\x1b[0m" if code else harmless(text))
    return "".join(shown).rstrip()


def harmless(text: str) -> str:
    """Control characters as escapes: `\\x1b` instead of what it does to a terminal.

    Roles and request ids come from other processes, and messages from damaged segments.
    """
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


# ---- documents ---------------------------------------------------------------------------------


def line(*parts: Text | str) -> Line:
    """A line of strings and styled texts."""
    return tuple(part if isinstance(part, Text) else Text(part) for part in parts)


def clipped(parts: Line, columns: int) -> Line:
    """As much of a line as fits a terminal of so many columns."""
    fitting: list[Text] = []
    for text, style in parts:
        shown = harmless(text)
        while _width(shown) > columns:
            shown = shown[:-1]
        columns -= _width(shown)
        fitting.append(Text(shown, style))
    return tuple(fitting)


def joined(*parts: Document) -> Document:
    """Several parts as one document, an empty line between them."""
    lines: Document = []
    for part in filter(None, parts):
        lines += [(), *part] if lines else part
    return lines


def facts(title: str, rows: Sequence[tuple[str, Line]]) -> Document:
    """Names and values, one pair a line."""
    width = max((len(name) for name, _ in rows), default=0)
    pairs = [(Text(f"  {name:<{width}}  ", "dim"), *value) for name, value in rows]
    return [line(Text(title, "title")), *pairs]


def table(title: str, headings: str, rows: Sequence[Line], empty: str) -> Document:
    """A table; the text `empty` where there is no row.

    `headings` are separated by ` | `, one for each cell of a row. A `>` in front of a heading
    aligns its column to the right.
    """
    head = [line(Text(title, "title"))] if title else []
    if not rows:
        return [*head, line(Text(f"  {empty}", "dim"))]
    columns = headings.split(" | ")
    top = tuple(Text(heading.removeprefix(">"), "dim") for heading in columns)
    shown = [tuple(Text(harmless(text), style) for text, style in row) for row in (top, *rows)]
    widths = [max(_width(cell.text) for cell in cells) for cells in zip(*shown, strict=True)]
    return [*head, *(_row(columns, row, widths) for row in shown)]


def _row(columns: Sequence[str], row: Line, widths: Sequence[int]) -> Line:
    parts: list[Text] = []
    for column, cell, width in zip(columns, row, widths, strict=True):
        padding = Text(" " * (width - _width(cell.text)))
        parts += [Text("  "), *((padding, cell) if column.startswith(">") else (cell, padding))]
    return tuple(parts)


def _width(text: str) -> int:
    """Columns of a terminal: CJK characters take two."""
    if text.isascii():
        return len(text)
    return sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text)


# ---- words -------------------------------------------------------------------------------------


def age_text(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 5 s`, `2 h 1 min`, `3 d 4 h`: two units at most."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    left = int(seconds)
    parts: list[str] = []
    for unit, size in _AGE_UNITS:
        count, left = divmod(left, size)
        if count or parts:
            parts.append(f"{count} {unit}")
    parts.append(f"{left} s")
    return " ".join(parts[:2])


def share_text(part: int, whole: int) -> str:
    """`25%`; 0% and 100% only where it is exactly that."""
    if not whole:
        return "-"
    percent = 100 * part / whole
    if 0 < percent < 1:
        return "<1%"
    if 99 < percent < 100:
        return ">99%"
    return f"{percent:.0f}%"


def state_text(state: str) -> Text:
    """The state of a pool, of a process or of blocks, in its colour."""
    return Text(state, state)


def participant_text(who: ParticipantId, info: ParticipantInfo | None) -> Text:
    """`participant 3 (pid 4242, embedding)`, as error messages name it. The dead stand out."""
    if info is None:
        return Text(f"participant {who.slot} (gone)", "dim")
    return Text(str(info), "" if info.is_alive else "dead")


def counted_blocks(counted: CounterValues) -> str:
    """What was done with blocks since the pool was made."""
    return (
        f"{counted.allocations} allocations, {counted.publishes} publishes, {counted.opens} opens, "
        f"{counted.releases} releases, {counted.alloc_timeouts} timeouts"
    )


def counted_cache(counted: CounterValues) -> str:
    """What was done with keys since the pool was made; empty: nothing."""
    if not (counted.lookups or counted.puts):
        return ""
    return (
        f"{counted.lookups} lookups, {share_text(counted.hits, counted.lookups)} hits; "
        f"{counted.puts} puts, {counted.evictions} evictions"
    )


def account(stats: PoolStats) -> Line:
    """`40 free + 8 reserved + ... = 64 blocks`; `!=` where the sum is wrong."""
    parts: list[Text] = []
    total = 0
    for state in BLOCK_STATES:
        count: int = getattr(stats, f"{state}_blocks")
        total += count
        parts += [Text(" + "), Text(f"{count} {state}", state if count else "dim")]
    equal = Text(" = ") if total == stats.total_blocks else Text(" != ", "fail")
    return (*parts[1:], equal, Text(f"{stats.total_blocks} blocks"))
