"""Real asynchronous exceptions, at whatever instruction they come, into a loop of operations.

The harness of `everyline.py` raises at lines; a signal's handler and `PyThreadState_SetAsyncExc`
raise between any two instructions where CPython looks for them. What may be lost: a handle that
`alloc` had returned and its caller had not yet stored. Its reservation is the living process's, and
shown as such; nothing else may be left.
"""

from __future__ import annotations

import ctypes
import random
import signal
import threading
from types import FrameType
from typing import NoReturn

from shmblocks import BlockHandle, BlockPool, State
from shmblocks.testing import assert_accounted_for, assert_clean, within
from tests.crash.scenes import CONFIG, pool_of_two

PATIENCE = 30.0
# Seconds within which an exception comes. A round of operations takes some 100 us.
LONGEST_DELAY = 1e-3
# Seconds after which another one comes: CPython drops an exception that comes up in a `__del__`.
AGAIN = 0.05


class Interrupted(BaseException):
    """What is raised."""


def one_round(pool: BlockPool) -> None:
    """Every operation of a life of blocks."""
    handle = pool.alloc(5)
    assert handle is not None
    handle = pool.grow(handle, 9) or handle
    handle = pool.publish(handle, readers=2)
    with pool.open(handle):
        pool.available_blocks()
    with pool.open(handle):
        pass
    other = pool.alloc_default()
    assert other is not None
    with pool.open_for_write(other):
        pool.free(other)
    with pool.reserve(5, timeout=0.0) as reservation:
        reservation.grow(9)
        handle = reservation.publish(readers=2)
    pool.open(handle).give_back()
    pool.forgo(handle)
    with pool.reserve(5):
        pool.reap_if_due()
    pool.free(handle)


def judge(pool: BlockPool, witness: BlockPool) -> None:
    """The lock is free, the state whole, and what the round had made is there to be freed."""
    with within(1.0, "another participant's next operation"):
        assert_clean(witness, "after an asynchronous exception")
    assert_accounted_for(witness)
    # What was dropped without release goes with the next operation of its process.
    pool.available_blocks()
    mine = [info for info in pool.allocations() if not info.leases]
    for info in mine:
        assert info.state in (State.RESERVED, State.PUBLISHED), info
        pool.free(
            BlockHandle(
                info.start_block, info.num_blocks, info.num_tokens, info.generation, pool.pool_id
            )
        )
    stats = pool.stats()
    assert (stats.free_blocks, stats.leases) == (stats.total_blocks, 0), pool.allocations()
    assert stats.participants == 2, pool.participants()


def by_signal(rounds: int, seed: int) -> None:
    """A signal handler raises."""

    def ring(_: int, __: FrameType | None) -> NoReturn:
        raise Interrupted

    rng = random.Random(seed)
    before = signal.signal(signal.SIGALRM, ring)
    try:
        with pool_of_two(CONFIG) as scene:
            for _ in range(rounds):
                try:
                    signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, LONGEST_DELAY), AGAIN)
                    while True:
                        one_round(scene.pool)
                except Interrupted:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                judge(scene.pool, scene.witness)
                signal.signal(signal.SIGALRM, ring)
    finally:
        signal.signal(signal.SIGALRM, before)


class _Victim(threading.Thread):
    """Runs rounds until it is interrupted, then waits to be judged."""

    def __init__(self, pool: BlockPool) -> None:
        super().__init__(name="victim")
        self._pool = pool
        self._go = threading.Semaphore(0)
        self._over = False
        self.running = threading.Semaphore(0)
        self.caught = threading.Semaphore(0)

    def run(self) -> None:
        while self._go.acquire(timeout=PATIENCE) and not self._over:
            try:
                self.running.release()
                while True:
                    one_round(self._pool)
            except Interrupted:
                pass
            self.caught.release()

    def go(self, *, over: bool = False) -> None:
        self._over = over
        self._go.release()

    def interrupt(self) -> None:
        assert self.ident is not None
        told = ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(self.ident), ctypes.py_object(Interrupted)
        )
        assert told == 1


def from_another_thread(rounds: int, seed: int) -> None:
    """Another thread raises, by `PyThreadState_SetAsyncExc`."""
    rng = random.Random(seed)
    pause = threading.Event()
    with pool_of_two(CONFIG) as scene:
        victim = _Victim(scene.pool)
        victim.start()
        try:
            for _ in range(rounds):
                victim.go()
                assert victim.running.acquire(timeout=PATIENCE)
                pause.wait(rng.uniform(0, LONGEST_DELAY))
                victim.interrupt()
                while not victim.caught.acquire(timeout=AGAIN):
                    victim.interrupt()
                judge(scene.pool, scene.witness)
        finally:
            victim.go(over=True)
            victim.join(PATIENCE)
