"""The tests of the compiled core need it: built here where there is a compiler."""

from __future__ import annotations

import shutil

import pytest

from shmblocks import _core


@pytest.fixture(autouse=True)
def _needs_the_core(request: pytest.FixtureRequest) -> None:
    if not _core.is_used() and "without_core" not in request.keywords:
        pytest.skip(f"no compiled core: {_core.why_not}")


@pytest.fixture
def compiler() -> str:
    """Where the C compiler is."""
    found = shutil.which("gcc") or shutil.which("cc")
    if found is None:
        pytest.skip("no C compiler on this machine")
    return found
