"""Two nodes in one process, and the agents that they read with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shmblocks.nodes import nixl_agent
from tests.nodes import fake_agent
from tests.nodes.kit import Pair, assert_nothing_held, two_nodes
from tests.nodes.nixl_kit import Agents


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A served pool and a reader of it; both must be empty at the end of the test."""
    with two_nodes() as nodes:
        yield nodes
        assert_nothing_held(nodes.here)
        assert_nothing_held(nodes.there)
    # Pytest keeps what a fixture gave for a while; a closed pool that is kept keeps its mapping.
    vars(nodes).clear()


@pytest.fixture(params=["fake", "nixl"])
def agents(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Agents]:
    """Both kinds, one after the other."""
    yield from _agents(request.param == "fake", monkeypatch, tmp_path)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Agents]:
    """For what only a fake one does on demand."""
    yield from _agents(True, monkeypatch, tmp_path)


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Agents]:
    """For what a fake one would prove nothing about."""
    yield from _agents(False, monkeypatch, tmp_path)


def _agents(is_fake: bool, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Agents]:
    if is_fake:
        monkeypatch.setenv(fake_agent.FOLDER_VARIABLE, str(folder))
        monkeypatch.setattr(nixl_agent, "CLASS", fake_agent.CLASS)
        monkeypatch.setattr(nixl_agent, "is_installed", lambda: True)
    elif not nixl_agent.is_installed():
        pytest.skip("NIXL is not installed (pip install 'shmblocks[nixl]')")
    agents = Agents(is_fake, folder)
    yield agents
    agents.go_on()
