"""How the compiled core is built, and what happens where it is not."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from compiling import build, header
from shmblocks import _core
from tests.support.children import run_program

# Lines of C; more: it has taken over what is Python's.
MOST_LINES = 1900

USE = """
import os
from shmblocks import BlockPool, PoolConfig, _core
with BlockPool.create(os.environ["POOL"], PoolConfig(total_tokens=256), prefault="off") as pool:
    with pool.reserve(3) as reservation:
        handle = reservation.publish()
    pool.open(handle).release()
    (me,) = pool.participants()
    print(_core.is_used(), me.has_core, pool.stats().free_blocks, pool.check())
"""


def use(pool_name: str, **environment: str) -> str:
    """What a program that uses a pool prints."""
    with_name = environment | {"POOL": pool_name}
    return run_program([sys.executable, "-c", USE], environment=with_name).stdout.strip()


def test_the_offsets_are_those_of_the_layout() -> None:
    assert header.HEADER.read_text() == header.text(), "run scripts/compiling/header.py"


def test_it_compiles_without_a_warning(compiler: str, tmp_path: Path) -> None:
    sources = [path for path in build.sources() if path.suffix == ".c"]
    assert len(sources) >= 5
    for flags in ((), ("-DSHMBLOCKS_FAULTS",)):
        command = [compiler, *build.FLAGS, *build.WARNINGS, *flags]
        command += [f"-I{sysconfig.get_path('include')}", *map(str, sources)]
        subprocess.run([*command, "-o", str(tmp_path / "made.so")], check=True)


def test_a_free_threaded_python_refuses_it(compiler: str, tmp_path: Path) -> None:
    command = [compiler, "-fsyntax-only", "-DPy_GIL_DISABLED=1"]
    command += [f"-I{sysconfig.get_path('include')}", str(build.CORE / "journal.c")]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "free-threaded builds use the Python" in refused.stderr


def test_it_stays_small_enough_to_be_read() -> None:
    lines = sum(len(path.read_text().splitlines()) for path in build.CORE.glob("*.c"))
    assert lines < MOST_LINES


def test_it_has_no_error_text() -> None:
    """Errors are Python's: an operation that finds something wrong has stored nothing."""
    for path in build.sources():
        assert "PyErr_Format" not in path.read_text(), path
        assert "PyErr_SetString" not in path.read_text(), path


def test_switched_off_the_python_does_it(pool_name: str) -> None:
    assert use(pool_name, SHMBLOCKS_CORE="0") == "False False 2 []"


def test_switched_on_a_participant_says_so(pool_name: str) -> None:
    assert use(pool_name, SHMBLOCKS_CORE="1") == "True True 2 []"


def test_a_core_of_another_layout_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "_loaded", _core._loaded)
    monkeypatch.setattr(_core, "why_not", "")
    _core.use(99)
    assert not _core.is_used()
    assert _core.why_not.startswith("built for layout")
    assert _core.pool_core(None, {}, None, ()) is None


def test_a_class_whose_slots_it_cannot_reach_switches_it_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Slotless:
        """No `__slots__`."""

    monkeypatch.setattr(_core, "_loaded", _core._loaded)
    monkeypatch.setattr(_core, "why_not", "")
    _core.know("guard", Slotless)
    assert not _core.is_used()
    assert "Slotless" in _core.why_not
