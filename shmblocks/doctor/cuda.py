"""Torch and CUDA, looked at in a process of their own (`cuda_probe`)."""

from __future__ import annotations

from collections.abc import Iterator

from shmblocks.doctor.child import run_module
from shmblocks.doctor.host import Host
from shmblocks.doctor.result import CheckResult

# Importing torch from a cold disk and starting CUDA takes many seconds.
# Smaller: slow machines fail. Larger: a hung driver holds the doctor up longer.
PROBE_SECONDS = 120.0


def torch_and_cuda(host: Host) -> Iterator[CheckResult]:
    """A missing torch, a missing GPU and a driver that crashes are findings."""
    yield from run_module("cuda", "shmblocks.doctor.cuda_probe", [], PROBE_SECONDS)
