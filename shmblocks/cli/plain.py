"""Renders a document as plain text: aligned columns, no colours, for files, pipes and logs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shmblocks.cli.document import Document, Facts, Line, Lines, Table


def render(document: Document) -> str:
    """The whole text; parts are set apart by an empty line."""
    parts = ("\n".join(_part(part)) for part in document)
    return "\n\n".join(part for part in parts if part) + "\n"


def _part(part: Lines | Facts | Table) -> Iterator[str]:
    if isinstance(part, Lines):
        yield from (_text(line).rstrip() for line in part.lines)
    elif isinstance(part, Facts):
        yield from _facts(part)
    else:
        yield from _table(part)


def _facts(facts: Facts) -> Iterator[str]:
    yield facts.title.text
    width = max((len(name) for name, _ in facts.rows), default=0)
    yield from (f"  {name:<{width}}  {_text(value)}".rstrip() for name, value in facts.rows)


def _table(table: Table) -> Iterator[str]:
    if table.title.text:
        yield table.title.text
    if not table.rows:
        yield f"  {table.empty}"
        return
    rows = [[column.heading for column in table.columns]]
    rows += [[cell.text for cell in row] for row in table.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield _row(table, row, widths)


def _row(table: Table, row: Sequence[str], widths: Sequence[int]) -> str:
    cells = (
        cell.rjust(width) if column.right else cell.ljust(width)
        for cell, width, column in zip(row, widths, table.columns, strict=True)
    )
    return ("  " + "  ".join(cells)).rstrip()


def _text(line: Line) -> str:
    return "".join(text.text for text in line)
