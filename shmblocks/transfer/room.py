"""What both ends of a room have in common: its status, how it ends, what it can say of itself.

A room is driven by its endpoint, under the endpoint's lock: messages come in by the `on_...`
methods of the two kinds of room, and `advance` does what can be done without a message. When it
ends, in whatever way, it holds nothing but what its user was given.

What it does not do: receive, wait, lock.
"""

from __future__ import annotations

import abc
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from shmblocks.errors import PeerDiedError, ShmBlocksError, StaleHandleError, TransferError
from shmblocks.transfer.messages import Failed, short_reason
from shmblocks.transfer.status import Status, move

if TYPE_CHECKING:
    from shmblocks.handle import BlockHandle
    from shmblocks.transfer.link import Link, Loss

# Seconds that a message may take after what its sender did to the pool. Smaller: a room fails
# without the other side's reason. Larger: a side that says nothing at all is waited for so long.
REASON_PATIENCE = 1.0


class Room(abc.ABC):
    """One end of one transfer. `nonce` 0: not known yet."""

    def __init__(self, link: Link, room: int, nonce: int) -> None:
        self.link = link
        self.room = room
        self.nonce = nonce
        self.status = Status.Bootstrapping
        self.rounds = 0  # chunks that went over
        self.tokens = 0  # tokens that went over
        self.num_bytes = 0  # bytes that went over
        self.opened = time.monotonic()
        self.failure: str | None = None
        self.reason = ""  # the failure without what is said of the room
        self.error: type[ShmBlocksError] = TransferError
        self.told_by_peer = False  # the failure's reason came from the other side
        # When, and by which error, the other side's blocks were found to be freed.
        self.withdrawn: tuple[float, StaleHandleError] | None = None

    @property
    def is_over(self) -> bool:
        """Whether the room has ended."""
        return self.status.is_final

    def safely(self, step: Callable[[], None]) -> None:
        """Do a step; what the pool, torch or the memory refuses becomes the room's failure."""
        try:
            step()
        except (ShmBlocksError, RuntimeError, MemoryError) as error:
            self.fail_by(error)

    @abc.abstractmethod
    def advance(self) -> None:
        """Do what can be done now, without blocking."""

    @abc.abstractmethod
    def give_back(self) -> None:
        """Give back everything that the room holds."""

    @abc.abstractmethod
    def waits_for(self) -> str:
        """What has to happen next and who has to do it: ends up in errors."""

    @property
    @abc.abstractmethod
    def blocks_wanted(self) -> int:
        """Blocks that the room waits for; 0 when it waits for a message."""

    # ---- endings -----------------------------------------------------------------------------

    def move(self, to: Status) -> None:
        """Go to another status."""
        self.status = move(self.status, to)

    def fail(self, reason: str, error: type[ShmBlocksError] = TransferError) -> None:
        """End as Failed and tell the other side why, if it has asked already."""
        if self._end(reason, error) and self.nonce:
            told = short_reason(reason)
            self.link.send(Failed(self.link.origin, self.room, self.nonce, told))

    def fail_by(self, error: Exception) -> None:
        """End as Failed because of an exception."""
        if isinstance(error, TransferError):
            self.fail(str(error))
        elif isinstance(error, PeerDiedError):
            self.fail(str(error), PeerDiedError)
        else:
            self.fail(f"{type(error).__name__}: {error}")

    def fail_by_peer(self, reason: str) -> None:
        """End as Failed because the other side said so."""
        self.told_by_peer = True
        self._end(f"{self.link.peer_name} ended it: {reason}", TransferError)

    def fail_by_loss(self, loss: Loss) -> None:
        """End as Failed because the other side is gone."""
        self._end(f"{loss.reason}; {self.waits_for()}", loss.error)

    def wait_for_reason(self, error: StaleHandleError) -> None:
        """The other side has freed what it offered: it gave up, or died.

        Its message with the reason, or the news of its death, is on the way, and says more than we
        could. So this fails only when it is called again after REASON_PATIENCE.
        """
        now = time.monotonic()
        self.withdrawn = self.withdrawn or (now, error)
        if now - self.withdrawn[0] >= REASON_PATIENCE:
            raise TransferError(f"the other side freed its blocks and did not say why ({error})")

    def _end(self, reason: str, error: type[ShmBlocksError]) -> bool:
        if self.is_over:
            return False
        self.reason = reason
        self.failure = f"room {self.room} failed at {self.status}: {reason}"
        self.error = error
        self.move(Status.Failed)
        self.give_back()
        return True


def blocks_text(handle: BlockHandle) -> str:
    """The blocks of a handle, for errors."""
    return f"blocks {handle.start_block} to {handle.start_block + handle.num_blocks - 1}"
