"""cache.py, started as a user starts it: encodes are saved, and every result is right."""

from __future__ import annotations

import re

import pytest

from tests.examples.terminal import Terminal

pytest.importorskip("PIL", reason="the extra `examples` is not installed")
pytest.importorskip("skimage", reason="the extra `examples` is not installed")


def started(name: str, *arguments: str) -> str:
    """What it printed, when it ended well."""
    with Terminal("cache.py", "--name", name, *arguments) as terminal:
        assert terminal.wait() == 0, terminal.text
    return terminal.text


def test_each_photograph_is_encoded_once(pool_name: str) -> None:
    text = started(pool_name, "--requests", "30")
    assert "30 requests for 8 photographs: 8 encodes" in text
    assert "22 encodes saved (73%)" in text
    assert "0 entries evicted" in text
    assert "30 of 30 results identical to the one-process run" in text
    assert "0 leases left, 0 violations" in text


def test_in_a_pool_too_small_for_all_results_are_right(pool_name: str) -> None:
    text = started(pool_name, "--requests", "30", "--pool-mib", "2")
    evicted = re.search(r"(\d+) entries evicted", text)
    assert evicted is not None
    assert int(evicted[1]) > 0
    assert "30 of 30 results identical to the one-process run" in text
    assert "0 leases left, 0 violations" in text
