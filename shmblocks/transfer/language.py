"""The language side: asks for embeddings and gets them as `TransferResult`s."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, get_args

from shmblocks.errors import TransferError
from shmblocks.transfer.channel import QueueLike
from shmblocks.transfer.endpoint import Endpoint
from shmblocks.transfer.face import RoomFace
from shmblocks.transfer.intake import make_intake
from shmblocks.transfer.messages import Chunk, Failed, Mode, RoomMessage, Starved
from shmblocks.transfer.receiving import ReceivingRoom
from shmblocks.transfer.result import TransferResult

if TYPE_CHECKING:
    from shmblocks.pool import BlockPool

# Seconds that a result may lie in the pool, not taken, while a room has no blocks. Smaller: results
# are copied whose user was about to take them. Larger: the room waits longer.
PATIENCE_FOR_RESULTS = 0.02


class LanguageEndpoint(Endpoint[ReceivingRoom]):
    """Receives over one pair of queues: `rx` is the embedding side's `tx`."""

    def __init__(
        self, pool: BlockPool, tx: QueueLike, rx: QueueLike, *, spill: BlockPool | None = None
    ) -> None:
        # Rooms that succeeded and whose result nobody has taken: the endpoint's to give back.
        # In the order of their success, with the moment of it.
        self._untaken: dict[ReceivingRoom, float] = {}
        super().__init__(pool, tx, rx, spill=spill)

    def receive(self, room: int, mode: Mode = "landing", req_id: str | None = None) -> Receiver:
        """Ask for the embeddings of a room.

        mode     `"landing"`: into blocks reserved here, before the length is known, resumed when it
                 is longer; `"push"`: read in place where the embedding side puts them
        req_id   shown by inspectors as the request of the blocks; the room's number by default

        Ask early: the other side may call `send` for the room before or after.
        """
        if mode not in get_args(Mode):
            raise ValueError(f"mode: expected one of {', '.join(get_args(Mode))}, got {mode!r}")
        intake = make_intake(self._pools, self._returns, mode, req_id or f"room {room}")
        opened = ReceivingRoom(self._link, self._pools, room, mode, intake)
        self._start(opened)
        return Receiver(self, opened)

    def _handle(self, message: RoomMessage) -> None:
        if not isinstance(message, (Chunk, Starved, Failed)):
            self._link.counts.malformed += 1  # well-formed, but of the language side
            return
        room = self._find(message)
        if room is None:
            return
        if isinstance(message, Failed):
            room.fail_by_peer(message.reason)
        elif isinstance(message, Starved):
            room.on_starved(message)
        else:
            chunk = message
            room.safely(lambda: room.on_chunk(chunk))

    # ---- results -----------------------------------------------------------------------------

    def _on_end(self, room: ReceivingRoom) -> None:
        if room.result is not None:
            self._untaken[room] = time.monotonic()

    def _take(self, room: ReceivingRoom) -> TransferResult | None:
        """The room's result; it is its user's from now on."""
        with self._turn:
            self._untaken.pop(room, None)
        return room.result

    def _discard(self, room: ReceivingRoom) -> None:
        if self._untaken.pop(room, None) is not None:
            room.discard()

    def _discard_untaken(self) -> None:
        for room in list(self._untaken):
            self._discard(room)

    def _advance(self) -> None:
        super()._advance()
        if self._untaken and any(room.is_starved for room in self._rooms.values()):
            self._make_room()

    def _make_room(self) -> None:
        """Move results that nobody has taken out of the pool.

        A user who waits for one room takes the results of others only after it. Were they to keep
        their blocks while that room has none, it would wait for ever.
        """
        ripe = time.monotonic() - PATIENCE_FOR_RESULTS
        for room, since in self._untaken.items():
            if since <= ripe and room.result is not None:
                room.safely(room.result.move_out)


class Receiver(RoomFace[ReceivingRoom]):
    """One transfer to come."""

    def __init__(self, endpoint: LanguageEndpoint, room: ReceivingRoom) -> None:
        super().__init__(endpoint, room)
        self._language = endpoint

    @property
    def result(self) -> TransferResult | None:
        """What arrived, once the status is Success; the caller's to release from then on.

        None before, and after `abort()` gave it back.
        """
        return self._language._take(self._room)

    def wait(self, timeout: float | None = None) -> TransferResult:
        """Wait for Success and give the result, which holds blocks until it is released.

        Raises `TransferError` with the reason when the room failed, `PeerDiedError` when the other
        side died, and `PoolTimeoutError` after `timeout` seconds: the room is open still, wait
        again or abort it.
        """
        self._wait(timeout)
        result = self.result
        if result is None:
            raise TransferError(f"room {self.room}: its result was given back by abort()")
        return result
