"""The thread that ends the waits of this process's streams when the producer has died.

A stream that waits for a word waits for ever if nobody writes it, and the thread that enqueued the
wait may sit in a synchronisation. So while this process has streams that wait, a thread looks
whether those who are to write still live, and writes for the dead.

What is written is `FAILED | generation`: it satisfies the wait, and is no generation.

When: as soon as the producer is *gone* (its last GPU work is over, see `participants.py`), so that
nothing it still does can overwrite the mark. Where that cannot be seen (a forked child of it keeps
its mapping), `PATIENCE` after it was first seen dead.

Contract
- `watch` costs a dictionary's entry; the thread starts with the first and ends when there was
  nothing to watch for `IDLE`.
- An entry stays until its word was written, whatever became of the lease.
"""

from __future__ import annotations

import logging
import threading
import time

from shmblocks._state.participants import ParticipantId
from shmblocks._state.pool_state import Ledger
from shmblocks.errors import PoolClosedError, ShmBlocksError

# Seconds between two looks. Shorter: more wake-ups while streams wait. Longer: streams of the dead
# wait longer.
PERIOD = 0.05
# Seconds. Shorter: busy processes start the thread more often (some 100 us).
IDLE = 2.0
# Seconds after which the dead are believed to write nothing more. Measured on an H100: the last
# byte of a killed process arrived 6 ms after the kill at the latest.
PATIENCE = 1.0

_log = logging.getLogger("shmblocks")


class Watcher:
    """Watches the allocations that this process's streams wait for; borrows the ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
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

    @property
    def is_running(self) -> bool:
        """Whether there is a thread."""
        return self._thread is not None

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
                    self._ledger.run(self.look)
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

    def look(self) -> None:
        """Under the pool's lock: forget what was written, write for the dead."""
        with self._lock:
            waits = list(self._waits.items())
        for generation, start in waits:
            if self._is_settled(start, generation):
                with self._lock:
                    self._waits.pop(generation, None)
                    self._dead_since.pop(generation, None)

    def _is_settled(self, start: int, generation: int) -> bool:
        record = self._ledger.blocks.record(start)
        if record.generation != generation or record.ready >= generation:
            return True
        owner = ParticipantId.of(record.owner)
        if self._ledger.participants.is_alive(owner):
            return False
        since = self._dead_since.setdefault(generation, time.monotonic())
        gone = self._ledger.participants.is_gone(owner)
        if not gone and time.monotonic() - since < PATIENCE:
            return False
        self._ledger.blocks.fail(start, record)
        return True
