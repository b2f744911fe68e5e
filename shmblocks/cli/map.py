"""`shmblocks map NAME`: a picture of the blocks, fitted to the terminal."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from itertools import groupby

from shmblocks.cli import gather, output
from shmblocks.cli.blockmap import FREE_MARK, GOES_ON, MARKS, SEVERAL, Cell, Picture, Span, draw
from shmblocks.cli.command import Command, add_name, count
from shmblocks.cli.document import OWNER_STYLES, Document, Line, Lines, Style, Text, line
from shmblocks.cli.reports import AllocationRow, Holder, MapReport
from shmblocks.cli.words import STATE_STYLES, account, who
from shmblocks.doctor.words import count_text

# Smaller: large pools are shown coarser. Larger: the picture and its legend leave the screen.
ROWS = 16
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NO_LETTER_LEFT = "#"

# (place, incarnation): the place alone would mix up an owner that is gone and its successor.
_Who = tuple[int, int]


def _add_arguments(parser: ArgumentParser) -> None:
    add_name(parser)
    parser.add_argument("--width", type=count, help="columns to use (default: the terminal's)")
    parser.add_argument(
        "--rows", type=count, default=ROWS, help="rows at most (default: %(default)s)"
    )


def _gather(arguments: Namespace) -> MapReport:
    return gather.block_map(arguments.name)


def _show(report: MapReport, arguments: Namespace) -> Document:
    letters = _letters(report)
    spans = [_span(row, letters) for row in report.allocations]
    digits = len(str(report.blocks.all))
    columns = (arguments.width or output.width()) - digits - 2
    picture = draw(report.blocks.all, spans, columns, arguments.rows)
    return (
        Lines((_heading(report, picture), account(report.blocks))),
        Lines(tuple(_picture(picture, digits))),
        Lines(tuple(_legend(report, letters, picture))),
    )


def _letters(report: MapReport) -> dict[_Who, str]:
    """A letter for each owner, in the order of their first blocks."""
    owners = dict.fromkeys(_key(row.owner) for row in report.allocations)
    letters = _LETTERS[: len(owners)].ljust(len(owners), _NO_LETTER_LEFT)
    return dict(zip(owners, letters, strict=True))


def _key(owner: Holder) -> _Who:
    return owner.place, owner.incarnation


def _span(row: AllocationRow, letters: dict[_Who, str]) -> Span:
    return Span(row.start_block, row.num_blocks, row.state, letters[_key(row.owner)])


def _heading(report: MapReport, picture: Picture) -> Line:
    per_cell = count_text(picture.blocks_per_cell, "block")
    per_block = count_text(report.block_size, "token")
    text = f": blocks of {per_block}, {per_cell} a character"
    return line(Text(report.name, "title"), text)


def _picture(picture: Picture, digits: int) -> Iterator[Line]:
    for first, cells in picture.rows():
        yield line(Text(f"{first:>{digits}}  ", "dim"), *_runs(cells, _state_text))
        if any(cell.owner_mark != " " for cell in cells):
            yield line(" " * (digits + 2), *_runs(cells, _owner_text))


def _runs(cells: tuple[Cell, ...], text_of: Callable[[Cell], Text]) -> Iterator[Text]:
    """Cells side by side; neighbours of one style become one piece of text."""
    for style, group in groupby(map(text_of, cells), key=lambda text: text.style):
        yield Text("".join(text.text for text in group), style)


def _state_text(cell: Cell) -> Text:
    return Text(cell.mark, STATE_STYLES.get(cell.state, "plain"))


def _owner_text(cell: Cell) -> Text:
    return Text(cell.owner_mark, _owner_style(cell.owner))


def _owner_style(letter: str) -> Style:
    place = _LETTERS.find(letter) if letter else -1
    return OWNER_STYLES[place % len(OWNER_STYLES)] if place >= 0 else "plain"


def _legend(report: MapReport, letters: dict[_Who, str], picture: Picture) -> Iterator[Line]:
    marks = [Text(f"{FREE_MARK} free", "free")]
    marks += [Text(f"  {mark} {name}", STATE_STYLES[name]) for name, mark in MARKS.items()]
    small = "  (small letter: partly free)" if picture.blocks_per_cell > 1 else ""
    yield line(*marks, small)
    if not letters:
        return
    several = f", {SEVERAL} several owners" if picture.blocks_per_cell > 1 else ""
    yield line(f"below each row: its owner where an allocation begins, {GOES_ON} goes on{several}")
    yield from (_owner_line(report, key, letter) for key, letter in letters.items())


def _owner_line(report: MapReport, key: _Who, letter: str) -> Line:
    rows = [row for row in report.allocations if _key(row.owner) == key]
    owner = rows[0].owner
    blocks = sum(row.num_blocks for row in rows)
    text = f"{count_text(len(rows), 'allocation')}, {count_text(blocks, 'block')}"
    return line(Text(f"{letter} ", _owner_style(letter)), who(owner), f": {text}")


MAP = Command(
    name="map",
    summary="a picture of the blocks: free, reserved, published, leased, whose",
    description=(
        "Draw the blocks of one pool, a character for each block, or for a group of them where\n"
        "there are many. The upper line of each pair shows states, the lower one owners."
    ),
    examples=(
        ("shmblocks map my-pool", "fitted to the terminal"),
        ("shmblocks map my-pool --width 200 --rows 50", "finer"),
        ("watch -n 1 shmblocks map my-pool", "again and again"),
    ),
    report=MapReport,
    gather=_gather,
    show=_show,
    add_arguments=_add_arguments,
)
