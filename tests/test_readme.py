"""The README is short, has its parts in order, and its map of the code is the table of layers.

(That its examples run and pass mypy is in `test_docs.py`, with those of the other pages.)
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import shmblocks
from tests.test_project import LAYERS

README = Path(__file__).parent.parent / "README.md"

# Longer: the part that grew belongs to docs/.
MOST_LINES = 180


def test_the_readme_has_its_parts_in_order() -> None:
    headings = re.findall(r"^## (.*)$", README.read_text(), re.MULTILINE)
    assert headings == [
        "Two commands",
        "An example",
        "When to use it, and when not",
        "Words",
        "Documents",
        "Numbers",
        "Layout of the code",
    ]


def test_the_readme_stays_short() -> None:
    assert len(README.read_text().splitlines()) <= MOST_LINES


def readme_map() -> str:
    text = README.read_text()
    return text[text.index("## Layout of the code") :].split("```")[1].strip("\n")


def docstring_map() -> str:
    """The indented lines of the package's docstring."""
    lines = (shmblocks.__doc__ or "").splitlines()
    return "\n".join(line.removeprefix("    ") for line in lines if line.startswith("    "))


def parts_by_line(text: str) -> list[list[str]]:
    """The names at the front of each line: up to the first two spaces that no name follows."""
    known = {part for layer in LAYERS for part in layer}
    rows = []
    for line in text.splitlines():
        row = []
        for word in line.split():
            if word.rstrip("/") not in known:
                break
            row.append(word.rstrip("/"))
        assert row, f"expected the names of parts at the front, got {line!r}"
        rows.append(row)
    return rows


@pytest.mark.parametrize("text", [readme_map, docstring_map], ids=lambda each: each.__name__)
def test_a_map_of_the_code_is_the_table_of_layers(text: object) -> None:
    assert callable(text)
    rows = parts_by_line(text())
    layer_of = {part: number for number, layer in enumerate(LAYERS) for part in layer}
    numbers = [{layer_of[part] for part in row} for row in rows]
    assert all(len(number) == 1 for number in numbers), "a line names parts of one layer only"
    flat = [number for row in numbers for number in row]
    assert flat == sorted(flat), "from the bottom to the top"
    named = [part for row in rows for part in row]
    assert sorted(named) == sorted(set(layer_of) - {"__init__"}), "each part, once"
