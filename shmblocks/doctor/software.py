"""The versions of Python and of the packages that the library stands on. Imports none of them."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator

from shmblocks import _core
from shmblocks.doctor.host import CheckResult, Host

NEEDED = ("torch", "posix-ipc", "msgspec")


def python_version(host: Host) -> Iterator[CheckResult]:
    """Which Python this is; the check `platform` says whether it will do."""
    found = f"{platform.python_implementation()} {platform.python_version()} ({sys.executable})"
    yield CheckResult("python", "ok", found)


def packages(host: Host) -> Iterator[CheckResult]:
    """Installed or not; whether torch really loads is tried by the check `torch`."""
    for package in NEEDED:
        version = _version(package)
        if version is None:
            advice = f"pip install {package}"
            yield CheckResult(f"package-{package}", "fail", "not installed", advice)
        else:
            yield CheckResult(f"package-{package}", "ok", f"{package} {version}")


def compiled_core(host: Host) -> Iterator[CheckResult]:
    """Whether pools of this Python use the compiled core; without it they are slower."""
    if _core.is_used():
        yield CheckResult("core", "ok", "the compiled core is used")
    elif _core.SETTING == "0":
        yield CheckResult("core", "warn", _core.why_not, "unset SHMBLOCKS_CORE to use it")
    else:
        advice = "install a C compiler and Python's headers, then shmblocks again"
        yield CheckResult("core", "warn", f"no compiled core: {_core.why_not}", advice)


def _version(package: str) -> str | None:
    from importlib import metadata  # slow to import, and this module is imported by every command

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
