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
import operator
from typing import NamedTuple, Protocol

from shmblocks.errors import (
    ForeignHandleError,
    IncompatibleConfigError,
    InvalidStateError,
    ShmBlocksError,
)
from shmblocks.handle import BlockHandle
from shmblocks.nodes.attempt import Attempt
from shmblocks.nodes.messages import (
    Absent,
    Commit,
    Done,
    Fetch,
    Find,
    Found,
    Granted,
    Ping,
    Read,
    Refused,
    Sent,
    ServedPool,
    Taken,
    describe_layout,
    error_of,
    layout_of,
)
from shmblocks.nodes.nixl_reads import NixlReads
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


class Lands(HasMemory, Protocol):
    """Blocks in host memory, to be written: a reservation, or a writer's lease on one."""

    @property
    def handle(self) -> BlockHandle: ...


class Conversation:
    """The questions of one reader to one node; borrows the reader's pool."""

    def __init__(
        self, pool: BlockPool, peer: str, checksum: bool, nixl: NixlReads | None = None
    ) -> None:
        """`peer` names the node in messages; `checksum`: compare that of all rows; `nixl`: rows
        come by it, and not over the connection; borrowed."""
        self._nixl = nixl
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
        landing: Lands,
        part: Part,
    ) -> ShmBlocksError | None:
        """Everything up to `Sent`; the error of a refusal, after which the connection is fine."""
        attempt.rid = next(self._rids)
        if self._nixl is not None:
            return self._read(attempt, stream, landing, part, self._nixl)
        deadline, checked, rid = attempt.deadline, self._checksum, attempt.rid
        encoded = part.handle.encode()
        attempt.waits_for = "an answer"
        stream.send(Fetch(rid, encoded, part.first_token, part.num_tokens, checked), deadline)
        taken = stream.receive(deadline, Taken, Refused)
        if (refusal := self._refusal(attempt, part, taken)) or isinstance(taken, Refused):
            return refusal
        attempt.waits_for = "its rows"
        checksum = Checksum(encoded, part.first_token, part.num_tokens, taken.aux)
        for rows in rows_of(self._pool.config, landing, part.offset, part.num_tokens):
            for some in sliced(rows) if checked else (rows,):
                stream.receive_into(some, deadline)
                if checked:
                    checksum.add(some)
        self._receive_sent(attempt, stream, checksum)
        landing.memory(AUX)[:] = taken.aux
        return None

    def _read(
        self, attempt: Attempt, stream: Stream, landing: Lands, part: Part, nixl: NixlReads
    ) -> ShmBlocksError | None:
        """The same with an agent that reads the rows (`nixl_reads.py`)."""
        nixl.prepare(attempt, stream)
        encoded = part.handle.encode()
        attempt.waits_for = "an answer"
        question = Read(attempt.rid, encoded, part.first_token, part.num_tokens)
        stream.send(question, attempt.deadline)
        granted = stream.receive(attempt.deadline, Granted, Refused)
        if (refusal := self._refusal(attempt, part, granted)) or isinstance(granted, Refused):
            return refusal
        nixl.read(attempt, stream, granted, landing.handle, part.offset, part.num_tokens)
        attempt.waits_for = "word that its lease was still open"
        stream.send(Commit(attempt.rid, self._checksum), attempt.deadline)
        checksum = Checksum(encoded, part.first_token, part.num_tokens, granted.aux)
        if self._checksum:
            for rows in rows_of(self._pool.config, landing, part.offset, part.num_tokens):
                checksum.add(rows)
        self._receive_sent(attempt, stream, checksum)
        landing.memory(AUX)[:] = granted.aux
        return None

    def _refusal(
        self, attempt: Attempt, part: Part, answer: Taken | Granted | Refused
    ) -> ShmBlocksError | None:
        """The error of a refusal; None: it has what was asked for."""
        _require_answer(attempt.rid, answer.rid)
        if isinstance(answer, Refused):
            return error_of(answer, f"{part.handle}: node {self._peer}")
        if answer.num_tokens != part.handle.num_tokens:
            raise ConnectionLostError(
                f"it has {answer.num_tokens} tokens under a handle of {part.handle.num_tokens}"
            )
        return None

    def _receive_sent(self, attempt: Attempt, stream: Stream, checksum: Checksum) -> None:
        """The server's word that all of it was whole."""
        sent = stream.receive(attempt.deadline, Sent)
        _require_answer(attempt.rid, sent.rid)
        if self._checksum and sent.checksum != checksum.value:
            raise ConnectionLostError("the rows were changed on their way (their checksum says so)")

    def done(self, attempt: Attempt, stream: Stream, keep_claim: bool) -> None:
        """Everything is here."""
        stream.send(Done(attempt.rid, keep_claim), attempt.deadline)


def _require_answer(asked: int, answered: int) -> None:
    if answered != asked:
        raise ConnectionLostError("it answered something that was not asked")


def require_foreign(handle: BlockHandle, pool: BlockPool) -> None:
    """Raises unless it is a handle that can be fetched into that pool."""
    if not isinstance(handle, BlockHandle):
        raise TypeError(f"handle: expected BlockHandle, got {type(handle).__name__}")
    if handle.is_fake:
        raise InvalidStateError(f"{handle}: a fake handle names no blocks to fetch")
    if handle.pool_id == pool.pool_id:
        raise ForeignHandleError(
            f"{handle}: it is of this node's own pool {pool.name}: open it there"
        )


def require_part(what: str, first: int, count: int, handle: BlockHandle) -> None:
    """Raises ValueError unless these tokens are a part of the handle's."""
    first, count = operator.index(first), operator.index(count)
    if first < 0 or count < 1 or first + count > handle.num_tokens:
        raise ValueError(
            f"{what}: expected a part of the {handle.num_tokens} tokens of {handle}, got {count} "
            f"tokens from token {first} on"
        )
