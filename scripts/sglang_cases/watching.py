"""What the lab saw, and what is in a pool and in /dev/shm."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from shmblocks import BlockPool, PoolInspector, PoolNotFoundError, remove_pool

# Segments that a killed SGLang leaves, with the plug-in and without.
SGLANGS_OWN = ("sgl_shm_mq_", "sglang_loads_")


class Event(NamedTuple):
    """One line of a trace."""

    what: str
    rid: str
    handle: bool
    rank: int
    sha: str


class Lab:
    """The folder that the lab's plug-in reads and writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.set()

    def set(self, *lines: str) -> None:
        """What is to happen at the points from now on."""
        new = self.folder / "faults.new"
        new.write_text("\n".join(lines))
        new.replace(self.folder / "faults")

    def events(self) -> list[Event]:
        """What happened since the last call, in order."""
        lines = []
        for path in self.folder.glob("trace.*"):
            lines += [json.loads(line) for line in path.read_text().splitlines()]
            path.write_text("")
        lines.sort(key=lambda line: line["at"])
        return [
            Event(
                line["what"],
                str(line.get("rid", "")).split("_local")[0],
                bool(line.get("handle")),
                int(line.get("rank", -1)),
                str(line.get("sha", "")),
            )
            for line in lines
        ]


def count(events: list[Event]) -> dict[str, int]:
    """How many were extracted as handle and as bytes, by rank, and how many given back."""
    found: dict[str, int] = {}
    for event in events:
        if event.what == "extracted":
            name = f"{'handle' if event.handle else 'bytes'} {event.rank}"
            found[name] = found.get(name, 0) + 1
        if event.what == "given back":
            found[event.what] = found.get(event.what, 0) + 1
    return found


def differing(events: list[Event]) -> list[str]:
    """Of the tensors that a rank extracted: those that no encoder had sent."""
    sent = {(event.rid, event.sha) for event in events if event.what == "send"}
    return [
        f"{event.rid} on rank {event.rank}"
        for event in events
        if event.what == "extracted" and (event.rid, event.sha) not in sent
    ]


def seconds_until_empty(name: str, longest: float) -> float:
    """Until nobody holds a block, without a call of ours that would reap; -1: somebody does."""
    started = time.monotonic()
    while time.monotonic() - started < longest:
        if not holders(name):
            return time.monotonic() - started
        time.sleep(0.05)
    return -1.0


def holders(name: str) -> list[str]:
    """The allocations of a pool; none when there is no pool."""
    try:
        with PoolInspector(name) as pool:
            return [f"{each.state} {each.req_id}" for each in pool.allocations()]
    except PoolNotFoundError:
        return []


def violations(name: str) -> list[str]:
    """Of the pool's invariants."""
    try:
        with PoolInspector(name) as pool:
            return [str(each) for each in pool.check()]
    except PoolNotFoundError:
        return []


def reap(name: str) -> None:
    """Give back what the dead of a pool held."""
    with PoolInspector(name) as pool:
        pool.reap()


def segments(prefix: str) -> list[str]:
    """Names in /dev/shm."""
    return sorted(name for name in os.listdir("/dev/shm") if name.startswith(prefix))


def remove_sglangs(before: Sequence[str]) -> None:
    """Take away what SGLang itself leaves of killed servers, and did not leave `before`."""
    for prefix in SGLANGS_OWN:
        for name in segments(prefix):
            if name not in before:
                os.unlink(f"/dev/shm/{name}")


def remove(name: str) -> None:
    """Take away what a killed deployment left."""
    try:
        remove_pool(name)
    except PoolNotFoundError:
        return


class Hog:
    """A process that holds all blocks of a pool."""

    def __init__(self, name: str) -> None:
        self._pool = BlockPool.attach(name, role="hog", prefault="off")
        self._held = []
        rows = self._pool.config.block_size
        while (reservation := self._pool.reserve_now(rows)) is not None:
            self._held.append(reservation)

    def release(self) -> None:
        for reservation in self._held:
            reservation.free()
        self._pool.close()
