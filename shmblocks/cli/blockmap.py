"""The picture of `map`: which cell of the terminal shows which blocks, and how.

Two rows of marks per line of blocks. The upper one is the state: a capital letter where all of the
cell's blocks are in use, a small one where some of them are free. The lower one is whose they are:
the owner's letter where an allocation begins, `-` where it goes on, `*` where several owners meet.

    0   RRRRRRRRPPPPPPPP........LLLL....
        a-------b-------        a---

It knows numbers and letters only: nothing of pools, terminals or colours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

MARKS = {"reserved": "R", "published": "P", "leased": "L", "draining": "D"}
FREE_MARK = "."
GOES_ON = "-"
SEVERAL = "*"


class Span(msgspec.Struct, frozen=True):
    """One allocation: consecutive blocks in one state, of one owner (a letter)."""

    start_block: int
    num_blocks: int
    state: str
    owner: str


class Cell(msgspec.Struct, frozen=True):
    """What one place in the picture shows; `state` and `owner` are what to colour it by."""

    mark: str
    state: str
    owner_mark: str
    owner: str


class Picture(msgspec.Struct, frozen=True):
    """Cells in the order of their blocks; the last row may be shorter."""

    blocks_per_cell: int
    cells_per_row: int
    cells: tuple[Cell, ...]

    def rows(self) -> Iterator[tuple[int, tuple[Cell, ...]]]:
        """(first block, cells) of each row."""
        for start in range(0, len(self.cells), self.cells_per_row):
            yield start * self.blocks_per_cell, self.cells[start : start + self.cells_per_row]


@dataclass
class _Tally:
    """What is in one cell while the spans are gone through."""

    blocks: dict[str, int] = field(default_factory=dict)  # by state
    owners: set[str] = field(default_factory=set)
    starts: bool = False


def draw(total_blocks: int, spans: Sequence[Span], columns: int, rows: int) -> Picture:
    """Fit `total_blocks` into at most `rows` rows of at most `columns` cells.

    A cell stands for a power of two of blocks: one, as long as that fits.
    """
    cells_per_row = round_width(columns)
    per_cell = 1
    while -(-total_blocks // per_cell) > cells_per_row * rows:
        per_cell *= 2
    tallies = _tally(total_blocks, spans, per_cell)
    cells = tuple(
        _cell(tallies.get(place), min(per_cell, total_blocks - place * per_cell))
        for place in range(-(-total_blocks // per_cell))
    )
    return Picture(per_cell, cells_per_row, cells)


def round_width(columns: int) -> int:
    """The largest of 1, 2, 3, 4, 6, 8, 12, 16, 24 .. that fits: round block numbers at each row."""
    width = 1
    while width * 2 <= max(columns, 1):
        width *= 2
    return width * 3 // 2 if width > 1 and width * 3 // 2 <= columns else width


def _tally(total_blocks: int, spans: Sequence[Span], per_cell: int) -> dict[int, _Tally]:
    tallies: dict[int, _Tally] = {}
    for span in spans:
        end = min(span.start_block + span.num_blocks, total_blocks)
        for place in range(span.start_block // per_cell, -(-end // per_cell)):
            tally = tallies.setdefault(place, _Tally())
            first = max(span.start_block, place * per_cell)
            last = min(end, (place + 1) * per_cell)
            tally.blocks[span.state] = tally.blocks.get(span.state, 0) + last - first
            tally.owners.add(span.owner)
            tally.starts = tally.starts or first == span.start_block
    return tallies


def _cell(tally: _Tally | None, size: int) -> Cell:
    if tally is None:
        return Cell(FREE_MARK, "free", " ", "")
    state = max(tally.blocks, key=lambda name: tally.blocks[name])
    mark = MARKS.get(state, "?")
    if sum(tally.blocks.values()) < size:
        mark = mark.lower()
    if len(tally.owners) > 1:
        return Cell(mark, state, SEVERAL, "")
    (owner,) = tally.owners
    return Cell(mark, state, owner if tally.starts else GOES_ON, owner)
