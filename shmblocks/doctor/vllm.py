"""Does the connector fit the vLLM that is installed? Tried in a process of its own.

`connector_fits` is the check (`shmblocks doctor --vllm`); `main` runs in the child, since importing
vLLM takes long, imports torch, and may fail in many ways.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from shmblocks.doctor.child import report, run_module
from shmblocks.doctor.host import CheckResult, Host
from shmblocks.vllm import CONNECTOR, signatures

# Importing vLLM from a cold disk takes most of a minute.
# Smaller: slow machines fail. Larger: a hung import holds the doctor up longer.
PROBE_SECONDS = 180.0

GROUP = "vllm.general_plugins"
UPDATE = "update shmblocks, or use a vllm of a tested version: "


def connector_fits(host: Host) -> Iterator[CheckResult]:
    """Whether vLLM's hooks are those that the connector implements."""
    yield from run_module("vllm", "shmblocks.doctor.vllm", [], PROBE_SECONDS)


# ---- in the child ----------------------------------------------------------------------------


def probe() -> Iterator[CheckResult]:
    """The version, the plugin, the hooks."""
    tested = ", ".join(signatures.TESTED_VERSIONS)
    try:
        vllm = importlib.import_module("vllm")
        base = importlib.import_module("vllm.distributed.ec_transfer.ec_connector.base")
    except Exception as error:  # noqa: BLE001  its import runs much that may fail
        advice = f"pip install vllm (tested: {tested})"
        found = f"vllm's connectors cannot be imported: {type(error).__name__}: {error}"
        yield CheckResult("vllm", "fail", found, advice)
        return
    version = str(vllm.__version__)
    if version.split("+", maxsplit=1)[0] in signatures.TESTED_VERSIONS:
        yield CheckResult("vllm", "ok", f"vllm {version}, a tested version")
    else:
        yield CheckResult("vllm", "warn", f"vllm {version} was not tested; tested: {tested}")
    yield _hooks(base.ECConnectorBase, f"{UPDATE}{tested}")
    yield _plugin()


def _hooks(base: type, advice: str) -> CheckResult:
    found = signatures.differences(base)
    if found:
        return CheckResult("vllm-hooks", "fail", "; ".join(found), advice)
    return CheckResult("vllm-hooks", "ok", f"all {len(signatures.HOOKS)} hooks are as expected")


def _plugin() -> CheckResult:
    from importlib import metadata

    if any(found.name == "shmblocks" for found in metadata.entry_points(group=GROUP)):
        found = f"vllm finds {CONNECTOR} by its name (unless VLLM_PLUGINS leaves shmblocks out)"
        return CheckResult("vllm-plugin", "ok", found)
    return CheckResult(
        "vllm-plugin",
        "warn",
        f"the entry point {GROUP} of shmblocks is not installed",
        "pip install shmblocks again, or set ec_connector_module_path to shmblocks.vllm",
    )


def main(_: list[str]) -> None:
    """Print what is found."""
    report(probe())
