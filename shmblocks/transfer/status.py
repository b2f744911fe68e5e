"""The statuses of a room: one table, and one function that moves along it.

    Bootstrapping     language: no landing blocks yet, nothing asked for
                      embedding: the other side has not asked yet
    WaitingForInput   language: asked, nothing received
                      embedding: was asked, nothing sent (push: waits for blocks)
    Transferring      a first chunk went over, more of the room's messages are to come
    Success           everything went over, and both sides know
    Failed            aborted, gone wrong, or the other side died

The names are the original's. What this file does not do: say what a room does in a status.
"""

from __future__ import annotations

import enum

from shmblocks.errors import InvalidStateError


class Status(str, enum.Enum):
    """Where a room stands."""

    Bootstrapping = "Bootstrapping"
    WaitingForInput = "WaitingForInput"
    Transferring = "Transferring"
    Success = "Success"
    Failed = "Failed"

    __str__ = str.__str__

    @property
    def is_final(self) -> bool:
        """Whether the room has ended."""
        return not TABLE[self]


TABLE: dict[Status, frozenset[Status]] = {
    Status.Bootstrapping: frozenset({Status.WaitingForInput, Status.Failed}),
    Status.WaitingForInput: frozenset({Status.Transferring, Status.Failed}),
    Status.Transferring: frozenset({Status.Transferring, Status.Success, Status.Failed}),
    Status.Success: frozenset(),
    Status.Failed: frozenset(),
}


def move(status: Status, to: Status) -> Status:
    """`to`, when a room that stands at `status` may go there; else `InvalidStateError`."""
    if to not in TABLE[status]:
        allowed = ", ".join(sorted(TABLE[status])) or "nothing: it has ended"
        raise InvalidStateError(f"a room at {status} cannot go to {to} (allowed: {allowed})")
    return to
