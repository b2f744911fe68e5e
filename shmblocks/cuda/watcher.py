"""The thread that ends the waits of this process's streams when the producer has died.

A stream that waits for a word waits for ever if nobody writes it, and the thread that enqueued the
wait may sit in a synchronisation. So while this process has streams that wait, a thread looks
whether those who are to write still live, and writes for the dead.

What is written is `FAILED | generation`: it satisfies the wait, and is no generation.

When: as soon as the producer is *gone* (its last GPU work is over, see `participants.py`), so that
nothing it still does can overwrite the mark. Where that cannot be seen (a forked child of it keeps
its mapping), `DEAD_PATIENCE` after it was first seen dead.

Contract
- `watch` costs a dictionary's entry; the thread starts with the first and ends when there was
  nothing to watch for `IDLE`.
- An entry stays until its word was written, whatever became of the lease.
"""

from __future__ import annotations

import logging
import threading
import time

from shmblocks._state.pool_state import DEAD_PATIENCE, PoolState
from shmblocks.errors import PoolClosedError, ShmBlocksError

# Seconds between two polls. Shorter: more wake-ups while streams wait. Longer: streams of the dead
# wait longer.
PERIOD = 0.05
# Seconds. Shorter: busy processes start the thread more often (some 100 us).
IDLE = 2.0

_log = logging.getLogger("shmblocks")


class Watcher:
    """Watches the allocations that this process's streams wait for; borrows the state."""

    def __init__(self, state: PoolState) -> None:
        self._state = state
        # Taken again by `stop`, when the collector drops the pool in the middle of what holds it.
        self._lock = threading.RLock()
        self._waits: dict[int, int] = {}
        self._dead_since: dict[int, float] = {}
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()

    def watch(self, start_block: int, generation: int) -> None:
        """A stream waits for this allocation's word."""
        with self._lock:
            self._waits[generation] = start_block
            if self._thread is None and not self._stopped.is_set():
                self._thread = threading.Thread(
                    target=self._work, name="shmblocks-watcher", daemon=True
                )
                self._thread.start()

    def stop(self) -> None:
        """End the thread; nothing is watched any more."""
        self._stopped.set()
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _work(self) -> None:
        idle_since = time.monotonic()
        while not self._stopped.wait(PERIOD):
            now = time.monotonic()
            if self._waits:
                idle_since = now
                try:
                    self.poll()
                except PoolClosedError:
                    return
                except ShmBlocksError as error:
                    _log.warning("looking after streams that wait: %s", error)
            elif now - idle_since > IDLE and self._is_over():
                return

    def _is_over(self) -> bool:
        with self._lock:
            if self._waits:
                return False
            self._thread = None
            return True

    def poll(self) -> None:
        """Forget what was written, write for the dead."""
        with self._lock:
            waits = list(self._waits.items())
        now = time.monotonic()
        for generation, start in waits:
            dead_since = self._dead_since.get(generation)
            is_believed_dead = dead_since is not None and now - dead_since > DEAD_PATIENCE
            is_over = self._state.fail_if_over(start, generation, is_believed_dead)
            with self._lock:
                if is_over:
                    self._waits.pop(generation, None)
                    self._dead_since.pop(generation, None)
                elif is_over is None:
                    self._dead_since.setdefault(generation, now)
