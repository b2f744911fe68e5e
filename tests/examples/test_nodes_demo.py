"""`examples/nodes_demo.py`, as it is started by a person."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.support.children import run_program

DEMO = Path(__file__).resolve().parents[2] / "examples" / "nodes_demo.py"


def test_two_nodes_exchange_images_while_an_encoder_is_killed() -> None:
    ended = run_program([sys.executable, DEMO, "--images", "4", "--tokens", "130"])
    assert "4 of 4 images" in ended.stdout
    assert "its encoder killed" in ended.stdout
    assert ended.stderr == ""
