"""What users hold of a room: status, wait, abort. The room itself works under its endpoint's
lock."""

from __future__ import annotations

from typing import Generic

from shmblocks.transfer.endpoint import Endpoint, R
from shmblocks.transfer.status import Status


class RoomFace(Generic[R]):
    """Common to `Sender` and `Receiver`. May be used from any thread."""

    def __init__(self, endpoint: Endpoint[R], room: R) -> None:
        self._endpoint = endpoint
        self._room = room

    @property
    def room(self) -> int:
        """The room's number."""
        return self._room.room

    @property
    def status(self) -> Status:
        """Where the room stands; `poll` and `wait` move it."""
        return self._room.status

    @property
    def failure(self) -> str | None:
        """Why it failed; None when it has not."""
        return self._room.failure

    @property
    def rounds(self) -> int:
        """Chunks that went over."""
        return self._room.rounds

    @property
    def num_tokens(self) -> int:
        """Tokens that went over."""
        return self._room.tokens

    @property
    def bytes(self) -> int:
        """Bytes that went over."""
        return self._room.num_bytes

    def poll(self) -> Status:
        """Do what can be done now, for every room of the endpoint, and give this one's status."""
        if not self._room.is_over:
            self._endpoint.poll()
        return self._room.status

    def abort(self, reason: str = "by its user") -> bool:
        """End the room as Failed, give everything back, tell the other side why.

        False when it had ended before. What a room that succeeded holds for a user who has not
        taken it is given back too.
        """
        return self._endpoint._abort(self._room, reason)

    def _wait(self, timeout: float | None) -> None:
        """Return when the room has succeeded; raise its error when it failed."""
        self._endpoint._wait(self._room, timeout)
        if self._room.status is Status.Failed:
            raise self._room.error(self._room.failure)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(room={self.room}, {self.status}, {self.num_tokens} tokens in "
            f"{self.rounds} round(s))"
        )
