"""Starts the workers, kills and stops them at random, replaces them, and judges the end.

    worker 0 .. 2 * pairs - 1      embedding and language workers, in pairs
    the others                     mixers

A killed mixer is replaced at once. When one worker of a pair is killed, the other must end by
itself; then both are started anew, with new queues.
"""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch

from shmblocks import BlockHandle, BlockPool, HandleQueue, PoolConfig, _core
from shmblocks.testing import cont, stop
from soaking import payload
from soaking.counters import Count, Counters
from soaking.mixer import Mixer
from soaking.transfers import Member, embedding_worker, language_worker

# Seconds that a worker has to end after it was told to, or its peer died.
ENDS_WITHIN = 90.0
BLOCK_SIZE = 16
BLOCKS = 512
# Seconds; long enough for a loaded machine to open what was published for it, short enough that
# what dead workers left in the shared queue is reclaimed within the soak.
UNCLAIMED_TIMEOUT = 10.0


class Settings(NamedTuple):
    """What to do."""

    processes: int
    seconds: float
    kill_rate: float  # per second, over all workers
    stop_rate: float
    seed: int
    name: str
    pace: float  # seconds of rest between two operations of a mixer


class Verdict(NamedTuple):
    """How it went."""

    counts: dict[str, int]
    kills: int
    stops: int
    reclaimed_blocks: int
    violations: list[str]


class Pair(NamedTuple):
    """The queues of one life of a pair."""

    there: HandleQueue[bytes]
    back: HandleQueue[bytes]


