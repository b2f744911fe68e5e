"""The two sides of transfers, both ways, with resume, until one of them dies.

Each pair of lives has queues of its own. The survivor's room must fail, with the peer named, within
a second of polling; then it ends too, and the conductor starts a new pair.
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
from soaking.board import Board, Count

# Seconds. A transfer that takes longer is a violation: it may wait for blocks, but never so long.
PATIENCE = 60.0
# Nanoseconds from the kill to the failure of the survivor's room.
NOTICED_WITHIN = 10_000_000_000

T = TypeVar("T")
Mode = Literal["landing", "push"]


def tokens_of(seed: int, room: int, landing_tokens: int) -> int:
    """How long the payload of a room is; both sides know. Some are longer than a landing."""
    chooser = random.Random(seed * 1_000_003 + room)
    return max(1, int(chooser.expovariate(1 / (landing_tokens * 0.8))))


class Side:
    """What both sides need: the pool and a pair of queues, and the end of the other."""

    def __init__(
        self,
        worker: int,
        peer: int,
        seed: int,
        names: tuple[str, str, str],
        board: Board,
        started: int,
    ) -> None:
        """`names` of the pool, the queue to put to and the queue to get from; `started` (monotonic
        ns): a kill of the peer after that is its death in this life."""
        self.worker = worker
        self.peer = peer
        self.seed = seed
        self.board = board
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
        if self.board.is_over:
            return
        killed = self.board.killed_at(self.peer)
        if killed < self.started:
            self.board.violation(
                self.worker, f"{self.role}: a room failed without a death: {error}"
            )
            return
        took = time.monotonic_ns() - killed
        self.board.add(self.worker, Count.PEER_DEATHS)
        if "never said" in str(error):
            return
        self.board.raise_to(self.worker, Count.WORST_NOTICE, took)
        if took > NOTICED_WITHIN:
            self.board.violation(
                self.worker, f"{self.role}: noticed after {took / 1e9:.1f} s: {error}"
            )


def embedding_side(side: Side) -> None:
    """Send one payload after the other."""
    with EmbeddingEndpoint(side.pool, side.tx, side.rx) as endpoint:
        for room in _rooms(side):
            length = tokens_of(side.seed, room, side.landing_tokens)
            data = {
                "rows": payload.rows(side.seed, room, length),
                "marks": payload.marks(side.seed, length),
            }
            try:
                sender = endpoint.send(room, data, mrope_position_delta=-room)
                _patiently(side, endpoint, sender.wait)
            except (TransferError, PeerDiedError) as error:
                side.note_end(error)
                break
    side.close()


def language_side(side: Side) -> None:
    """Receive them, and check every row."""
    with LanguageEndpoint(side.pool, side.tx, side.rx) as endpoint:
        for room in _rooms(side):
            mode: Mode = "landing" if room % 2 else "push"
            try:
                receiver = endpoint.receive(room, mode=mode)
                with _patiently(side, endpoint, receiver.wait) as result:
                    _check(side, room, result["rows"], result["marks"], result.mrope_position_delta)
                    side.board.add(side.worker, Count.RESUMED, int(result.rounds > 1))
            except (TransferError, PeerDiedError) as error:
                side.note_end(error)
                break
            side.board.add(side.worker, Count.TRANSFERS)
    side.close()


def _patiently(
    side: Side,
    endpoint: EmbeddingEndpoint | LanguageEndpoint,
    wait: Callable[[float], T],
) -> T:
    """`wait`, but not for a peer that was killed before it said its first word: nobody can tell
    its death from its being late."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return wait(1.0)
        except PoolTimeoutError:
            if not endpoint.stats.peer and side.board.killed_at(side.peer) > side.started:
                raise PeerDiedError("it never said a word") from None
            if time.monotonic() > deadline and not side.board.is_over:
                raise


def _rooms(side: Side) -> Iterator[int]:
    """Room numbers until the soak is over."""
    for room in itertools.count(1):
        if side.board.is_over:
            return
        yield room


def _check(side: Side, room: int, rows: torch.Tensor, marks: torch.Tensor, delta: int) -> None:
    length = tokens_of(side.seed, room, side.landing_tokens)
    problem = payload.wrong(rows, marks, side.seed, room, length)
    if problem or delta != -room:
        side.board.violation(side.worker, f"room {room}: {problem}, delta {delta}")
