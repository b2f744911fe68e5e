"""`examples/launch_nodes.py --small`, as `scripts/demo --nodes` starts it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from _two_nodes import why_not
from tests.support.children import run_program

pytest.importorskip("PIL", reason="the extra `examples` is not installed")
pytest.importorskip("skimage", reason="the extra `examples` is not installed")

LAUNCHER = Path(__file__).resolve().parents[2] / "examples" / "launch_nodes.py"


@pytest.mark.watchdog(300)
@pytest.mark.parametrize("where", ["namespaces", "one namespace"])
def test_photographs_of_one_node_give_the_same_tokens_on_another(where: str) -> None:
    more = ["--one-namespace"] if where == "one namespace" else []
    if where == "namespaces" and (reason := why_not()):
        pytest.skip(reason)
    ended = run_program([sys.executable, LAUNCHER, "--small", "--images", "3", *more], timeout=240)
    assert "3 of 3 images gave the tokens of the one-process run" in ended.stdout
    assert "published, and its encoder is killed" in ended.stdout
    assert "its encoder is killed while it encodes" in ended.stdout
    assert "free blocks: 64 of 64 on node 1, 64 of 64 on node 2" in ended.stdout
    assert ("two nodes in namespaces" in ended.stdout) == (where == "namespaces")
