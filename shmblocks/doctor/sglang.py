"""What the plug-in for SGLang needs: that SGLang finds it, and that its pool can be had.

With the environment that SGLang's servers will get. Imports nothing of SGLang.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib import metadata

from shmblocks._os.limits import refusal_of
from shmblocks._state.layout import Layout
from shmblocks._words import bytes_text
from shmblocks.doctor.host import Check, CheckResult, Host
from shmblocks.errors import PoolNotFoundError, ShmBlocksError
from shmblocks.inspector import PoolInspector
from shmblocks.sglang_plugin.hooks import TESTED
from shmblocks.sglang_plugin.settings import POOL, Settings, read_settings

GROUP = "sglang.srt.plugins"
NAME = "shmblocks"
# Embeddings of so many bytes are what the largest images make. Smaller: nothing is said of a pool
# that holds one of them. Larger: pools that serve small images well are warned.
LARGE_EMBEDDING = 256 << 20


def sglang_version(host: Host) -> Iterator[CheckResult]:
    """Installed beside shmblocks, and tested with it."""
    try:
        version = metadata.version("sglang")
    except metadata.PackageNotFoundError:
        yield CheckResult(
            "sglang-version",
            "fail",
            "sglang is not installed in this environment",
            "run this with the Python that runs SGLang",
        )
        return
    if version in TESTED:
        yield CheckResult("sglang-version", "ok", f"sglang {version}, which was tested")
    else:
        yield CheckResult(
            "sglang-version",
            "warn",
            f"sglang {version} was not tested ({', '.join(TESTED)} was)",
            "look for a warning of shmblocks in the servers' logs: it says if something is missing",
        )


def sglang_entry_point(host: Host) -> Iterator[CheckResult]:
    """Whether SGLang will find the plug-in, and not leave it out."""
    found = [each for each in metadata.entry_points(group=GROUP) if each.name == NAME]
    if not found:
        yield CheckResult(
            "sglang-entry-point",
            "fail",
            f"no entry point {NAME!r} in the group {GROUP}",
            "install shmblocks with pip into this environment (a source tree on PYTHONPATH has "
            "no entry points)",
        )
        return
    allowed = os.environ.get("SGLANG_PLUGINS", "")
    if allowed and NAME not in [each.strip() for each in allowed.split(",")]:
        yield CheckResult(
            "sglang-entry-point",
            "fail",
            f"SGLANG_PLUGINS is {allowed!r}, so that SGLang leaves the plug-in out",
            f"add {NAME} to it, or unset it",
        )
        return
    yield CheckResult("sglang-entry-point", "ok", f"SGLang will load {found[0].value}")


def sglang_settings(host: Host) -> Iterator[CheckResult]:
    """Whether the variables can be understood, and the pool be had."""
    try:
        settings = read_settings(_environment())
    except ValueError as error:
        yield CheckResult("sglang-settings", "fail", str(error), "correct it for every server")
        return
    if settings is None:
        yield CheckResult(
            "sglang-settings",
            "fail",
            f"{POOL} is not set: the plug-in does nothing",
            f"export {POOL}=NAME for every server, and run this with the same environment",
        )
        return
    yield CheckResult("sglang-settings", "ok", f"pool {settings.pool}")
    yield _pool(host, settings)
    if settings.pool_bytes < 4 * LARGE_EMBEDDING:
        yield CheckResult(
            "sglang-pool-size",
            "warn",
            f"{bytes_text(settings.pool_bytes)} hold fewer than 4 embeddings of "
            f"{bytes_text(LARGE_EMBEDDING)}",
            "what does not fit goes as bytes; for large images raise SHMBLOCKS_SGLANG_POOL_MB",
        )
    else:
        yield CheckResult("sglang-pool-size", "ok", bytes_text(settings.pool_bytes))


def _environment() -> Mapping[str, str]:
    return os.environ


def _pool(host: Host, settings: Settings) -> CheckResult:
    size = 0
    try:
        size = Layout(settings.config()).segment_bytes
        with PoolInspector(settings.pool) as pool:
            difference = pool.config.difference_to(settings.config())
            is_alive = pool.is_alive
    except PoolNotFoundError:
        difference, is_alive = "", False
    except (ShmBlocksError, ValueError) as error:
        advice = "correct the name (SHMBLOCKS_SGLANG_POOL) or the size (SHMBLOCKS_SGLANG_POOL_MB)"
        return CheckResult("sglang-pool", "fail", str(error), advice)
    if is_alive and difference:
        return CheckResult(
            "sglang-pool",
            "fail",
            f"pool {settings.pool} is in use with another config: {difference}",
            "give every server the same variables, or this deployment another name",
        )
    if is_alive:
        return CheckResult("sglang-pool", "ok", f"pool {settings.pool} is in use, and fits")
    refusal = refusal_of(size, host.shm, host.root)
    if refusal is not None:
        return CheckResult("sglang-pool", "fail", refusal.found, refusal.advice)
    return CheckResult(
        "sglang-pool", "ok", f"pool {settings.pool} of {bytes_text(size)} can be created"
    )


SGLANG_CHECKS: tuple[Check, ...] = (sglang_version, sglang_entry_point, sglang_settings)
