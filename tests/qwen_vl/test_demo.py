"""The demo with both models, started as a user starts it: every way, every row."""

from __future__ import annotations

import re

import pytest

from tests.examples.terminal import Terminal

pytest.importorskip("transformers", reason="the extra `qwen` is not installed")
pytest.importorskip("skimage", reason="the extra `qwen` is not installed")

ROW = re.compile(
    r"^(?P<prompt>\S.*?) +(?P<way>landing|push|fan-out) +(?P<tokens>\d+) +(?P<blocks>\d+)"
    r" +(?P<rounds>\d+) +(?P<place>yes|no) +[\d.]+ +\d+ +[\d.]+"
    r"  (?P<crossed>same  |DIFFER)   (?P<same>same  |DIFFER)"
    r"  (?P<prefill>same  |DIFFER)   (?P<logits>same  |DIFFER)"
    r"  .*x(?P<answers>\d)$"
)


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl"])
def test_split_in_three_processes_every_token_is_that_of_the_unsplit_model(family: str) -> None:
    with Terminal("qwen_vl/demo.py", "--size", "tiny", "--family", family) as terminal:
        assert terminal.wait() == 0, terminal.text
    rows = [match.groupdict() for line in terminal.lines if (match := ROW.match(line))]
    assert len(rows) == 7 * 3
    assert {row["prompt"] for row in rows} >= {"three images", "large", "video"}
    for row in rows:
        assert row["crossed"] == row["same"] == row["prefill"] == row["logits"] == "same  ", row
        assert row["answers"] == ("2" if row["way"] == "fan-out" else "1")
        resumes = row["way"] == "landing" and int(row["tokens"]) > 64
        assert int(row["rounds"]) == (2 if resumes else 1), row
        assert row["place"] == "yes" or resumes
    assert any(row["rounds"] == "2" for row in rows)
    assert "on both sides: model.language_model.embed_tokens.weight" in terminal.text
    assert "64 of 64 blocks free, 0 violations" in terminal.text
    assert terminal.lines[-1] == "segments left: 0"
