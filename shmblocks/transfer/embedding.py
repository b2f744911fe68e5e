"""The embedding side: sends embeddings to a language side that asks for them.

The two sides open a room in any order. What comes before `send` is kept:

    a Request                     in `_early`, until `send` or until the language side gives up
    a Failed                      in `_given_up`: `send` gives a room that has failed for that
                                  reason
    (an abort before the Request  in `_refused`: the Request is answered with the reason)

All three are bounded in number, the last two also in time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from shmblocks.transfer.connection import ExpiringDict
from shmblocks.transfer.endpoint import Endpoint, Transfer, open_async
from shmblocks.transfer.messages import Done, Failed, Request, Resume, RoomMessage
from shmblocks.transfer.queues import QueueLike
from shmblocks.transfer.room import Status
from shmblocks.transfer.sending import (
    Payload,
    SendingRoom,
    payload_of_blocks,
    payload_of_published,
    payload_of_tensors,
)

if TYPE_CHECKING:
    import torch

    from shmblocks.handle import BlockHandle
    from shmblocks.pool import BlockPool

# Requests that may wait for their `send`. Fewer: a language side that asks for more rooms ahead has
# the oldest refused. More: the peer can make us use more memory (some 300 bytes each).
MOST_EARLY = 4096
# Seconds for which the end of a room is remembered for the side that opens it later. Shorter: a
# side that is later than that waits for nothing. Longer: a number that is used again within that
# time may fail at once.
REMEMBERED_SECONDS = 60.0


class EmbeddingEndpoint(Endpoint[SendingRoom]):
    """Sends over one pair of queues: `tx` is the language side's `rx`."""

    def __init__(
        self, pool: BlockPool, tx: QueueLike, rx: QueueLike, *, spill: BlockPool | None = None
    ) -> None:
        self._early: dict[int, Request] = {}
        self._refused: ExpiringDict[int, str] = ExpiringDict(MOST_EARLY, REMEMBERED_SECONDS)
        self._given_up: ExpiringDict[int, Failed] = ExpiringDict(MOST_EARLY, REMEMBERED_SECONDS)
        super().__init__(pool, tx, rx, spill=spill)

    # ---- for users ---------------------------------------------------------------------------

    def send(
        self,
        room: int,
        tensors: Mapping[str, torch.Tensor],
        *,
        mrope_position_delta: int = 0,
        req_id: str | None = None,
    ) -> Sender:
        """Send the tensors of a room, one for each field of the pool, in the mode that the other
        side asks for.

        Each is `[num_tokens, *shape]` of the field's dtype, or `[k, num_tokens]` for a transposed
        field (`mrope_positions`). They are borrowed: leave them unchanged until the room has ended.
        """
        payload = payload_of_tensors(self.pool, tensors, mrope_position_delta)
        return self._send(room, payload, req_id)

    def send_handle(
        self,
        room: int,
        handle: BlockHandle,
        *,
        mrope_position_delta: int | None = None,
        published: bool = False,
        req_id: str | None = None,
    ) -> Sender:
        """Send blocks that hold the tokens already: with push, nothing is copied at all.

        handle                a reservation of this process, in the pool or in the spill pool, that
                              it has written (`out=view[...]`). The endpoint owns it from now on,
                              however the room ends, and even if it cannot be opened
        mrope_position_delta  written to `aux[1]`; None leaves what is there. `aux[0]` is set here
        published             the handle is of `pool.publish(..., readers=n)`, to be sent to n
                              receivers, `aux[0]` and `aux[1]` written before; push only. It stays
                              the caller's, who calls `pool.free` when a room fails
        """
        pool = self._pools.of(handle)
        if published:
            payload = payload_of_published(pool, handle)
        else:
            payload = payload_of_blocks(pool, handle, mrope_position_delta)
        return self._send(room, payload, req_id)

    async def send_async(
        self,
        room: int,
        tensors: Mapping[str, torch.Tensor],
        *,
        mrope_position_delta: int = 0,
        req_id: str | None = None,
    ) -> Sender:
        """`send`, without blocking the event loop; `await` the Sender to wait for the end.

        When cancelled, the room is aborted.
        """
        delta = mrope_position_delta
        return await open_async(
            lambda: self.send(room, tensors, mrope_position_delta=delta, req_id=req_id)
        )

    async def send_handle_async(
        self,
        room: int,
        handle: BlockHandle,
        *,
        mrope_position_delta: int | None = None,
        published: bool = False,
        req_id: str | None = None,
    ) -> Sender:
        """`send_handle`, without blocking the event loop.

        When cancelled, the room is aborted, and a reservation is freed.
        """
        delta = mrope_position_delta
        return await open_async(
            lambda: self.send_handle(
                room, handle, mrope_position_delta=delta, published=published, req_id=req_id
            )
        )

    def _send(self, number: int, payload: Payload, req_id: str | None) -> Sender:
        req_id = req_id or f"room {number}"
        room = SendingRoom(self._connection, self._pools, number, payload, req_id)
        self._start(room)
        return Sender(self, room)

    # ---- rooms -------------------------------------------------------------------------------

    def _begin(self, room: SendingRoom) -> None:
        self._refused.pop(room.number)
        request = self._early.pop(room.number, None)
        failed = self._given_up.pop(room.number)
        if request is not None:
            room.attempt(lambda: room.on_request(request))
        elif failed is not None:
            room.fail_by_peer(failed)

    def _on_end(self, room: SendingRoom) -> None:
        if room.status is Status.Failed and not room.nonce:
            self._refused.put(room.number, room.reason)

    def _on_loss(self) -> None:
        self._early.clear()
        self._given_up.clear()

    # ---- messages ----------------------------------------------------------------------------

    def _handle(self, message: RoomMessage) -> None:
        if isinstance(message, Request):
            self._on_request(message)
        elif isinstance(message, Failed):
            self._on_failed(message)
        elif isinstance(message, (Resume, Done)):
            self._on_answer(message)
        else:
            self._connection.counts.malformed += 1  # only an embedding side sends such a message

    def _on_answer(self, message: Resume | Done) -> None:
        room = self._find(message)
        if room is None:
            return
        if isinstance(message, Resume):
            room.attempt(lambda: room.on_resume(message))
        else:
            room.attempt(lambda: room.on_done(message))

    def _on_request(self, request: Request) -> None:
        if self._is_repeated(request):
            return
        self._given_up.pop(request.room)
        room = self._room_for(request)
        refusal = self._refused.pop(request.room)
        if room is not None:
            room.attempt(lambda: room.on_request(request))
        elif refusal is not None:
            self._refuse(request, refusal)
        else:
            self._keep(request)

    def _room_for(self, request: Request) -> SendingRoom | None:
        """The room that waits for such a request.

        A room may have been asked for before, by an attempt that ended silently (its language side
        saw our predecessor die). If nothing went over yet, it begins with the new attempt.
        """
        room = self._rooms.get(request.room)
        if room is None or not room.nonce:
            return room
        if room.rounds == 0:
            self._ended.put(room.nonce, True)
            return room
        room.fail("the language side began this room anew")
        self._sweep()
        return None

    def _is_repeated(self, request: Request) -> bool:
        counts = self._connection.counts
        known = (self._rooms.get(request.room), self._early.get(request.room))
        if any(each is not None and each.nonce == request.nonce for each in known):
            counts.duplicate += 1
        elif request.nonce in self._ended or not request.nonce:
            counts.late += 1
        else:
            return False
        return True

    def _keep(self, request: Request) -> None:
        """For a later `send`."""
        self._early[request.room] = request
        if len(self._early) > MOST_EARLY:
            oldest = self._early.pop(next(iter(self._early)))
            self._refuse(oldest, f"{MOST_EARLY} newer requests wait for their send()")

    def _refuse(self, request: Request, reason: str) -> None:
        self._ended.put(request.nonce, True)
        sender = self._connection.sender
        self._connection.send(Failed(sender, request.room, request.nonce, reason))

    def _on_failed(self, failed: Failed) -> None:
        room, early = self._rooms.get(failed.room), self._early.get(failed.room)
        is_past = failed.nonce in self._ended
        if room is not None and room.nonce in (failed.nonce, 0) and not is_past:
            room.fail_by_peer(failed)
        elif early is not None and early.nonce == failed.nonce:
            del self._early[failed.room]
            self._give_up(failed)
        elif room is None and early is None and not is_past:
            self._give_up(failed)
        else:
            self._connection.counts.late += 1

    def _give_up(self, failed: Failed) -> None:
        self._ended.put(failed.nonce, True)
        self._given_up.put(failed.room, failed)


class Sender(Transfer[SendingRoom, None]):
    """One payload being sent. A wait for it ends when the other side has everything."""

    def _result(self) -> None:
        return None
