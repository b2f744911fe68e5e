"""How much memory a process has for itself alone."""

from __future__ import annotations

from pathlib import Path


def private_bytes() -> int:
    """Bytes of this process's pages that no other process has mapped, from the kernel's count."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
