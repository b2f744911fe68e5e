"""The language side: asks for embeddings and gets them as `TransferResult`s."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, get_args

from shmblocks.errors import TransferError
from shmblocks.transfer.endpoint import Endpoint, Transfer, open_async
from shmblocks.transfer.messages import Chunk, Failed, Mode, RoomMessage, Starved
from shmblocks.transfer.queues import QueueLike
from shmblocks.transfer.receiving import ReceivingRoom
from shmblocks.transfer.result import TransferResult

if TYPE_CHECKING:
    from shmblocks.pool import BlockPool

# Seconds that a result may lie in the pool, not taken, while a room has no blocks. Smaller: results
# are copied whose user was about to take them. Larger: the room waits longer.
UNTAKEN_PATIENCE = 0.02


class LanguageEndpoint(Endpoint[ReceivingRoom]):
    """Receives over one pair of queues: `rx` is the embedding side's `tx`."""

    def __init__(
        self, pool: BlockPool, tx: QueueLike, rx: QueueLike, *, spill: BlockPool | None = None
    ) -> None:
        # Rooms that succeeded and whose result nobody has taken, so that the endpoint gives it
        # back. In the order of their success, with its time.
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
        req_id = req_id or f"room {room}"
        opened = ReceivingRoom(self._connection, self._pools, room, mode, req_id)
        self._start(opened)
        return Receiver(self, opened)

    async def receive_async(
        self, room: int, mode: Mode = "landing", req_id: str | None = None
    ) -> Receiver:
        """`receive`, without blocking the event loop; `await` the Receiver to get the result.

        When cancelled, the room is aborted.
        """
        return await open_async(lambda: self.receive(room, mode, req_id))

    def _handle(self, message: RoomMessage) -> None:
        if not isinstance(message, (Chunk, Starved, Failed)):
            self._connection.counts.malformed += 1  # only a language side sends such a message
            return
        room = self._find(message)
        if room is None:
            return
        if isinstance(message, Failed):
            room.fail_by_peer(message)
        elif isinstance(message, Starved):
            room.on_starved(message)
        else:
            chunk = message
            room.attempt(lambda: room.on_chunk(chunk))

    # ---- results -----------------------------------------------------------------------------

    def _on_end(self, room: ReceivingRoom) -> None:
        if room.result is not None:
            self._untaken[room] = time.monotonic()

    def _take(self, room: ReceivingRoom) -> TransferResult | None:
        """The room's result; its user owns it from now on."""
        with self._changed:
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
            self._move_untaken_out()

    def _move_untaken_out(self) -> None:
        """Move results that nobody has taken out of the pool.

        A user who waits for one room takes the results of other rooms only afterwards. If these
        kept their blocks while that room has none, it would wait for ever.
        """
        limit = time.monotonic() - UNTAKEN_PATIENCE
        for room, since in self._untaken.items():
            if since <= limit and room.result is not None:
                room.attempt(room.result.move_out)


class Receiver(Transfer[ReceivingRoom, TransferResult]):
    """One transfer to come."""

    def __init__(self, endpoint: LanguageEndpoint, room: ReceivingRoom) -> None:
        super().__init__(endpoint, room)
        self._take = endpoint._take

    @property
    def result(self) -> TransferResult | None:
        """What arrived, once the status is Success; the caller releases it from then on.

        None before, and after `abort()` gave it back.
        """
        return self._take(self._room)

    def _result(self) -> TransferResult:
        result = self.result
        if result is None:
            raise TransferError(f"room {self.room}: its result was given back by abort()")
        return result
