"""Renders a document with the `rich` library: colours, and tables fitted to the terminal.

Imported only when standard output is a terminal and `rich` is installed. `rich` itself respects
NO_COLOR and terminals that know no colours.
"""

from __future__ import annotations

from typing import TextIO

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table as RichTable
from rich.text import Text as RichText

from shmblocks.cli.document import Document, Facts, Line, Lines, Style, Table, Text

# Colours by name, not by number: they follow the terminal's own palette, dark or light.
STYLES: dict[Style, str] = {
    "plain": "",
    "title": "bold",
    "dim": "dim",
    "good": "green",
    "warn": "yellow",
    "bad": "bold red",
    "free": "dim",
    "reserved": "yellow",
    "published": "cyan",
    "leased": "green",
    "draining": "magenta",
    "owner-1": "bright_blue",
    "owner-2": "bright_yellow",
    "owner-3": "bright_green",
    "owner-4": "bright_magenta",
    "owner-5": "bright_cyan",
    "owner-6": "bright_red",
}


def write(document: Document, file: TextIO) -> None:
    """Print the document to a terminal."""
    console = Console(file=file, highlight=False, emoji=False, markup=False)
    for place, part in enumerate(document):
        if place:
            console.print()
        console.print(_part(part), soft_wrap=isinstance(part, Lines))


def _part(part: Lines | Facts | Table) -> RenderableType:
    if isinstance(part, Lines):
        return RichText("\n").join(_line(line) for line in part.lines)
    if isinstance(part, Facts):
        return _facts(part)
    return _table(part)


def _facts(facts: Facts) -> RichTable:
    grid = _titled(facts.title, RichTable(box=None, show_header=False, pad_edge=False))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts.rows:
        grid.add_row(f"  {name}", _line(value))
    return grid


def _table(table: Table) -> RenderableType:
    if not table.rows:
        return RichText("\n").join([_text(table.title), RichText(f"  {table.empty}", "dim")])
    shown = _titled(table.title, RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False))
    for column in table.columns:
        shown.add_column(
            column.heading, justify="right" if column.right else "left", overflow="fold"
        )
    for row in table.rows:
        shown.add_row(*(_text(cell) for cell in row))
    return shown


def _titled(title: Text, table: RichTable) -> RichTable:
    if title.text:
        table.title = _text(title)
        table.title_justify = "left"
        table.title_style = ""
    return table


def _line(line: Line) -> RichText:
    return RichText.assemble(*(_text(text) for text in line))


def _text(text: Text) -> RichText:
    return RichText(text.text, STYLES[text.style])
