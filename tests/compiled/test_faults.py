"""A process dies at any store of the compiled core; a survivor finds everything in order."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from compiling import build
from tests.compiled import faults
from tests.crash.fresh import run_with_faults
from tests.crash.plugin import SUMMARY

pytestmark = pytest.mark.watchdog(600)

# Operations of the suites that the core has. The others run no store of its own.
POOL = ("alloc", "publish_", "open_", "release", "release_the_last", "free", "view")
CASES = [(suite, name) for suite in faults.SUITES for name in faults.cases(suite)]
# Fewer points over all cases: the core was not used, or does not say where it stores.
FEWEST = 10


@pytest.fixture(scope="module", autouse=True)
def _built(tmp_path_factory: pytest.TempPathFactory) -> None:
    if not build.is_fresh("_faults"):
        build.build("_faults", "-DSHMBLOCKS_FAULTS")


@pytest.mark.parametrize("by_python", [False, True], ids=["core survives", "python survives"])
@pytest.mark.parametrize(("suite", "name"), CASES)
def test_killed_at_any_store_it_has_happened_or_not(
    suite: str, name: str, by_python: bool, record_property: Callable[[str, object], None]
) -> None:
    coverage = run_with_faults(faults.kill, suite, name, by_python)
    survivor = "python" if by_python else "core"
    record_property(
        SUMMARY, f"core, {suite}: {name}: killed at {len(coverage.points)} stores ({survivor})"
    )
