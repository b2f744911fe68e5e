"""Importing shmblocks anywhere but on a supported platform says so in one sentence."""

from __future__ import annotations

import sys

import pytest

from shmblocks._os.process import Interpreter, is_supported, require_supported
from shmblocks.errors import UnsupportedPlatformError
from tests.support.children import run_program

LINUX = Interpreter("linux", "x86_64", "little", 64, (3, 10))

PRETEND = """
import platform, sys
{pretence}
import shmblocks
"""


def test_this_interpreter_is_supported() -> None:
    require_supported(Interpreter.running())


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("python", [(3, 10), (3, 14), (4, 0)])
def test_linux_on_both_processors_is_supported(machine: str, python: tuple[int, int]) -> None:
    assert is_supported(LINUX._replace(machine=machine, python=python))


@pytest.mark.parametrize(
    "elsewhere",
    [
        LINUX._replace(system="darwin"),
        LINUX._replace(system="win32", machine="AMD64"),
        LINUX._replace(machine="ppc64le"),
        LINUX._replace(machine="aarch64_be"),
        LINUX._replace(byteorder="big"),
        LINUX._replace(pointer_bits=32),
        LINUX._replace(python=(3, 9)),
    ],
    ids=str,
)
def test_any_other_interpreter_is_refused_by_name(elsewhere: Interpreter) -> None:
    with pytest.raises(UnsupportedPlatformError) as refused:
        require_supported(elsewhere)
    assert str(elsewhere) in str(refused.value)
    assert "needs Linux on x86_64 or aarch64" in str(refused.value)


def test_a_refusal_is_an_import_error_too() -> None:
    with pytest.raises(ImportError):
        require_supported(LINUX._replace(system="darwin"))


@pytest.mark.parametrize(
    ("pretence", "told"),
    [
        ("sys.platform = 'darwin'", "this is darwin on"),
        ("platform.machine = lambda: 'riscv64'", "this is linux on riscv64"),
        ("sys.byteorder = 'big'", "big-endian"),
        ("sys.maxsize = 2**31 - 1", "32-bit"),
    ],
)
def test_importing_shmblocks_elsewhere_ends_with_one_sentence(pretence: str, told: str) -> None:
    program = PRETEND.format(pretence=pretence)
    ended = run_program([sys.executable, "-c", program], returncode=1)
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("shmblocks.errors.UnsupportedPlatformError: shmblocks needs Linux")
    assert told in last
