"""`shmblocks map NAME`: a picture of the blocks, fitted to the terminal.

Two rows of marks per row of blocks. The upper one is the state: a capital letter where all of the
cell's blocks are in use, a small one where some of them are free. The lower one is the owner: its
letter where an allocation begins, `-` where it continues, `*` where a cell has several owners.

    0   RRRRRRRRPPPPPPPP........LLLL....
        a-------b-------        a---
"""

from __future__ import annotations

import shutil
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from shmblocks._state.info import AllocationInfo, CounterValues, ParticipantId, PoolSnapshot
from shmblocks._words import count_text
from shmblocks.cli.commands import Answer, Command, add_name, count_argument
from shmblocks.cli.render import (
    BLOCK_STATES,
    OWNER_STYLES,
    Document,
    Line,
    Text,
    account,
    counted_blocks,
    counted_cache,
    joined,
    line,
    participant_text,
)
from shmblocks.inspector import PoolInspector

# Rows of blocks. Smaller: large pools are shown coarser. Larger: picture and legend scroll away.
ROWS = 16
MARKS = {state: state[0].upper() for state in BLOCK_STATES if state != "free"}
FREE_MARK = "."
CONTINUES = "-"
SEVERAL = "*"
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NO_LETTER_LEFT = "#"


class Span(NamedTuple):
    """One allocation: consecutive blocks in one state, of one owner (a letter)."""

    start_block: int
    num_blocks: int
    state: str
    owner: str


class _Piece(NamedTuple):
    """The part of a span that lies in one cell; `begins`: with the span's first block."""

    num_blocks: int
    state: str
    owner: str
    begins: bool


class Cell(NamedTuple):
    """One character of the picture and the one below it; `state` and `owner` give the colours."""

    mark: str
    state: str
    owner_mark: str
    owner: str


class Picture(NamedTuple):
    """Cells in the order of their blocks; the last row may be shorter."""

    blocks_per_cell: int
    cells_per_row: int
    cells: list[Cell]

    def rows(self) -> Iterator[tuple[int, list[Cell]]]:
        """(first block, cells) of each row."""
        for start in range(0, len(self.cells), self.cells_per_row):
            yield start * self.blocks_per_cell, self.cells[start : start + self.cells_per_row]


