"""`examples/ray_nodes.py` on a real Ray, where it is installed (the extra `peers`)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.children import run_program

pytest.importorskip("ray", reason="Ray is not installed (the extra `peers`)")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "ray_nodes.py"


@pytest.mark.watchdog(400)
@pytest.mark.slow
def test_an_encoder_that_is_killed_is_started_again_by_ray_and_no_block_is_lost() -> None:
    ended = run_program([sys.executable, EXAMPLE, "--images", "4", "--tokens", "130"], timeout=300)
    assert "4 of 4 images of 130 tokens are the same on node 2" in ended.stdout
    assert "is killed with the blocks reserved" in ended.stdout
    assert "free blocks: [128, 128] of 128" in ended.stdout
