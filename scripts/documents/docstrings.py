"""Plain docstrings as Markdown, for the pages of the reference.

The docstrings are written for people who read the code: aligned tables, lists that follow a line
of text. Markdown would run both into one paragraph:

    name      what other processes attach by        `name`
    role      what inspectors show for this     ->  :   what other processes attach by
              process                               `role` ...

    Contract                                        Contract
    - first                                     ->  (a blank line)
                                                    - first

What it does not do: touch code (indented by four), or anything that is Markdown already.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

# A name or two (`handle`, `mode, req_id`), then at least two spaces, then what it is.
_ROW = re.compile(r"([A-Za-z_`][\w`/]*(?:, [\w`/]+)*) {2,}(\S.*)")


def _is_table(lines: list[str]) -> bool:
    return bool(lines) and _ROW.fullmatch(lines[0]) is not None


def _definitions(lines: list[str]) -> list[str]:
    found: list[str] = []
    for line in lines:
        row = _ROW.fullmatch(line)
        if row is not None:
            name = row[1].strip("`")
            found += ["", f"`{name}`", "", f":   {row[2]}"]
        else:
            found.append(f"    {line.strip()}")
    return found


def _with_lists_apart(lines: list[str]) -> list[str]:
    found: list[str] = []
    in_list = False
    for line in lines:
        starts = re.match(r"(- |\d+\. )", line) is not None
        if starts and not in_list:
            found.append("")
        in_list = starts or (in_list and line.startswith(" "))
        found.append(line)
    return found


def markdown_of(text: str) -> str:
    """The docstring as Markdown that reads the same."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.split("\n")
        if lines[0].startswith("    "):
            paragraphs.append(paragraph)
        elif _is_table(lines):
            paragraphs.append("\n".join(_definitions(lines)))
        else:
            paragraphs.append("\n".join(_with_lists_apart(lines)))
    return "\n\n".join(paragraphs)


class PlainDocstrings(griffe.Extension):
    """Rewrites every docstring once, as it is collected."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:  # noqa: ANN401 - griffe's hook
        if obj.docstring is not None:
            obj.docstring.value = markdown_of(obj.docstring.value)
