"""The embedding side: sends embeddings to a language side that asks for them.

The two sides of a room start in any order, so what comes first is kept for the other:

    a Request before `send`       in `_early`, until `send` or until the language side gives up
    an abort before the Request   in `_refused`: the Request is answered with the reason
    a Failed before `send`        in `_given_up`: `send` gives a room that has failed with the
    reason

All three are bounded in number, the last two in time as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from shmblocks.transfer.channel import QueueLike
from shmblocks.transfer.endpoint import Endpoint
from shmblocks.transfer.face import RoomFace
from shmblocks.transfer.messages import Chunk, Done, Failed, Request, Resume, RoomMessage
from shmblocks.transfer.payload import (
    Payload,
    payload_of_blocks,
    payload_of_published,
    payload_of_tensors,
)
from shmblocks.transfer.recent import Recent
from shmblocks.transfer.sending import SendingRoom
from shmblocks.transfer.status import Status

if TYPE_CHECKING:
    import torch

    from shmblocks.handle import BlockHandle
    from shmblocks.pool import BlockPool

# Requests that may wait for their `send`. Fewer: a language side that asks for more rooms ahead has
# the oldest refused. More: memory (some 300 bytes each) in the hands of the peer.
MOST_EARLY = 4096
# Seconds that a room's end is remembered for the side that comes later. Shorter: a side that comes
# later still waits for nothing. Longer: a number that is used again so late fails at once.
REMEMBERED_SECONDS = 60.0


class EmbeddingEndpoint(Endpoint[SendingRoom]):
    """Sends over one pair of queues: `tx` is the language side's `rx`."""

    def __init__(
        self, pool: BlockPool, tx: QueueLike, rx: QueueLike, *, spill: BlockPool | None = None
    ) -> None:
        self._early: dict[int, Request] = {}
        self._refused: Recent[int, str] = Recent(MOST_EARLY, REMEMBERED_SECONDS)
        self._given_up: Recent[int, str] = Recent(MOST_EARLY, REMEMBERED_SECONDS)
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
        """Send the tensors of a room, one for each field of the pool, in the way the other side
        asks.

        Each is `[num_tokens, *shape]` of the field's dtype, or `[k, num_tokens]` for a transposed
        field (`mrope_positions`). They are borrowed, not copied: leave them unchanged until the
        room has ended.
        """
        payload = payload_of_tensors(self._pool, tensors, mrope_position_delta)
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

        handle                a reservation of this process, in the pool or in the spill pool,
                              written by it (`out=view[...]`); it is
                              the endpoint's from now on, whatever becomes of the room
        mrope_position_delta  written to `aux[1]`; None leaves what is there. `aux[0]` is set here
        published             the handle is of `pool.publish(..., readers=n)`, to be sent to n
                              receivers, `aux[0]` and `aux[1]` written before; push only. It stays
                              the caller's, who calls `pool.free` when a room fails
        """
        if published:
            payload = payload_of_published(self._pools.of(handle), handle)
        else:
            payload = payload_of_blocks(self._pools.of(handle), handle, mrope_position_delta)
        return self._send(room, payload, req_id)

    def _send(self, room: int, payload: Payload, req_id: str | None) -> Sender:
        opened = SendingRoom(
            self._link, self._pools, self._returns, room, payload, req_id or f"room {room}"
        )
        self._start(opened)
        return Sender(self, opened)

    # ---- rooms -------------------------------------------------------------------------------

    def _begin(self, room: SendingRoom) -> None:
        self._refused.pop(room.room)
        request = self._early.pop(room.room, None)
        given_up = self._given_up.pop(room.room)
        if request is not None:
            room.safely(lambda: room.on_request(request))
        elif given_up is not None:
            room.fail_by_peer(given_up)

    def _on_end(self, room: SendingRoom) -> None:
        if room.status is Status.Failed and not room.nonce and not room.told_by_peer:
            self._refused.put(room.room, room.reason)

    def _on_loss(self) -> None:
        self._early.clear()
        self._given_up.clear()

    # ---- messages ----------------------------------------------------------------------------

    def _handle(self, message: RoomMessage) -> None:
        if isinstance(message, Request):
            self._on_request(message)
        elif isinstance(message, Failed):
            self._on_failed(message)
        elif isinstance(message, Chunk):
            self._link.counts.malformed += 1  # well-formed, but of the embedding side
        else:
            self._on_room_message(message)

    def _on_room_message(self, message: RoomMessage) -> None:
        room = self._find(message)
        if room is None:
            return
        if isinstance(message, Resume):
            resume = message
            room.safely(lambda: room.on_resume(resume))
        elif isinstance(message, Done):
            done = message
            room.safely(lambda: room.on_done(done))

    def _on_request(self, request: Request) -> None:
        if self._is_repeated(request):
            return
        self._given_up.pop(request.room)
        room = self._room_for(request)
        refusal = self._refused.pop(request.room)
        if room is not None:
            room.safely(lambda: room.on_request(request))
        elif refusal is not None:
            self._refuse(request, refusal)
        else:
            self._keep(request)

    def _room_for(self, request: Request) -> SendingRoom | None:
        """The room that waits for such a request.

        One that was asked before, by an attempt that ended without a word (its language side saw
        our predecessor die), begins with the new attempt, if nothing went over yet.
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
        counts = self._link.counts
        known = [self._rooms.get(request.room), self._early.get(request.room)]
        if any(each is not None and each.nonce == request.nonce for each in known):
            counts.duplicate += 1
        elif request.nonce in self._ended or not request.nonce:
            counts.late += 1
        else:
            return False
        return True

    def _keep(self, request: Request) -> None:
        """For a `send` to come."""
        self._early[request.room] = request
        if len(self._early) > MOST_EARLY:
            oldest = self._early.pop(next(iter(self._early)))
            self._refuse(oldest, f"{MOST_EARLY} newer requests wait for their send()")

    def _refuse(self, request: Request, reason: str) -> None:
        self._ended.put(request.nonce, True)
        self._link.send(Failed(self._link.origin, request.room, request.nonce, reason))

    def _on_failed(self, failed: Failed) -> None:
        room = self._rooms.get(failed.room)
        early = self._early.get(failed.room)
        if room is not None and room.nonce in (failed.nonce, 0) and not self._is_past(failed):
            room.nonce = failed.nonce  # so that what comes late of this attempt is known as such
            room.fail_by_peer(failed.reason)
        elif early is not None and early.nonce == failed.nonce:
            del self._early[failed.room]
            self._give_up(failed)
        elif room is None and early is None and not self._is_past(failed):
            self._give_up(failed)
        else:
            self._link.counts.late += 1

    def _is_past(self, failed: Failed) -> bool:
        return failed.nonce in self._ended

    def _give_up(self, failed: Failed) -> None:
        self._ended.put(failed.nonce, True)
        self._given_up.put(failed.room, failed.reason)


class Sender(RoomFace[SendingRoom]):
    """One payload on its way."""

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the other side has everything.

        Raises `TransferError` with the reason when the room failed, `PeerDiedError` when the other
        side died, and `PoolTimeoutError` after `timeout` seconds: the room is open still, wait
        again or abort it.
        """
        self._wait(timeout)
