"""The list of checks, in the order in which they are shown, and how they are run."""

from __future__ import annotations

from shmblocks.doctor import cuda, kernel, limits, logind, memory, sharing, software
from shmblocks.doctor.host import Host
from shmblocks.doctor.result import Check, CheckResult

# From what everything stands on to what stands on everything: the first failure is the cause.
CHECKS: tuple[Check, ...] = (
    kernel.platform_supported,
    software.python_version,
    software.packages,
    memory.shm_mount,
    memory.shm_size,
    memory.shm_reserve,
    memory.memory_limit,
    memory.memory_available,
    logind.remove_ipc,
    kernel.proc_mounted,
    kernel.ofd_locks,
    kernel.unnamed_files,
    kernel.populate_write,
    kernel.futex,
    limits.open_files,
    limits.locked_memory,
    limits.processors,
    cuda.torch_and_cuda,
    sharing.pool_shared,
    sharing.leftovers,
)


def run_checks(host: Host | None = None, checks: tuple[Check, ...] = CHECKS) -> list[CheckResult]:
    """Run all checks on this machine; takes seconds, since torch is imported in a child process.

    Never raises for what it finds, and leaves nothing behind. Safe to call before forking: CUDA is
    not started in the calling process.
    """
    asked = host if host is not None else Host()
    return [result for check in checks for result in check(asked)]
