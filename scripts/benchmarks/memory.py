"""How much memory the processes of a candidate take: the sum of their PSS, at its peak.

PSS counts a page that n processes have mapped as 1/n in each, so that the sum over those that share
it counts it once. It includes Python, torch and the candidate's own buffers; the rows of the bare
wakes show what that is without any payload. Memory of daemons (Ray's) that no end has mapped is not
in it.
"""

from __future__ import annotations

from pathlib import Path


class PeakPss:
    """The largest sum seen, in bytes."""

    def __init__(self) -> None:
        self.peak = 0

    def look(self, pids: list[int]) -> None:
        self.peak = max(self.peak, sum(pss(pid) for pid in pids))


def pss(pid: int) -> int:
    """Proportional set size of one process in bytes; 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    for line in text.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0