def draw(total_blocks: int, spans: Sequence[Span], columns: int, rows: int) -> Picture:
    """Fit `total_blocks` into at most `rows` rows of at most `columns` cells.

    A cell stands for a power of two of blocks: for one, as long as that fits.
    """
    cells_per_row = round_width(columns)
    per_cell = 1
    while -(-total_blocks // per_cell) > cells_per_row * rows:
        per_cell *= 2
    pieces = _pieces(total_blocks, spans, per_cell)
    sizes = (min(per_cell, total_blocks - first) for first in range(0, total_blocks, per_cell))
    cells = [_cell(pieces.get(number, ()), size) for number, size in enumerate(sizes)]
    return Picture(per_cell, cells_per_row, cells)


def round_width(columns: int) -> int:
    """The largest of 1, 2, 3, 4, 6, 8, 12, 16, 24 .. that fits: rows start at round numbers."""
    width = 1 << (max(columns, 1).bit_length() - 1)
    return width * 3 // 2 if width > 1 and width * 3 // 2 <= columns else width


def _pieces(total_blocks: int, spans: Sequence[Span], per_cell: int) -> dict[int, list[_Piece]]:
    """By the number of the cell; empty cells are left out."""
    pieces: dict[int, list[_Piece]] = {}
    for span in spans:
        start, end = span.start_block, min(span.start_block + span.num_blocks, total_blocks)
        for number in range(start // per_cell, -(-end // per_cell)):
            first = max(start, number * per_cell)
            size = min(end, (number + 1) * per_cell) - first
            piece = _Piece(size, span.state, span.owner, first == start)
            pieces.setdefault(number, []).append(piece)
    return pieces


def _cell(pieces: Sequence[_Piece], size: int) -> Cell:
    if not pieces:
        return Cell(FREE_MARK, "free", " ", "")
    blocks: Counter[str] = Counter()
    for piece in pieces:
        blocks[piece.state] += piece.num_blocks
    state = max(blocks, key=lambda name: blocks[name])
    mark = MARKS.get(state, "?")
    if blocks.total() < size:
        mark = mark.lower()
    owners = {piece.owner for piece in pieces}
    if len(owners) > 1:
        return Cell(mark, state, SEVERAL, "")
    (owner,) = owners
    begins = any(piece.begins for piece in pieces)
    return Cell(mark, state, owner if begins else CONTINUES, owner)


# ---- the command -------------------------------------------------------------------------------


def _map(arguments: Namespace) -> Answer:
    with PoolInspector(arguments.name) as pool:
        snapshot = pool.snapshot()
    columns = arguments.width or shutil.get_terminal_size().columns
    return Answer(snapshot, _show(snapshot, columns, arguments.rows))


def _show(snapshot: PoolSnapshot, columns: int, rows: int) -> Document:
    stats, allocations = snapshot.stats, snapshot.allocations
    letters = _letters(allocations)
    spans = [
        Span(info.start_block, info.num_blocks, str(info.state), letters[info.owner_id])
        for info in allocations
    ]
    digits = len(str(stats.total_blocks))
    picture = draw(stats.total_blocks, spans, columns - digits - 2, rows)
    per_block = count_text(stats.block_size, "token")
    per_cell = count_text(picture.blocks_per_cell, "block")
    heading = line(Text(stats.name, "title"), f": blocks of {per_block}, {per_cell} per character")
    return joined(
        [heading, account(stats)],
        list(_picture_lines(picture, digits)),
        list(_legend(allocations, letters, is_coarse=picture.blocks_per_cell > 1)),
        list(_counted(stats.counters)),
    )


def _letters(allocations: Sequence[AllocationInfo]) -> dict[ParticipantId, str]:
    """A letter for each owner, in the order of their first blocks."""
    owners = dict.fromkeys(info.owner_id for info in allocations)
    letters = _LETTERS[: len(owners)].ljust(len(owners), _NO_LETTER_LEFT)
    return dict(zip(owners, letters, strict=True))


def _picture_lines(picture: Picture, digits: int) -> Iterator[Line]:
    for first, cells in picture.rows():
        states = [Text(cell.mark, cell.state) for cell in cells]
        yield line(Text(f"{first:>{digits}}  ", "dim"), *merged(states))
        owners = [Text(cell.owner_mark, _owner_style(cell.owner)) for cell in cells]
        if any(owner.text != " " for owner in owners):
            yield line(" " * (digits + 2), *merged(owners))


def merged(texts: list[Text]) -> Iterator[Text]:
    """Neighbours of one style become one piece of text."""
    for style, group in groupby(texts, key=lambda text: text.style):
        yield Text("".join(text.text for text in group), style)


def _owner_style(letter: str) -> str:
    return f"owner-{_LETTERS.find(letter) % OWNER_STYLES}" if letter else ""


def _legend(
    allocations: Sequence[AllocationInfo], letters: dict[ParticipantId, str], *, is_coarse: bool
) -> Iterator[Line]:
    marks = [Text(f"  {mark} {state}", state) for state, mark in MARKS.items()]
    yield line(
        Text(f"{FREE_MARK} free", "free"), *marks, "  (small: partly free)" if is_coarse else ""
    )
    if letters:
        several = f", {SEVERAL} several owners" if is_coarse else ""
        yield line(
            f"below each row: its owner where an allocation begins, {CONTINUES} continues{several}"
        )
    for owner_id, letter in letters.items():
        owned = [info for info in allocations if info.owner_id == owner_id]
        blocks = count_text(sum(info.num_blocks for info in owned), "block")
        yield line(
            Text(f"{letter} ", _owner_style(letter)),
            participant_text(owner_id, owned[0].owner),
            f": {count_text(len(owned), 'allocation')}, {blocks}",
        )


def _counted(counters: CounterValues) -> Iterator[Line]:
    yield line("since it was made, over all processes: ", counted_blocks(counters))
    cache = counted_cache(counters)
    if cache:
        yield line("cache: ", cache)


def _add_arguments(parser: ArgumentParser) -> None:
    add_name(parser)
    parser.add_argument(
        "--width", type=count_argument, help="columns to use (default: the terminal's)"
    )
    parser.add_argument(
        "--rows", type=count_argument, default=ROWS, help="rows at most (default: %(default)s)"
    )


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
    reports=(PoolSnapshot,),
    run=_map,
    add_arguments=_add_arguments,
)
