"""Waiting for the end of somebody's claim, from a thread or from asyncio.

Contract
- Whoever waits is woken when the claim ends: published, given up, or reaped after a death.
- A dead owner wakes nobody, so waiters also look every `LONGEST_WAIT` seconds.
"""

from __future__ import annotations

import time

from shmblocks._os.futex import Futex
from shmblocks._os.futex_asyncio import LoopWaiters
from shmblocks._state.cache_state import CacheState, ClaimAnswer
from shmblocks._state.counters import Counter

# Seconds asleep at most. Smaller: more looks for nothing while an encoder works. Larger: the claim
# of an encoder that was killed is taken over later.
LONGEST_WAIT = 0.05


class ClaimWaiters:
    """The threads and coroutines of this process that wait for claims; borrows the state."""

    def __init__(self, state: CacheState) -> None:
        self._state = state
        self._loops: dict[int, tuple[Futex, LoopWaiters]] = {}

    def wait(self, answer: ClaimAnswer, timeout: float) -> None:
        """Sleep until the claim has ended, `timeout` seconds at most."""
        if not self._begins(answer, timeout):
            return
        futex = self._state.claim_futex(answer.slot)
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            futex.wait(answer.seen, min(left, LONGEST_WAIT))
            if not self._state.is_claimed(answer):
                return

    def _begins(self, answer: ClaimAnswer, timeout: float) -> bool:
        """Whether there is anything to wait for; counts it, once for each wait."""
        if answer.state != "busy" or timeout <= 0:
            return False
        self._state.count(Counter.CLAIM_WAITS)
        return True

    async def wait_async(self, answer: ClaimAnswer, timeout: float) -> None:
        """As `wait`, from asyncio."""
        if not self._begins(answer, timeout):
            return
        there = self._loops.get(answer.slot)
        if there is None:
            futex = self._state.claim_futex(answer.slot)
            there = self._loops[answer.slot] = (futex, LoopWaiters(futex, notifies_all=True))
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            await there[1].sleep(answer.seen, min(left, LONGEST_WAIT))
            if not self._state.is_claimed(answer):
                return

    def close(self) -> None:
        """After the state was left: end the waits of this process, let go of the mapping."""
        loops, self._loops = self._loops, {}
        for futex, waiters in loops.values():
            futex.drop()
            waiters.close()
