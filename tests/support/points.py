"""At how many points of an operation this run of the suite kills.

A death before a line that only computes leaves what a death after it leaves. `scripts/test` kills
once for each state that a death can leave, so that it ends in minutes; with
`SHMBLOCKS_TEST_EVERY_LINE=1` (as in CI) at every line, and trusts no digest.
"""

from __future__ import annotations

import os

from tests.support.naming import worker_prefix

EVERY_LINE_VARIABLE = "SHMBLOCKS_TEST_EVERY_LINE"


def one_per_state() -> str | None:
    """`kill_at_every_line`'s argument for operations on segments of this worker."""
    every_line = os.environ.get(EVERY_LINE_VARIABLE, "0") not in ("", "0")
    return None if every_line else worker_prefix()
