"""The two workers of transfers, both modes, with resume, until one of them dies.

Each pair has queues of its own. The survivor's room must fail, with the peer named, within a second
of polling; then the survivor ends too, and the launcher starts a new pair.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from typing import Literal, TypeVar

import torch

from shmblocks import BlockPool, HandleQueue, PeerDiedError, PoolTimeoutError, TransferError
from shmblocks.transfer import EmbeddingEndpoint, LanguageEndpoint
from soaking import payload
from soaking.counters import Count, Counters

# Seconds. A transfer that takes longer is a violation: it may wait for blocks, but never so long.
PATIENCE = 60.0
# Nanoseconds from the kill to the failure of the survivor's room.
NOTICED_WITHIN = 10_000_000_000

T = TypeVar("T")
Mode = Literal["landing", "push"]


def tokens_of(seed: int, room: int, landing_tokens: int) -> int:
    """How long the payload of a room is; both workers know. Some are longer than a landing."""
    chooser = random.Random(seed * 1_000_003 + room)
    return max(1, int(chooser.expovariate(1 / (landing_tokens * 0.8))))


class Member:
    """What both workers of a pair need: the pool, a pair of queues, and who the peer is."""

    def __init__(
        self,
        worker: int,
        peer: int,
        seed: int,
        names: tuple[str, str, str],
        counters: Counters,
        started: int,
    ) -> None:
        """`names` of the pool, the queue to put to and the queue to get from; `started` (monotonic
        ns): a kill of the peer after that is its death in this life."""
        self.worker = worker
        self.peer = peer
        self.seed = seed
        self.counters = counters
        self.role = "embedding" if worker < peer else "language"
        self.pool = BlockPool.attach(names[0], timeout=10, role=self.role, prefault="off")
        self.tx = HandleQueue.attach(names[1], timeout=10)
        self.rx = HandleQueue.attach(names[2], timeout=10)
        self.started = started
        config = self.pool.config
        self.landing_tokens = config.default_num_blocks * config.block_size

    def close(self) -> None:
        for part in (self.pool, self.tx, self.rx):
            part.close()

    def note_end(self, error: TransferError | PeerDiedError) -> None:
        """A room failed: right when the peer was killed, wrong otherwise."""
        if self.counters.is_over:
            return
        killed = self.counters.killed_at(self.peer)
        if killed < self.started:
            self.counters.violation(
                self.worker, f"{self.role}: a room failed without a death: {error}"
            )
            return
        took = time.monotonic_ns() - killed
        self.counters.add(self.worker, Count.PEER_DEATHS)
        if "never said" in str(error):
            return
        self.counters.raise_to(self.worker, Count.WORST_NOTICE, took)
        if took > NOTICED_WITHIN:
            self.counters.violation(
                self.worker, f"{self.role}: noticed after {took / 1e9:.1f} s: {error}"
            )


def embedding_worker(member: Member) -> None:
    """Send one payload after the other."""
    with EmbeddingEndpoint(member.pool, member.tx, member.rx) as endpoint:
        for room in _rooms(member):
            length = tokens_of(member.seed, room, member.landing_tokens)
            data = {
                "rows": payload.rows(member.seed, room, length),
                "marks": payload.marks(member.seed, length),
            }
            try:
                sender = endpoint.send(room, data, mrope_position_delta=-room)
                _patiently(member, endpoint, sender.wait)
            except (TransferError, PeerDiedError) as error:
                member.note_end(error)
                break
    member.close()


def language_worker(member: Member) -> None:
    """Receive them, and check every row."""
    with LanguageEndpoint(member.pool, member.tx, member.rx) as endpoint:
        for room in _rooms(member):
            mode: Mode = "landing" if room % 2 else "push"
            try:
                receiver = endpoint.receive(room, mode=mode)
                with _patiently(member, endpoint, receiver.wait) as result:
                    _check(
                        member, room, result["rows"], result["marks"], result.mrope_position_delta
                    )
                    member.counters.add(member.worker, Count.RESUMED, int(result.rounds > 1))
            except (TransferError, PeerDiedError) as error:
                member.note_end(error)
                break
            member.counters.add(member.worker, Count.TRANSFERS)
    member.close()


def _patiently(
    member: Member,
    endpoint: EmbeddingEndpoint | LanguageEndpoint,
    wait: Callable[[float], T],
) -> T:
    """`wait`, but not for a peer that was killed before its first message: its death looks the same
    as its being late."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return wait(1.0)
        except PoolTimeoutError:
            if (
                not endpoint.stats().peer
                and member.counters.killed_at(member.peer) > member.started
            ):
                raise PeerDiedError("it never sent a message") from None
            if time.monotonic() > deadline and not member.counters.is_over:
                raise


def _rooms(member: Member) -> Iterator[int]:
    """Room numbers until the soak is over."""
    for room in itertools.count(1):
        if member.counters.is_over:
            return
        yield room


def _check(member: Member, room: int, rows: torch.Tensor, marks: torch.Tensor, delta: int) -> None:
    length = tokens_of(member.seed, room, member.landing_tokens)
    problem = payload.wrong(rows, marks, member.seed, room, length)
    if problem or delta != -room:
        member.counters.violation(member.worker, f"room {room}: {problem}, delta {delta}")
