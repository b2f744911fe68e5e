"""A pool's segment and the parts of its state, without any transaction.

What it does not do: change anything, or decide what a change is (`pool_state.py`).
"""

from __future__ import annotations

from functools import partial

from shmblocks._state.blocks import BlockTable
from shmblocks._state.channels import Channels
from shmblocks._state.claims import Claims
from shmblocks._state.counters import Counter, Counters, Histogram
from shmblocks._state.key_index import KeyIndex
from shmblocks._state.layout import Layout
from shmblocks._state.shared_segment import SharedSegment
from shmblocks._state.wait_queue import WaitQueue
from shmblocks.config import PoolConfig


class PoolParts(SharedSegment):
    """One pool's segment as one process sees it."""

    kind = "pool"

    def __init__(
        self,
        fd: int,
        name: str,
        config: PoolConfig,
        pool_id: int,
        lock_timeout: float | None = None,
    ) -> None:
        """Map the segment behind `fd` (which stays the caller's)."""
        layout = Layout(config)
        timeout = config.lock_timeout if lock_timeout is None else lock_timeout
        super().__init__(fd, name, layout, config.max_participants, timeout)
        self.config = config
        self.pool_id = pool_id
        self.layout = layout
        memory, words = self.segment.memory, self.segment.words
        self.queue = WaitQueue(memory, words, layout, self.journal)
        self.keys = KeyIndex(memory, words, layout)
        self.claims = Claims(memory, words, layout, config.max_claims)
        self.channels = Channels(memory, words, layout, config)
        self.counters = Counters(words, layout)
        self.mutex.note_held = partial(self.counters.observe, Histogram.LOCK_HELD)
        self.blocks = BlockTable(
            memory,
            words,
            layout,
            config.block_size,
            config.max_leases,
            pool_id,
            self.journal,
            self.participants,
            self.keys,
            config.allocation == "first fit",
        )

    def _note_takeover(self) -> None:
        self.counters.add(Counter.LOCK_RECOVERIES)
