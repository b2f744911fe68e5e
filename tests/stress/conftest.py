"""Brings the plugin in, where it is not there yet."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stress import plugin

HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.is_registered(plugin):
        config.pluginmanager.register(plugin)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put storms where each worker begins, so that they meet.

    `--dist worksteal` gives each worker its share in one piece. Where it is shared out otherwise,
    storms run at other times and meet fewer others; nothing depends on it.
    """
    workers = getattr(config, "workerinput", {}).get("workercount", 0)
    storms = [item for item in items if "storm" in item.nodeid and item.path.parent == HERE]
    for number, storm in enumerate(storms if workers else ()):
        items.remove(storm)
        items.insert(number % workers * len(items) // workers + number // workers, storm)


@pytest.fixture(scope="session")
def arena(request: pytest.FixtureRequest) -> plugin.Arena:
    """The pool that all workers of the run share, and the box for handles."""
    return plugin.arena_of(request.config)
