"""How much memory a process has for itself alone."""

from __future__ import annotations

from pathlib import Path

import torch


def own_bytes(device: str) -> int:
    """Bytes that are this process's alone, where its model lies.

    cpu     pages that no other process has mapped, from the kernel's count
    cuda:N  tensors that torch has allocated; a pool's memory is not among them
    """
    if device != "cpu":
        return int(torch.cuda.memory_allocated(device))
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
