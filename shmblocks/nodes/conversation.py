"""What a reader says on a connection after the handshake, and how it judges the answers.

Contract
- The caller owns the connection. Whatever raises here but a refusal means that it has no next
  message: the caller drops it.
- Nothing of an answer is believed: numbers of questions, tokens and checksums are compared, and a
  handle is one of a pool that the handshake has named, or none.

What it does not do: reserve, publish, or decide which connection is used.
"""

from __future__ import annotations

import itertools
import logging
from typing import NamedTuple

from shmblocks.errors import ForeignHandleError, IncompatibleConfigError, ShmBlocksError
from shmblocks.handle import BlockHandle
from shmblocks.nodes.attempt import Attempt
from shmblocks.nodes.messages import (
    Absent,
    Done,
    Fetch,
    Find,
    Found,
    Ping,
    Refused,
    Sent,
    ServedPool,
    Taken,
    describe_layout,
    error_of,
    layout_of,
)
from shmblocks.nodes.rows import AUX, Checksum, HasMemory, rows_of, sliced
from shmblocks.nodes.stream import ConnectionLostError, Stream
from shmblocks.pool import BlockPool

_log = logging.getLogger("shmblocks")


class Part(NamedTuple):
    """Tokens `first_token .. first_token + num_tokens - 1` of a handle, and the token of their
    landing that they begin at."""

    handle: BlockHandle
    first_token: int
    num_tokens: int
    offset: int


class Conversation:
    """The questions of one reader to one node; borrows the reader's pool."""

    def __init__(self, pool: BlockPool, peer: str, checksum: bool) -> None:
        """`peer` names the node in messages; `checksum`: compare that of all rows."""
        self._pool = pool
        self._peer = peer
        self._checksum = checksum
        self._layout = layout_of(pool.config)
        self._rids = itertools.count(1)
        self._epochs_told = (0, 0)
        # What the last handshake said.
        self.served: dict[int, ServedPool] = {}

    def ping(self, attempt: Attempt, stream: Stream) -> None:
        """One round trip."""
        attempt.waits_for = "an answer"
        question = Ping(next(self._rids))
        stream.send(question, attempt.deadline)
        _require_answer(question.rid, stream.receive(attempt.deadline, Ping).rid)

    # ---- by key ------------------------------------------------------------------------------

    def find(
        self, attempt: Attempt, stream: Stream, key: bytes
    ) -> BlockHandle | ShmBlocksError | None:
        """The handle of the key's entry over there; None: it has none. Or a refusal's error."""
        attempt.waits_for = "an answer"
        epoch, rid = self._pool.epoch, next(self._rids)
        stream.send(Find(rid, key, self._layout, epoch), attempt.deadline)
        answer = stream.receive(attempt.deadline, Found, Absent, Refused)
        _require_answer(rid, answer.rid)
        if isinstance(answer, Refused):
            return error_of(answer, f"key {key.hex()}: node {self._peer}")
        if isinstance(answer, Absent):
            self._note_epoch(epoch, answer.epoch)
            return None
        handle = BlockHandle.decode(answer.handle)
        served = self.served.get(handle.pool_id)
        if served is None or served.layout != self._layout or not handle.num_tokens:
            raise ConnectionLostError("it found the key in a pool that it did not name before")
        return None if handle.pool_id == self._pool.pool_id else handle

    def why_no_entry(self) -> ShmBlocksError | None:
        """Why no entry of this node can come into the own pool, if that is so."""
        if any(pool.layout == self._layout for pool in self.served.values()):
            return None
        told = "; ".join(f"{each.name}: {each.description}" for each in self.served.values())
        return IncompatibleConfigError(
            f"node {self._peer}: no pool there has the fields and block size of pool "
            f"{self._pool.name} ({describe_layout(self._pool.config)}), but {told}: create both "
            "alike"
        )

    def _note_epoch(self, ours: int, theirs: int) -> None:
        """A node whose epoch differs has nothing for us: say so, once for each pair."""
        if ours != theirs and self._epochs_told != (ours, theirs):
            self._epochs_told = (ours, theirs)
            _log.warning(
                "node %s: its pool is at epoch %d, pool %s of this node at %d: nothing is fetched "
                "by key until both are the same (`bump_epoch`)",
                self._peer,
                theirs,
                self._pool.name,
                ours,
            )

    # ---- by handle ---------------------------------------------------------------------------

    def why_not(self, handle: BlockHandle) -> ShmBlocksError | None:
        """What the handshake already tells about a handle."""
        pool = self.served.get(handle.pool_id)
        if pool is None:
            names = ", ".join(f"{each.name} ({each.pool_id:#x})" for each in self.served.values())
            return ForeignHandleError(
                f"{handle}: node {self._peer} does not serve the pool {handle.pool_id:#x}, but "
                f"{names or 'none'}: it is another node's, or the pool was created anew since"
            )
        if pool.layout != self._layout:
            return IncompatibleConfigError(
                f"{handle}: pool {pool.name} of node {self._peer} has {pool.description}; pool "
                f"{self._pool.name} of this node has {describe_layout(self._pool.config)}: create "
                "both with the same fields and block size"
            )
        return None

    def fetch(
        self,
        attempt: Attempt,
        stream: Stream,
        landing: HasMemory,
        part: Part,
    ) -> ShmBlocksError | None:
        """Everything up to `Sent`; the error of a refusal, after which the connection is fine."""
        deadline, checked, handle = attempt.deadline, self._checksum, part.handle
        encoded = handle.encode()
        rid = attempt.rid = next(self._rids)
        attempt.waits_for = "an answer"
        stream.send(Fetch(rid, encoded, part.first_token, part.num_tokens, checked), deadline)
        taken = stream.receive(deadline, Taken, Refused)
        _require_answer(rid, taken.rid)
        if isinstance(taken, Refused):
            return error_of(taken, f"{handle}: node {self._peer}")
        if taken.num_tokens != handle.num_tokens:
            raise ConnectionLostError(
                f"it has {taken.num_tokens} tokens under a handle of {handle.num_tokens}"
            )
        attempt.waits_for = "its rows"
        checksum = Checksum(encoded, part.first_token, part.num_tokens, taken.aux)
        for rows in rows_of(self._pool.config, landing, part.offset, part.num_tokens):
            for some in sliced(rows) if checked else (rows,):
                stream.receive_into(some, deadline)
                if checked:
                    checksum.add(some)
        sent = stream.receive(deadline, Sent)
        _require_answer(rid, sent.rid)
        if checked and sent.checksum != checksum.value:
            raise ConnectionLostError("the rows were changed on their way (their checksum says so)")
        landing.memory(AUX)[:] = taken.aux
        return None

    def done(self, attempt: Attempt, stream: Stream, keep_claim: bool) -> None:
        """Everything is here."""
        stream.send(Done(attempt.rid, keep_claim), attempt.deadline)


def _require_answer(asked: int, answered: int) -> None:
    if answered != asked:
        raise ConnectionLostError("it answered something that was not asked")
