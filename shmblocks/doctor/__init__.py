"""Says before the start what will fail: `run_checks()` gives one `CheckResult` per fact."""

from __future__ import annotations

from shmblocks.doctor.checks import CHECKS, run_checks
from shmblocks.doctor.host import Host
from shmblocks.doctor.result import Check, CheckResult, Status

__all__ = ["CHECKS", "Check", "CheckResult", "Host", "Status", "run_checks"]
