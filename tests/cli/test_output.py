"""Plain text, colours, JSON help and what stands between foreign bytes and a terminal."""

from __future__ import annotations

import io
import re
import sys

import msgspec
import pytest

from shmblocks import PoolInspector
from shmblocks._state.info import PoolSnapshot, PoolStats
from shmblocks._words import bytes_text, count_text
from shmblocks.cli.commands import ListReport
from shmblocks.cli.jsonhelp import keys_text
from shmblocks.cli.main import main, write_error
from shmblocks.cli.render import (
    Document,
    Text,
    account,
    age_text,
    facts,
    harmless,
    joined,
    line,
    share_text,
    table,
    write_document,
    write_text,
)
from shmblocks.cli.stat import PoolReport
from tests.cli.conftest import Scene

DOCUMENT: Document = joined(
    facts("/pool", [("size", line("2 MiB")), ("state", line(Text("alive", "ok")))]),
    table(
        "people",
        "name | >pid",
        [(Text("embedding"), Text("7")), (Text("lm", "fail"), Text("4242"))],
        "none",
    ),
    table("leases", "name", [], "none"),
    [line("RR", Text("..", "free"))],
)

PLAIN = """\
/pool
  size   2 MiB
  state  alive

people
  name        pid
  embedding     7
  lm         4242

leases
  none

RR..
"""

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def shown_in(file: io.StringIO) -> str:
    write_document(DOCUMENT, file)
    return file.getvalue()


def test_a_file_gets_aligned_text_without_escapes() -> None:
    assert shown_in(io.StringIO()) == PLAIN


def test_a_terminal_gets_colours_and_the_same_text(terminal: Terminal) -> None:
    shown = shown_in(terminal)
    assert "\x1b[1;31mlm\x1b[0m" in shown
    assert ESCAPE.sub("", shown) == PLAIN


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_that_wants_no_colours_gets_plain_text(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert shown_in(terminal) == PLAIN


def test_an_empty_no_color_is_as_good_as_none(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "")
    assert ESCAPE.search(shown_in(terminal))


def test_characters_of_two_columns_are_aligned_too() -> None:
    rows = [line("模型", "1"), line("lm", "22")]
    file = io.StringIO()
    write_document(table("", "role | >pid", rows, "none"), file)
    assert file.getvalue() == "  role  pid\n  模型    1\n  lm     22\n"


@pytest.mark.parametrize("command", ["ls", "stat", "map"])
def test_a_terminal_that_knows_only_ascii_is_no_error(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Found: `stat` and `map` ended with a UnicodeEncodeError there."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    monkeypatch.setattr(file, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", file)
    scene.pool.alloc(4, "模型")
    assert main([command] if command == "ls" else [command, scene.name]) == 0
    file.flush()
    assert scene.name in raw.getvalue().decode("ascii")
    assert (r"\u6a21\u578b" in raw.getvalue().decode()) == (command == "stat")


def test_escape_sequences_in_foreign_text_reach_no_terminal(terminal: Terminal) -> None:
    evil = "req\x1b]0;owned\x07\n\u202e\u009b"
    for file in (terminal, io.StringIO()):
        write_document([line(evil), *table(evil, evil, [line(evil)], evil)], file)
        shown = ESCAPE.sub("", file.getvalue())
        assert {text.strip() for text in shown.splitlines()} == {r"req\x1b]0;owned\x07\n\u202e\x9b"}
    assert harmless("Grüße, 模型") == "Grüße, 模型"


def test_an_error_is_one_line_whatever_its_text() -> None:
    file = io.StringIO()
    write_error("two\nlines\x1b[2J", file)
    assert file.getvalue() == "shmblocks: two lines\\x1b[2J\n"


def test_letters_that_the_encoding_lacks_are_escaped() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    write_text("Grüße\n", file)
    file.flush()
    assert raw.getvalue() == b"Gr\\xfc\\xdfe\n"


def test_every_json_key_is_in_the_help() -> None:
    text = keys_text((PoolReport,))
    for struct in (PoolReport, PoolStats, PoolSnapshot):
        for field in msgspec.structs.fields(struct):
            assert re.search(rf"^ +{field.encode_name} ", text, re.MULTILINE), field.name
    assert re.search(r"^ +owner +ParticipantInfo or null$", text, re.MULTILINE)
    assert re.search(r"^ +owner_id +\[slot, incarnation\]$", text, re.MULTILINE)
    assert text.count("  ParticipantInfo\n") == 1, "each struct is explained once"
    assert re.search(r"^ +pools +list of PoolSummary$", keys_text((ListReport,)), re.MULTILINE)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (1 << 20, "1 MiB"),
        ((1 << 30) - 1, "1023 MiB"),
        (11 << 29, "5.5 GiB"),
        (3 << 50, "3072 TiB"),
    ],
)
def test_sizes_are_cut_and_never_rounded_up(size: int, text: str) -> None:
    assert bytes_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.44, "0.4 s"),
        (12.9, "12 s"),
        (65, "1 min 5 s"),
        (3600, "1 h 0 min"),
        (97_000, "1 d 2 h"),
    ],
)
def test_ages_have_two_units_at_most(seconds: float, text: str) -> None:
    assert age_text(seconds) == text


def test_use_is_full_or_empty_only_when_it_is() -> None:
    shown = [share_text(part, 1000) for part in (0, 1, 500, 999, 1000)]
    assert shown == ["0%", "<1%", "50%", ">99%", "100%"]
    assert share_text(0, 0) == "-"


def test_counts_agree_with_their_noun() -> None:
    assert count_text(1, "block") == "1 block"
    assert count_text(2, "block") == "2 blocks"
    assert count_text(0, "lease of the dead", "leases of the dead") == "0 leases of the dead"


def test_an_account_that_does_not_add_up_shows_it(scene: Scene) -> None:
    with PoolInspector(scene.name) as pool:
        right = pool.stats()
    wrong = msgspec.structs.replace(right, free_blocks=14)
    assert "".join(part.text for part in account(right)) == (
        "15 free + 6 reserved + 2 published + 8 leased + 1 draining + 0 settling = 32 blocks"
    )
    assert " != 32 blocks" in "".join(part.text for part in account(wrong))
