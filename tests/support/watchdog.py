"""Ends a test that hangs: a traceback of every thread, then the process is gone.

The timer is a thread of C that needs no GIL, so it also ends a test that is stuck inside a system
call or an extension. It exits without cleaning up, on purpose: what hangs cannot be asked to tidy
itself, and the check at the end of the run finds and removes what is left. It does *not* reach into
child processes; `tests.support.children` bounds those.
"""

from __future__ import annotations

import faulthandler
import os

# Smaller: a loaded machine with slow disks is called a hang. Larger: a real hang costs that long.
DEFAULT_SECONDS = 300.0
SECONDS_VARIABLE = "SHMBLOCKS_TEST_WATCHDOG"


class Watchdog:
    """Owns a copy of the real standard error, which pytest captures while a test runs."""

    def __init__(self) -> None:
        self._stderr = os.dup(2)

    def start(self, seconds: float | None = None) -> None:
        """(Re)start the clock. `seconds` defaults to the environment's, then to two minutes."""
        limit = seconds or float(os.environ.get(SECONDS_VARIABLE, DEFAULT_SECONDS))
        faulthandler.dump_traceback_later(limit, exit=True, file=self._stderr)

    def stop(self) -> None:
        faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        self.stop()
        os.close(self._stderr)
