"""Single flight: many processes want one key at the same moment, and one of them encodes it.

    python -m tests.cache.flight 1000            1,000 rounds of 16 processes
    python -m tests.cache.flight 1000 --kills    in every second one the first encoder is killed

Runs without torch. In each round everyone looks up the round's key, and who gets the claim encodes
it: writes the number of the round into `aux`, and publishes. Everyone checks what it got.
"""

from __future__ import annotations

import argparse
import mmap
import os
import signal
import struct
import time
from multiprocessing.connection import Connection
from typing import NamedTuple

from shmblocks import UNBOUNDED, BlockHandle, BlockPool
from shmblocks.testing.survival import AUX, field_bytes
from tests.cache import kit
from tests.support.naming import new_pool_name

# Seconds that an encoder works: long enough for the others to come and wait.
WORK = 0.001
PATIENCE = 60.0
_NUMBER = struct.Struct("<Q")


class Outcome(NamedTuple):
    """How the rounds went."""

    rounds: int
    encodes: int
    duplicates: int
    kills: int
    takeovers: int
    wrong: int


class _Member:
    """One process: it runs the rounds that it is told, and says what it got."""

    def __init__(self, pool: BlockPool, killed: mmap.mmap, kills: bool) -> None:
        self._pool = pool
        self._killed = killed
        self._kills = kills

    def run(self, orders: Connection) -> None:
        while (number := orders.recv()) is not None:
            orders.send(self._round(number))

    def _round(self, number: int) -> bool:
        """Whether what it got is right."""
        pool, key = self._pool, kit.key(number)
        while True:
            leases = pool.get(key)
            if leases is not None:
                with leases[0] as lease:
                    return self._content(lease.handle) == number
            answer = pool.claim(key)
            if answer.state == "mine":
                self._encode(number, key)
            elif answer.state == "busy":
                pool.wait_for_claim(answer, PATIENCE)

    def _content(self, handle: BlockHandle) -> int:
        with field_bytes(self._pool, handle, AUX) as data:
            content: int = _NUMBER.unpack_from(data)[0]
            return content

    def _encode(self, number: int, key: bytes) -> None:
        with self._pool.reserve(1, timeout=PATIENCE) as reservation:
            with field_bytes(self._pool, reservation.handle, AUX) as data:
                _NUMBER.pack_into(data, 0, number)
            time.sleep(WORK)
            # Only who has the claim is here: nobody else writes this byte.
            if self._kills and number % 2 and not self._killed[number]:
                self._killed[number] = 1
                os.kill(os.getpid(), signal.SIGKILL)
            reservation.publish(readers=UNBOUNDED, key=key)


class _Team:
    """The processes; the dead are replaced between the rounds."""

    def __init__(self, pool: BlockPool, size: int, killed: mmap.mmap, kills: bool) -> None:
        from multiprocessing import get_context

        self._context = get_context("fork")
        self._member = _Member(pool, killed, kills)
        self._size = size
        self._members: list[tuple[object, Connection]] = []
        self.kills = 0

    def fill(self) -> None:
        while len(self._members) < self._size:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=self._member.run, args=(theirs,))
            process.start()
            theirs.close()
            self._members.append((process, ours))

    def round(self, number: int) -> int:
        """How many of those that lived got something wrong."""
        for _, orders in self._members:
            orders.send(number)
        wrong, alive = 0, []
        for process, orders in self._members:
            try:
                if not orders.poll(PATIENCE):
                    raise AssertionError(f"round {number}: a process is hung")
                wrong += not orders.recv()
                alive.append((process, orders))
            except EOFError:
                self.kills += 1
                _end(process, orders)
        self._members = alive
        return wrong

    def end(self) -> None:
        for _, orders in self._members:
            orders.send(None)
        for process, orders in self._members:
            _end(process, orders)


def _end(process: object, orders: Connection) -> None:
    process.join(PATIENCE)  # type: ignore[attr-defined]
    process.close()  # type: ignore[attr-defined]
    orders.close()


def fly(rounds: int, processes: int = 16, kills: bool = False) -> Outcome:
    """So many rounds; forks, so that it is to run where no torch was imported."""
    config = kit.config(64, max_claims=64, max_leases=256, max_participants=processes + 16)
    with (
        BlockPool.create(new_pool_name(), config, prefault="off") as pool,
        mmap.mmap(-1, rounds) as killed,
    ):
        team = _Team(pool, processes, killed, kills)
        wrong = 0
        for number in range(rounds):
            team.fill()
            wrong += team.round(number)
        team.end()
        pool.reap()
        problems = pool.check()
        if problems:
            raise AssertionError(f"after {rounds} rounds: {problems}")
        stats = pool.cache_stats()
        return Outcome(rounds, stats.puts, stats.duplicates, team.kills, stats.takeovers, wrong)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rounds", type=int)
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--kills", action="store_true")
    options = parser.parse_args()
    print(fly(options.rounds, options.processes, options.kills))


if __name__ == "__main__":
    main()
