"""Limits of this process: descriptors, locked memory, processors."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator

from shmblocks.doctor.cgroup import cpu_quota
from shmblocks.doctor.host import Host
from shmblocks.doctor.result import CheckResult
from shmblocks.doctor.words import bytes_text, count_text

# A pool takes a few descriptors, a serving engine hundreds for its sockets.
# Smaller: engines run out unwarned. Larger: machines that serve well are warned.
COMFORTABLE_DESCRIPTORS = 1024


def open_files(host: Host) -> Iterator[CheckResult]:
    """Descriptors per process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = (
        f"up to {_limit_text(soft)} open files per process (can be raised to {_limit_text(hard)})"
    )
    if _reaches(soft, COMFORTABLE_DESCRIPTORS):
        yield CheckResult("open-files", "ok", found)
    else:
        yield CheckResult("open-files", "warn", found, f"ulimit -n {COMFORTABLE_DESCRIPTORS}")


def locked_memory(host: Host) -> Iterator[CheckResult]:
    """What may be locked: RDMA engines that register a pool are bound by it.

    CUDA is not (measured: an H100 with driver 580, an ordinary user with a limit of 64 KiB,
    `cudaHostRegister` of 2 MiB of shared memory succeeded), so a GPU is no reason to warn.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        yield CheckResult("locked-memory", "ok", "memory may be locked without limit")
        return
    found = f"up to {bytes_text(soft)} of memory may be locked per process"
    if os.geteuid() == 0:
        found = f"{found} (root may usually lock more)"
    if _has_rdma(host):
        advice = "ulimit -l unlimited (container: --ulimit memlock=-1)"
        found = f"{found}; registering a pool with the RDMA device here needs the pool's size"
        yield CheckResult("locked-memory", "warn", found, advice)
    else:
        yield CheckResult("locked-memory", "ok", f"{found}; no RDMA device here needs more")


def processors(host: Host) -> Iterator[CheckResult]:
    """Two sides of a handoff that share one processor must sleep to let the other run."""
    allowed, quota = len(os.sched_getaffinity(0)), cpu_quota(host)
    found = count_text(allowed, "processor")
    usable = float(allowed)
    if quota is not None and quota < allowed:
        found, usable = f"{found}, limited to the time of {quota:g}", quota
    if usable >= 2:
        yield CheckResult("processors", "ok", found)
    else:
        found = f"{found}: both sides of a handoff take turns"
        yield CheckResult("processors", "warn", found, "give the processes two processors or more")


def _has_rdma(host: Host) -> bool:
    folder = host.path("/sys/class/infiniband")
    return folder.is_dir() and any(folder.iterdir())


def _reaches(limit: int, wanted: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit >= wanted


def _limit_text(limit: int) -> str:
    return "any number" if limit == resource.RLIM_INFINITY else str(limit)
