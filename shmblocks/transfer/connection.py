"""The connection to the other side: the two queues, who is at the other end, and the counts.

Contract
- `fetch`, `wait` and `take` give well-formed messages in order. Other bytes are counted and
  dropped here; whether a message is late or a duplicate only a room can judge.
- The peer is the first participant whose message arrives. Messages of others are foreign as long as
  the peer lives. Once it has died or said Bye, a living newcomer becomes the peer.
- `loss` says why nothing more can be expected: the peer died, closed its endpoint or uses another
  pool, or a queue broke. The endpoint fails its rooms with it.

What it does not do: lock (the endpoint does), or know rooms.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Generic, Literal, NamedTuple, TypeVar

import msgspec

from shmblocks.errors import PeerDiedError, PoolClosedError, ShmBlocksError, TransferError
from shmblocks.transfer.messages import AnyMessage, Bye, Hello, SenderId, decode, encode
from shmblocks.transfer.queues import Incoming, Outgoing, QueueBrokenError, QueueLike

if TYPE_CHECKING:
    from shmblocks import BlockPool, ParticipantId
    from shmblocks.transfer.pools import Pools

K = TypeVar("K")
V = TypeVar("V")

# Seconds between two checks whether the peer lives. Smaller: the kernel is asked more often (a few
# us each). Larger: its rooms fail later; the promise is within a second.
CHECK_INTERVAL = 0.1
# Messages taken from the queue in one go. Smaller: more polls for a burst. Larger: a peer that
# floods the queue keeps a poll from returning for longer.
FETCH_LIMIT = 1024


class Loss(NamedTuple):
    """Why nothing more can be expected from the other side."""

    error: type[ShmBlocksError]
    reason: str


class EndpointStats(msgspec.Struct, kw_only=True):
    """A copy of the counts since the endpoint was made, and what is open or unsent now.

    malformed, foreign, late and duplicate count dropped messages: not a message at all; of a
    participant that is not the peer; of a room that has ended or never was; had before. rounds,
    num_tokens and num_bytes are of rooms that have ended; spilled counts the rounds, of open rooms
    as well, that went through the spill pool.
    """

    peer: str = ""
    sent: int = 0
    received: int = 0
    malformed: int = 0
    foreign: int = 0
    late: int = 0
    duplicate: int = 0
    rooms_open: int = 0
    rooms_succeeded: int = 0
    rooms_failed: int = 0
    rounds: int = 0
    spilled: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    unsent: int = 0


class Connection:
    """To one peer. Borrows the pools and the queues."""

    def __init__(self, pools: Pools, tx: QueueLike, rx: QueueLike) -> None:
        self.counts = EndpointStats()
        self.peer: ParticipantId | None = None
        self.peer_name = ""
        self.sender = _sender_id(pools.own)
        self._pools = pools
        self._out = Outgoing(tx)
        self._in = Incoming(rx)
        self._inbox: deque[object] = deque()
        self._lost: Loss | None = None
        self._broken: Loss | None = None
        self._next_check = 0.0

    # ---- sending -----------------------------------------------------------------------------

    @property
    def unsent(self) -> int:
        """Messages that the queue has not taken yet."""
        return len(self._out)

    def send(self, message: AnyMessage) -> None:
        """Send, unless the other side is lost. Never blocks, never raises for the queue."""
        if self.loss is not None:
            return
        self.counts.sent += 1
        try:
            self._out.send(encode(message, self._out.limit))
        except QueueBrokenError as error:
            self._break(error)

    def say_hello(self) -> None:
        """Tell the other side that this endpoint was made."""
        self.send(Hello(self.sender, self._pools.own.pool_id, self._pools.spill_id))

    def say_bye(self) -> None:
        """Tell the other side that this endpoint was closed."""
        self.send(Bye(self.sender))

    def flush(self) -> None:
        """Send what a full queue did not take before."""
        try:
            self._out.flush()
        except QueueBrokenError as error:
            self._break(error)

    def _break(self, error: QueueBrokenError) -> None:
        self._broken = Loss(TransferError, f"the queue to or from the other side broke: {error}")

    # ---- receiving ---------------------------------------------------------------------------

    def fetch(self) -> None:
        """Move what has arrived from the queue to the inbox. Does not block."""
        for _ in range(FETCH_LIMIT):
            if not self._receive(0.0):
                return

    def wait(self, timeout: float) -> None:
        """Like `fetch`, but sleeps at most `timeout` seconds until one message arrives.

        The only method that may run without the endpoint's lock: in one thread at a time, and
        while no other thread is in `fetch`.
        """
        if self._broken is not None:
            time.sleep(timeout)
        else:
            self._receive(timeout)

    def _receive(self, timeout: float) -> bool:
        try:
            data = self._in.receive(timeout)
        except QueueBrokenError as error:
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
        """Why nothing more can be expected from the other side, or None."""
        return self._broken or self._lost

    def identify(self, message: AnyMessage) -> Literal["peer", "newcomer", "foreign"]:
        """Whose message it is. A newcomer may be adopted, once the lost peer's rooms have failed.

        A peer that closed its endpoint and made another one is a newcomer, too.
        """
        who = message.sender.participant
        is_peer = who == self.peer
        if is_peer and not (isinstance(message, Hello) and self.loss is not None):
            return "peer"
        if self.peer is None:
            return "newcomer"
        self.check_peer(at_once=True)
        if (is_peer or self._lost is not None) and self._pools.own.is_alive(who):
            return "newcomer"
        return "peer" if is_peer else "foreign"

    def adopt(self, peer: ParticipantId) -> None:
        """Make the sender of a message the peer."""
        self.peer = peer
        # Ask now, while it lives: after its death another process may use its slot.
        self.peer_name = self._pools.own.describe(peer)
        self._lost = None

    def check_peer(self, *, at_once: bool = False) -> None:
        """Notice a dead peer. Asks the kernel every CHECK_INTERVAL seconds, or at once."""
        if self.peer is None or self._lost is not None:
            return
        now = time.monotonic()
        if now < self._next_check and not at_once:
            return
        self._next_check = now + CHECK_INTERVAL
        if not self._pools.own.is_alive(self.peer):
            self._lose(PeerDiedError, f"{self.peer_name} died")

    def _lose(self, error: type[ShmBlocksError], reason: str) -> None:
        self._lost = Loss(error, reason)
        self._out.drop()

    def on_bye(self) -> None:
        """The peer closed its endpoint."""
        self._lose(TransferError, f"{self.peer_name} closed its endpoint")

    def on_hello(self, hello: Hello) -> None:
        """The peer made an endpoint; it must use the same pools."""
        pool, spill_id = self._pools.own, self._pools.spill_id
        if hello.pool_id != pool.pool_id:
            self._lose(
                TransferError,
                f"the other endpoint is on another pool (expected the pool {pool.name!r} with the "
                f"id {pool.pool_id:#x}, got the id {hello.pool_id:#x}); attach both sides to the "
                "same pool",
            )
        elif hello.spill_id != spill_id:
            self._lose(
                TransferError,
                f"the other endpoint spills to another pool (expected the id {spill_id:#x}, got "
                f"{hello.spill_id:#x}; 0 is none); give both sides the same `spill`",
            )


def _sender_id(pool: BlockPool) -> SenderId:
    pool.available_blocks()  # after a fork, this makes the process a participant of its own
    me = pool.participant
    if me is None:
        raise PoolClosedError(f"pool {pool.name}: closed in this process; attach it again")
    return SenderId(*me)


class ExpiringDict(Generic[K, V]):
    """A dict that keeps at most `limit` entries, each for at most `seconds`.

    It recognises late messages without growing for as long as the process lives.
    """

    def __init__(self, limit: int, seconds: float) -> None:
        self._limit = limit
        self._seconds = seconds
        self._entries: OrderedDict[K, tuple[V, float]] = OrderedDict()

    def __contains__(self, key: K) -> bool:
        return self.get(key) is not None

    def put(self, key: K, value: V) -> None:
        """Remember, as the newest entry."""
        self._entries.pop(key, None)
        self._entries[key] = (value, time.monotonic() + self._seconds)
        if len(self._entries) > self._limit:
            self._entries.popitem(last=False)

    def get(self, key: K) -> V | None:
        """The value, unless it has expired."""
        entry = self._entries.get(key)
        return entry[0] if entry is not None and time.monotonic() < entry[1] else None

    def pop(self, key: K) -> V | None:
        """The value, unless it has expired; forget it."""
        value = self.get(key)
        self._entries.pop(key, None)
        return value

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
