"""One endpoint's end of the line: the two queues, who is at the other end, and what was counted.

Contract
- `fetch`, `wait` and `take` give well-formed messages of the one peer, in order. Everything else is
  counted and dropped here, except what only a room can judge (late, duplicate).
- The peer is the first participant whose message arrives. Another one is foreign as long as the
  first one lives; once that is dead or has said Bye, a living newcomer takes its place.
- `loss` says why nothing can be expected from the other side: the peer is dead, closed its
  endpoint, is on another pool, or a queue broke. The endpoint fails its rooms with it.

What it does not do: lock (the endpoint does), or know rooms.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from shmblocks._state.info import ParticipantId
from shmblocks.errors import PeerDiedError, PoolClosedError, ShmBlocksError, TransferError
from shmblocks.transfer.channel import ChannelBrokenError, Incoming, Outgoing, QueueLike
from shmblocks.transfer.messages import AnyMessage, Bye, Hello, Origin, decode, encode

if TYPE_CHECKING:
    from shmblocks.pool import BlockPool
    from shmblocks.transfer.pools import Pools

# Seconds between two questions whether the peer lives. Smaller: the kernel is asked more often (a
# few us each). Larger: its rooms fail later; the promise is within a second.
LOOK_INTERVAL = 0.1

# Messages taken from the queue in one go. Smaller: more polls for a burst. Larger: a peer that
# floods the queue keeps a poll from returning for longer.
FETCH_LIMIT = 1024


class Loss(NamedTuple):
    """Why nothing can be expected from the other side."""

    error: type[ShmBlocksError]
    reason: str


class Counts(msgspec.Struct):
    """What an endpoint counts."""

    sent: int = 0
    received: int = 0
    malformed: int = 0
    foreign: int = 0
    late: int = 0
    duplicate: int = 0
    succeeded: int = 0
    failed: int = 0
    spilled: int = 0
    rounds: int = 0
    tokens: int = 0


class Link:
    """The line to the peer. Borrows the pools and the queues."""

    def __init__(self, pools: Pools, tx: QueueLike, rx: QueueLike) -> None:
        self.counts = Counts()
        self.peer: ParticipantId | None = None
        self.peer_name = ""
        self.origin = _origin(pools.own)
        self._pools = pools
        self._pool = pools.own
        self._out = Outgoing(tx)
        self._in = Incoming(rx)
        self._inbox: deque[object] = deque()
        self._lost: Loss | None = None
        self._broken: Loss | None = None
        self._next_look = 0.0

    # ---- sending -----------------------------------------------------------------------------

    @property
    def unsent(self) -> int:
        """Messages that the queue has not taken yet."""
        return len(self._out)

    def send(self, message: AnyMessage) -> None:
        """Send, unless nobody is there any more. Never blocks, never raises for the queue."""
        if self.loss is not None:
            return
        self.counts.sent += 1
        try:
            self._out.send(encode(message, self._out.longest))
        except ChannelBrokenError as error:
            self._break(error)

    def flush(self) -> None:
        """Send what the queue had no room for before."""
        try:
            self._out.flush()
        except ChannelBrokenError as error:
            self._break(error)

    def _break(self, error: ChannelBrokenError) -> None:
        self._broken = Loss(TransferError, f"the queue to or from the other side broke: {error}")

    # ---- receiving ---------------------------------------------------------------------------

    def fetch(self) -> None:
        """Move what has arrived from the queue to the inbox. Does not block."""
        for _ in range(FETCH_LIMIT):
            if not self._receive(0.0):
                return

    def wait(self, timeout: float) -> None:
        """Like `fetch`, but sleeps at most `timeout` seconds until one message arrives.

        The only method that may run without the endpoint's lock; in one thread at a time, and
        while no other thread is in `fetch`.
        """
        if self._broken is not None:
            time.sleep(timeout)
        else:
            self._receive(timeout)

    def _receive(self, timeout: float) -> bool:
        try:
            data = self._in.receive(timeout)
        except ChannelBrokenError as error:
            self._break(error)
            return False
        if data is None:
            return False
        self._inbox.append(data)
        return True

    def take(self) -> AnyMessage | None:
        """The next well-formed message of the inbox; None when there is none."""
        while self._inbox:
            data = self._inbox.popleft()
            self.counts.received += 1
            message = decode(data) if isinstance(data, (bytes, bytearray, memoryview)) else None
            if message is not None:
                return message
            self.counts.malformed += 1
        return None

    # ---- the peer ----------------------------------------------------------------------------

    @property
    def loss(self) -> Loss | None:
        """Why nothing can be expected from the other side, or None."""
        return self._broken or self._lost

    def knows(self, sender: ParticipantId) -> bool:
        """Whether the message is the peer's. If not, `may_adopt` says whether it could be."""
        return sender == self.peer

    def may_adopt(self, sender: ParticipantId) -> bool:
        """Whether the sender may become the peer: there is none, or only a lost one."""
        if self.peer is None:
            return True
        self.look(at_once=True)
        return self._lost is not None and self._pool.is_alive(sender)

    def adopt(self, sender: ParticipantId) -> None:
        """Make the sender of a message the peer."""
        self.peer = sender
        # Asked now, while it lives: once it is dead, its place may tell of its successor.
        self.peer_name = self._pool.describe(sender)
        self._lost = None

    def look(self, *, at_once: bool = False) -> None:
        """Notice a dead peer; asks the kernel every LOOK_INTERVAL, or at once."""
        if self.peer is None or self._lost is not None:
            return
        now = time.monotonic()
        if now < self._next_look and not at_once:
            return
        self._next_look = now + LOOK_INTERVAL
        if not self._pool.is_alive(self.peer):
            self._lose(PeerDiedError, f"{self.peer_name} died")

    def _lose(self, error: type[ShmBlocksError], reason: str) -> None:
        self._lost = Loss(error, reason)
        self._out.drop()

    def on_bye(self) -> None:
        """The peer closed its endpoint."""
        self._lose(TransferError, f"{self.peer_name} closed its endpoint")

    def on_hello(self, hello: Hello) -> None:
        """The peer made an endpoint; it must be on the same pool."""
        if hello.pool_id != self._pool.pool_id:
            self._lose(
                TransferError,
                f"the other endpoint is on another pool (expected the pool {self._pool.name!r} "
                f"with the id {self._pool.pool_id:#x}, got the id {hello.pool_id:#x}); attach "
                "both sides to the same pool",
            )
        elif hello.spill_id != self._pools.spill_id:
            self._lose(
                TransferError,
                f"the other endpoint spills to another pool (expected the id "
                f"{self._pools.spill_id:#x}, got {hello.spill_id:#x}; 0 is none); give both sides "
                "the same `spill`",
            )

    def greet(self) -> None:
        """Tell the other side that this endpoint is there."""
        self.send(Hello(self.origin, self._pool.pool_id, self._pools.spill_id))

    def part(self) -> None:
        """Tell the other side that this endpoint goes."""
        self.send(Bye(self.origin))


def _origin(pool: BlockPool) -> Origin:
    pool.available_blocks()  # after a fork, this makes the process a participant of its own
    me = pool.participant
    if me is None:
        raise PoolClosedError(f"pool {pool.name}: closed in this process; attach it again")
    return Origin(*me)
