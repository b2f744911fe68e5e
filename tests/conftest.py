"""Everything is in `tests.support.plugin`, where the tests of the tests can load it too."""

from __future__ import annotations

pytest_plugins = ("tests.support.plugin", "tests.crash.plugin", "tests.stress.plugin")
