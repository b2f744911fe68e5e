"""Deaths on purpose: for the tests of this library, and for those of adapters that build on it.

`kill_at_every_line` and `interrupt_at_every_line` (everyline.py) run an operation once per line
that it has; `assert_survives` (survival.py) says what must be true afterwards; deaths.py has the
single blows. Nothing here is needed to use a pool, and `import shmblocks` does not import it.
"""

from __future__ import annotations

from shmblocks.testing.deaths import (
    Ending,
    abandon,
    cont,
    die,
    run_and_kill,
    run_forked,
    stop,
)
from shmblocks.testing.everyline import Coverage, interrupt_at_every_line, kill_at_every_line
from shmblocks.testing.points import Point, Scope, Step
from shmblocks.testing.survival import (
    Remembered,
    TooSlowError,
    assert_accounted_for,
    assert_clean,
    assert_nothing_left,
    assert_survives,
    assert_unchanged,
    field_bytes,
    remember,
    within,
)
from shmblocks.testing.wire import Wire

__all__ = [
    "Coverage",
    "Ending",
    "Point",
    "Remembered",
    "Scope",
    "Step",
    "TooSlowError",
    "Wire",
    "abandon",
    "assert_accounted_for",
    "assert_clean",
    "assert_nothing_left",
    "assert_survives",
    "assert_unchanged",
    "cont",
    "die",
    "field_bytes",
    "interrupt_at_every_line",
    "kill_at_every_line",
    "remember",
    "run_and_kill",
    "run_forked",
    "stop",
    "within",
]
