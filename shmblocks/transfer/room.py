"""What both ends of a room have in common: the statuses, how a room ends, what it says of itself.

    Bootstrapping     language: no landing blocks yet, nothing asked for
                      embedding: the other side has not asked yet
    WaitingForInput   language: asked, nothing received
                      embedding: was asked, nothing sent (push: waits for blocks)
    Transferring      a first chunk went over, more messages of the room are to come
    Success           everything went over, and both sides know
    Failed            aborted, gone wrong, or the other side died

An endpoint drives its rooms under its own lock: it calls an `on_...` method for each message, and
`advance` for what can be done without one. A room that has ended holds nothing, except for the
result that its user may still take.

What it does not do: receive messages, wait, lock.
"""

from __future__ import annotations

import abc
import enum
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from shmblocks.errors import (
    InvalidStateError,
    PeerDiedError,
    ShmBlocksError,
    StaleHandleError,
    TransferError,
)
from shmblocks.transfer.messages import Failed, SenderId, short_reason

if TYPE_CHECKING:
    from shmblocks.handle import BlockHandle
    from shmblocks.transfer.connection import Connection

# Seconds that a message may take to arrive after its sender has changed the pool. Smaller: a room
# may fail before the other side's reason arrives. Larger: a side that never says why delays the
# failure for so long.
REASON_PATIENCE = 1.0


class Status(str, enum.Enum):
    """The status of a room; the names are the original's."""

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
    """`to`, if a room may go there from `status`; else `InvalidStateError`."""
    if to not in TABLE[status]:
        allowed = ", ".join(sorted(TABLE[status])) or "nothing: it has ended"
        raise InvalidStateError(f"a room at {status} cannot go to {to} (allowed: {allowed})")
    return to


class Room(abc.ABC):
    """One end of one transfer. `nonce` 0: not known yet."""

    def __init__(self, connection: Connection, number: int, nonce: int) -> None:
        self.connection = connection
        self.number = number
        self.nonce = nonce
        self.status = Status.Bootstrapping
        # What went over: chunks, tokens, bytes.
        self.rounds = 0
        self.num_tokens = 0
        self.num_bytes = 0
        self.blocks_wanted = 0  # free blocks that it waits for; 0: it waits for a message
        self.opened_at = time.monotonic()
        self.failure: str | None = None
        self.reason = ""  # the failure without the room's number and status
        self.error: type[ShmBlocksError] = TransferError
        # The error that showed that the other side has freed its blocks, and when it did.
        self.stale: tuple[float, StaleHandleError] | None = None

    @property
    def is_over(self) -> bool:
        """Whether the room has ended."""
        return self.status.is_final

    @property
    def ids(self) -> tuple[SenderId, int, int]:
        """What every message of the room begins with."""
        return self.connection.sender, self.number, self.nonce

    @abc.abstractmethod
    def advance(self) -> None:
        """Do what can be done now, without blocking."""

    @abc.abstractmethod
    def give_back(self) -> None:
        """Give back everything that the room holds."""

    @abc.abstractmethod
    def waits_for(self) -> str:
        """What has to happen next, and who has to do it; part of error messages."""

    def attempt(self, step: Callable[[], None]) -> None:
        """Do a step; an error of the pool, of torch or of the memory fails the room."""
        try:
            step()
        except (TransferError, PeerDiedError) as error:
            self.fail(str(error), type(error))
        except (ShmBlocksError, RuntimeError, MemoryError) as error:
            self.fail(f"{type(error).__name__}: {error}")

    def move(self, to: Status) -> None:
        """Go to another status."""
        self.status = move(self.status, to)

    def fail(
        self, reason: str, error: type[ShmBlocksError] = TransferError, *, tell_peer: bool = True
    ) -> None:
        """End as Failed, unless the room has ended, and tell the other side if it knows the room.

        `error` is what a wait for the room raises.
        """
        if self.is_over:
            return
        self.reason = reason
        self.failure = f"room {self.number} failed at {self.status}: {reason}"
        self.error = error
        self.move(Status.Failed)
        self.give_back()
        if tell_peer and self.nonce:
            self.connection.send(Failed(*self.ids, short_reason(reason)))

    def fail_by_peer(self, failed: Failed) -> None:
        """End as Failed because the other side said so."""
        self.nonce = failed.nonce  # to recognise late messages of this attempt
        peer = self.connection.peer_name
        self.fail(f"{peer} ended it: {failed.reason}", tell_peer=False)

    def wait_for_reason(self, error: StaleHandleError) -> None:
        """The other side has freed the blocks that it offered: it gave up, or died.

        Its message with the reason, or the news of its death, is on the way and says more than
        `error` does. So fail only when this is called again after REASON_PATIENCE.
        """
        now = time.monotonic()
        self.stale = self.stale or (now, error)
        if now - self.stale[0] >= REASON_PATIENCE:
            raise TransferError(f"the other side freed its blocks and did not say why ({error})")


def blocks_text(handle: BlockHandle) -> str:
    """The blocks of a handle, for errors."""
    return f"blocks {handle.start_block} to {handle.start_block + handle.num_blocks - 1}"
