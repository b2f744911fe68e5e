"""Plain text, colours, JSON help and what stands between foreign bytes and a terminal."""

from __future__ import annotations

import importlib.util
import io
import re
from importlib.machinery import ModuleSpec

import msgspec
import pytest

from shmblocks.cli import output, plain
from shmblocks.cli.document import Column, Document, Facts, Lines, Table, Text, harmless, line
from shmblocks.cli.jsonhelp import keys_text
from shmblocks.cli.reports import Blocks, LsReport, StatReport
from shmblocks.cli.words import account, age_text, share_text
from shmblocks.doctor.words import bytes_text, count_text

DOCUMENT: Document = (
    Facts(
        Text("/pool", "title"), (("size", line("2 MiB")), ("state", line(Text("alive", "good"))))
    ),
    Table(
        Text("people", "title"),
        (Column("name"), Column("pid", right=True)),
        ((Text("embedding"), Text("7")), (Text("lm", "bad"), Text("4242"))),
        "none",
    ),
    Table(Text("leases"), (Column("name"),), (), "none"),
    Lines((line("RR", Text("..", "free")),)),
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


def without_rich(name: str, package: str | None = None) -> ModuleSpec | None:
    return None


def test_plain_text_is_aligned_and_has_no_escapes() -> None:
    assert plain.render(DOCUMENT) == PLAIN


def test_a_pipe_gets_plain_text_even_where_rich_is_installed() -> None:
    file = io.StringIO()
    output.write_document(DOCUMENT, file)
    assert file.getvalue() == PLAIN


def test_a_terminal_gets_colours_and_the_same_facts(terminal: Terminal) -> None:
    pytest.importorskip("rich")
    output.write_document(DOCUMENT, terminal)
    shown = terminal.getvalue()
    assert ESCAPE.search(shown)
    words = ESCAPE.sub("", shown).split()
    assert [word for word in words if word.strip("─━")] == PLAIN.split()


def test_no_color_leaves_out_every_colour(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("NO_COLOR", "1")
    output.write_document(DOCUMENT, terminal)
    numbers = {
        int(number)
        for escape in ESCAPE.findall(terminal.getvalue())
        for number in escape[2:-1].split(";")
        if number
    }
    assert not {number for number in numbers if number >= 30}, "30 and above are colours"


def test_a_terminal_without_rich_gets_plain_text(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", without_rich)
    output.write_document(DOCUMENT, terminal)
    assert terminal.getvalue() == PLAIN


def test_markup_in_foreign_text_is_shown_and_not_obeyed(terminal: Terminal) -> None:
    pytest.importorskip("rich")
    output.write_document((Lines((line("[red]role[/red] :smile:"),)),), terminal)
    assert ESCAPE.sub("", terminal.getvalue()) == "[red]role[/red] :smile:\n"


def test_escape_sequences_in_foreign_text_reach_no_terminal(terminal: Terminal) -> None:
    evil = "req\x1b]0;owned\x07\n\u202e\u009b"
    for file in (terminal, io.StringIO()):
        output.write_document((Lines((line(evil),)),), file)
        shown = ESCAPE.sub("", file.getvalue()).rstrip("\n")
        assert shown == r"req\x1b]0;owned\x07\n\u202e\x9b"
    assert harmless("Grüße, 模型") == "Grüße, 模型"


def test_an_error_is_one_line_whatever_its_text() -> None:
    file = io.StringIO()
    output.write_error("two\nlines\x1b[2J", file)
    assert file.getvalue() == "shmblocks: two lines\\x1b[2J\n"


def test_letters_that_the_encoding_lacks_are_escaped() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    output.write_text("Grüße\n", file)
    file.flush()
    assert raw.getvalue() == b"Gr\\xfc\\xdfe\n"


def test_every_json_key_is_in_the_help() -> None:
    text = keys_text(StatReport)
    for struct in (StatReport, Blocks):
        for field in msgspec.structs.fields(struct):
            assert re.search(rf"^ +{field.encode_name}(\[\])?\b", text, re.MULTILINE), field.name
    assert "  pools[]" in keys_text(LsReport)
    assert "free_blocks" in keys_text(LsReport)


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


def test_an_account_that_does_not_add_up_shows_it() -> None:
    right = Blocks(free=3, reserved=1, published=0, leased=0, draining=0, all=4, balanced=True)
    wrong = msgspec.structs.replace(right, free=2, balanced=False)
    assert "".join(part.text for part in account(right)) == (
        "3 free + 1 reserved + 0 published + 0 leased + 0 draining = 4 blocks"
    )
    assert " != 4 blocks" in "".join(part.text for part in account(wrong))
