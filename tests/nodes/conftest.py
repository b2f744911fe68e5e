"""Two nodes in one process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.nodes.kit import Pair, assert_nothing_held, two_nodes


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A served pool and a reader of it; both must be empty at the end of the test."""
    with two_nodes() as nodes:
        yield nodes
        assert_nothing_held(nodes.here)
        assert_nothing_held(nodes.there)
    # Pytest keeps what a fixture gave for a while; a closed pool that is kept keeps its mapping.
    vars(nodes).clear()
