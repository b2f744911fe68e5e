"""A pool's segment and the parts of its state, without any transaction.

What it does not do: change anything, or decide what a change is (`pool_state.py`).
"""

from __future__ import annotations

from functools import partial

from shmblocks import _core
from shmblocks._state.blocks import BlockTable, LeaseKey
from shmblocks._state.channels import Channels
from shmblocks._state.claims import Claims
from shmblocks._state.counters import Counter, Counters, Histogram
from shmblocks._state.key_index import KeyIndex
from shmblocks._state.layout import LAYOUT_VERSION, WORD, Layout
from shmblocks._state.shared_segment import SharedSegment
from shmblocks._state.wait_queue import WaitQueue
from shmblocks.config import PoolConfig
from shmblocks.handle import BlockHandle

_core.use(LAYOUT_VERSION)
_core.know("handle", BlockHandle)
_core.know("key", LeaseKey)


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
        # The compiled operations; None: there are none.
        self.core = self._compiled = _core.pool_core(
            self.segment.mapping, self.mutex.inside, self.blocks.hints, self._numbers()
        )

    def _numbers(self) -> tuple[int, ...]:
        """What the compiled operations need to know, as `core_init` takes it."""
        config, layout = self.config, self.layout
        regions = (
            layout.records,
            layout.bitmap,
            layout.bitmap_bytes,
            layout.leases,
            layout.live,
            layout.channels,
            layout.messages,
            layout.buckets,
        )
        return (
            self.pool_id,
            layout.total_blocks,
            config.block_size,
            config.max_leases,
            int(config.unclaimed_timeout * 1e9),
            int(config.allocation == "first fit"),
            config.channels,
            config.channel_slots,
            layout.journal // WORD,
            layout.counters // WORD,
            *(offset // WORD for offset in regions),
        )

    def _note_takeover(self) -> None:
        self.counters.add(Counter.LOCK_RECOVERIES)
