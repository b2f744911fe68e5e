"""Says before the start what will fail: `run_checks()` gives one `CheckResult` per fact.

host        the machine that is checked, and what a check's result is
software    Python and packages         memory    /dev/shm and the container's limits
kernel      features and limits         logind    will it delete segments at logout?
cuda        what pools on a GPU need    sharing   a real pool between two processes
sglang      what the plug-in needs; asked for alone
child       runs a check in a process of its own
vllm        does the connector fit the vLLM that is installed? (asked for with `--vllm`)
"""

from __future__ import annotations

from shmblocks.doctor import cuda, kernel, logind, memory, sglang, sharing, software, vllm
from shmblocks.doctor.host import Check, CheckResult, Host, Status

__all__ = [
    "CHECKS",
    "SGLANG_CHECKS",
    "VLLM_CHECKS",
    "Check",
    "CheckResult",
    "Host",
    "Status",
    "run_checks",
]

# For those who run the plug-in (`shmblocks.sglang_plugin`).
SGLANG_CHECKS = sglang.SGLANG_CHECKS

# From what everything stands on to what stands on everything: the first failure is the cause.
CHECKS: tuple[Check, ...] = (
    kernel.platform_supported,
    software.python_version,
    software.packages,
    software.compiled_core,
    memory.shm_mount,
    memory.shm_size,
    memory.pool_size,
    memory.shm_reserve,
    memory.memory_limit,
    memory.memory_available,
    logind.remove_ipc,
    kernel.proc_mounted,
    kernel.ofd_locks,
    kernel.unnamed_files,
    kernel.populate_write,
    kernel.futex,
    kernel.open_files,
    kernel.locked_memory,
    kernel.processors,
    cuda.torch_and_cuda,
    sharing.pool_shared,
    sharing.leftovers,
)

# For those who run the connector (`shmblocks.vllm`).
VLLM_CHECKS: tuple[Check, ...] = (vllm.connector_fits,)


def run_checks(
    host: Host | None = None, checks: tuple[Check, ...] = CHECKS, *, pool_bytes: int = 0
) -> list[CheckResult]:
    """Run all checks on this machine; takes seconds, since a child process imports torch.

    `pool_bytes`: size of the pool that is planned, in bytes; then one more check says whether it
    can be created. Never raises for what it finds, and leaves nothing behind. Safe to call before
    forking: CUDA is not started in the calling process.
    """
    asked = host if host is not None else Host(pool_bytes=pool_bytes)
    return [result for check in checks for result in check(asked)]