class Launcher:
    """One soak."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._settings = settings
        self._random = random.Random(settings.seed)
        self._folder = folder
        self._pairs = max(1, settings.processes // 4)
        self._counters = Counters(settings.processes, folder)
        config = PoolConfig(
            total_tokens=BLOCKS * BLOCK_SIZE,
            fields=payload.FIELDS,
            block_size=BLOCK_SIZE,
            default_num_blocks=8,
            max_participants=2 * settings.processes + 8,
            unclaimed_timeout=UNCLAIMED_TIMEOUT,
            lock_timeout=60.0,
        )
        self._pool = BlockPool.create(settings.name, config, role="launcher")
        self._shared_queue = HandleQueue.create(
            f"{settings.name}-shared-queue", 256, message_type=BlockHandle
        )
        self._pids: dict[int, int] = {}
        self._queues: dict[int, Pair] = {}
        self._ending: dict[int, float] = {}
        self._lives = 0
        self._kills = 0
        self._stops = 0
        self._reclaimed = 0

    def run(self) -> Verdict:
        """The whole soak; leaves nothing behind."""
        try:
            for pair in range(self._pairs):
                self._start_pair(pair)
            for worker in range(2 * self._pairs, self._settings.processes):
                self._start_mixer(worker)
            self._disturb()
            self._end()
        finally:
            self._kill_rest()
            for pair in list(self._queues):
                self._close_queues(pair)
            self._shared_queue.close()
            self._pool.close()
        counts = {count.name.lower(): self._counters.total(count) for count in Count}
        return Verdict(
            counts, self._kills, self._stops, self._reclaimed, self._counters.violations()
        )

    # ---- workers -----------------------------------------------------------------------------

    def _start_mixer(self, worker: int) -> None:
        seed = self._next_seed()
        names = (self._settings.name, f"{self._settings.name}-shared-queue")
        self._fork(
            worker, lambda: Mixer(worker, seed, *names, self._counters, self._settings.pace).run()
        )

    def _start_pair(self, pair: int) -> None:
        seed = self._next_seed()
        name = f"{self._settings.name}-{self._lives}"
        there, back = f"{name}-there", f"{name}-back"
        self._queues[pair] = Pair(HandleQueue.create(there, 64), HandleQueue.create(back, 64))
        embedding, language = 2 * pair, 2 * pair + 1
        started = time.monotonic_ns()
        pool = self._settings.name
        self._fork(
            embedding,
            lambda: embedding_worker(
                Member(embedding, language, seed, (pool, there, back), self._counters, started)
            ),
        )
        self._fork(
            language,
            lambda: language_worker(
                Member(language, embedding, seed, (pool, back, there), self._counters, started)
            ),
        )

    def _next_seed(self) -> int:
        self._lives += 1
        return self._random.randrange(1 << 30)

    def _fork(self, worker: int, life: Callable[[], None]) -> None:
        pid = os.fork()
        if pid == 0:
            self._live(worker, life)
        self._pids[worker] = pid

    def _live(self, worker: int, life: Callable[[], None]) -> NoReturn:
        """In the child: never returns, never runs what the parent would run at exit."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if worker % 2:
            # With the compiled core and without it, on one pool.
            _core.switch_off("every other worker of the soak does without")
        with open(self._folder / f"hang-{worker}", "w") as file:
            faulthandler.register(signal.SIGUSR1, file)
            try:
                life()
            except BaseException:  # noqa: BLE001  a violation, whatever it is
                self._counters.violation(worker, traceback.format_exc())
            finally:
                os._exit(0)

    # ---- disturbing --------------------------------------------------------------------------

    def _disturb(self) -> None:
        settings = self._settings
        end = time.monotonic() + settings.seconds
        next_kill = next_stop = next_reap = time.monotonic()
        while time.monotonic() < end:
            now = time.monotonic()
            if now >= next_kill:
                self._kill_one()
                next_kill = now + self._random.expovariate(settings.kill_rate)
            if now >= next_stop:
                self._stop_one()
                next_stop = now + self._random.expovariate(settings.stop_rate)
            if now >= next_reap:
                self._reclaimed += self._pool.reap().blocks
                next_reap = now + 0.5
            self._replace_ended()
            time.sleep(0.005)

    def _kill_one(self) -> None:
        worker = self._random.choice(sorted(self._pids))
        self._counters.note_kill(worker)
        os.kill(self._pids[worker], signal.SIGKILL)
        self._kills += 1

    def _stop_one(self) -> None:
        pid = self._pids[self._random.choice(sorted(self._pids))]
        with self._counters.worker_stopped():
            stop(pid)
            time.sleep(0.02 + 0.2 * self._random.random())
            cont(pid)
        self._stops += 1

    def _replace_ended(self) -> None:
        for worker, pid in list(self._pids.items()):
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                continue
            del self._pids[worker]
            if worker >= 2 * self._pairs:
                self._start_mixer(worker)
            else:
                self._ending.setdefault(worker // 2, time.monotonic() + ENDS_WITHIN)
        for pair, deadline in list(self._ending.items()):
            self._end_pair(pair, deadline)

    def _end_pair(self, pair: int, deadline: float) -> None:
        """One worker of a pair has ended: the other must too, by itself; then both start anew."""
        left = [worker for worker in (2 * pair, 2 * pair + 1) if worker in self._pids]
        if left and time.monotonic() < deadline:
            return
        for worker in left:
            self._report_hang(worker, self._pids.pop(worker))
        del self._ending[pair]
        self._close_queues(pair)
        self._start_pair(pair)

    def _close_queues(self, pair: int) -> None:
        queues = self._queues.pop(pair)
        queues.there.close()
        queues.back.close()

    def _await(self, worker: int) -> None:
        pid = self._pids.pop(worker, None)
        deadline = time.monotonic() + ENDS_WITHIN
        while pid is not None and os.waitpid(pid, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                self._report_hang(worker, pid)
                return
            time.sleep(0.002)

    def _report_hang(self, worker: int, pid: int) -> None:
        os.kill(pid, signal.SIGUSR1)
        time.sleep(1.0)
        where = (self._folder / f"hang-{worker}").read_text()
        self._counters.violation(worker, f"did not end within {ENDS_WITHIN} s:\n{where}")
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    # ---- the end -----------------------------------------------------------------------------

    def _end(self) -> None:
        """All workers leave; then no process may hold anything."""
        self._counters.finish()
        for worker in list(self._pids):
            self._await(worker)
        while not self._shared_queue.empty():
            self._shared_queue.get()
        self._pool.drop_all()
        deadline = time.monotonic() + 2 * UNCLAIMED_TIMEOUT + 5
        while self._pool.available_blocks() < BLOCKS and time.monotonic() < deadline:
            self._reclaimed += self._pool.reap().blocks
            time.sleep(0.05)
        for violation in self._pool.check():
            self._counters.violation(0, str(violation))
        if self._pool.available_blocks() != BLOCKS:
            held = "\n".join(str(allocation) for allocation in self._pool.allocations())
            self._counters.violation(
                0, f"{BLOCKS - self._pool.available_blocks()} blocks are lost:\n{held}"
            )
        if self._pool.stats().waiters:
            self._counters.violation(0, "a waiter is left in the wait queue")
        cache = self._pool.cache_stats()
        if cache.claims or cache.entries:
            self._counters.violation(0, f"something is left in the cache: {cache}")

    def _kill_rest(self) -> None:
        for pid in self._pids.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self._pids.clear()


def soak(settings: Settings) -> Verdict:
    """Run a soak and say how it went."""
    # A forked child cannot use the threads of its parent's torch.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="shmblocks-soak-") as folder:
        verdict = Launcher(settings, Path(folder)).run()
    left = [name for name in os.listdir("/dev/shm") if name.startswith(settings.name)]
    if left:
        verdict.violations.append(f"segments are left: {', '.join(left)}")
    sys.stdout.flush()
    return verdict
