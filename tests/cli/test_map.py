"""The picture of `map`: numbers and letters in, rows of marks out."""

from __future__ import annotations

import random

import pytest

from shmblocks.cli.map import MARKS, Picture, Span, draw, round_width


def drawn(picture: Picture) -> list[tuple[int, str, str]]:
    return [
        (first, "".join(cell.mark for cell in cells), "".join(cell.owner_mark for cell in cells))
        for first, cells in picture.rows()
    ]


def test_each_block_has_its_character_while_they_fit() -> None:
    spans = [
        Span(0, 3, "reserved", "a"),
        Span(3, 2, "published", "b"),
        Span(8, 4, "leased", "a"),
        Span(13, 1, "draining", "c"),
    ]
    picture = draw(16, spans, columns=16, rows=4)
    assert picture.blocks_per_cell == 1
    assert drawn(picture) == [(0, "RRRPP...LLLL.D..", "a--b-   a--- c  ")]


def test_an_allocation_that_crosses_a_row_goes_on_below() -> None:
    picture = draw(16, [Span(6, 4, "reserved", "a")], columns=8, rows=4)
    assert drawn(picture) == [(0, "......RR", "      a-"), (8, "RR......", "--      ")]


def test_the_last_row_ends_where_the_pool_ends() -> None:
    picture = draw(11, [Span(10, 1, "leased", "a")], columns=8, rows=4)
    assert drawn(picture) == [(0, "........", "        "), (8, "..L", "  a")]


def test_a_group_that_is_partly_free_has_a_small_letter() -> None:
    spans = [Span(0, 4, "reserved", "a"), Span(4, 1, "leased", "b")]
    picture = draw(16, spans, columns=4, rows=1)
    assert picture.blocks_per_cell == 4
    assert drawn(picture) == [(0, "Rl..", "ab  ")]


def test_a_group_of_several_owners_shows_the_state_of_most_blocks_and_a_star() -> None:
    spans = [Span(0, 1, "reserved", "a"), Span(1, 3, "leased", "b")]
    assert drawn(draw(8, spans, columns=2, rows=1)) == [(0, "L.", "* ")]


def test_one_used_block_among_a_million_is_seen() -> None:
    picture = draw(1 << 20, [Span(777_777, 1, "leased", "a")], columns=64, rows=16)
    marks = [cell.mark for cell in picture.cells]
    assert len(marks) == 64 * 16
    assert marks.count("l") == 1
    assert marks.index("l") == 777_777 // picture.blocks_per_cell


@pytest.mark.parametrize(
    ("columns", "cells"),
    [(0, 1), (1, 1), (2, 2), (3, 3), (5, 4), (7, 6), (16, 16), (31, 24), (75, 64), (118, 96)],
)
def test_rows_are_as_wide_as_fits_in_round_numbers(columns: int, cells: int) -> None:
    assert round_width(columns) == cells


def test_random_pools_are_drawn_block_by_block() -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    for _ in range(50):
        total, spans, blocks = _random_pool(chance)
        picture = draw(total, spans, columns=10_000, rows=1)
        assert "".join(cell.mark for cell in picture.cells) == "".join(blocks)
        coarse = draw(total, spans, columns=chance.randint(1, 20), rows=chance.randint(1, 3))
        _check_coarse(coarse, blocks)


def _random_pool(chance: random.Random) -> tuple[int, list[Span], list[str]]:
    blocks: list[str] = []
    spans: list[Span] = []
    for _ in range(chance.randint(1, 30)):
        count, state = chance.randint(1, 9), chance.choice(["free", *MARKS])
        if state != "free":
            spans.append(Span(len(blocks), count, state, chance.choice("ab")))
        blocks += [MARKS.get(state, ".")] * count
    return len(blocks), spans, blocks


def _check_coarse(picture: Picture, blocks: list[str]) -> None:
    size = picture.blocks_per_cell
    for number, cell in enumerate(picture.cells):
        group = blocks[number * size : (number + 1) * size]
        assert (cell.mark == ".") == (set(group) == {"."})
        assert cell.mark.isupper() == ("." not in group)
        assert cell.mark.upper() in group
