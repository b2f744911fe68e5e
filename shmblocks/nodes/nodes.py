"""`Nodes`: the launcher's list of nodes, asked by the pool that a handle is of, or by key.

By handle: a node says in the handshake which pools it serves. What was learned is kept: a pool's
number is never used again, so that it is either right, or nobody's any more. A handle of a pool
that nobody has told of makes all nodes be asked, at the same time, before the fetch's deadline.

By key: the entry of this node; else the one of the key's owner, which becomes an entry of this
node; else a miss. The owner is computed from the list (`owners.py`), so that one node is asked,
whatever their number. One process of this node asks for a key at a time: it claims the key, as an
encoder does, and the others wait for the end of its claim.

What it does not do: find nodes by itself, watch them, or prefer one.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import math
import ssl
from collections.abc import Iterable
from typing import NamedTuple

from shmblocks._os.wait import deadline_of, seconds_left
from shmblocks._state.cache_state import ClaimAnswer
from shmblocks._state.key_index import stored_key
from shmblocks.errors import (
    AuthenticationError,
    ForeignHandleError,
    IncompatibleConfigError,
    IncompatiblePoolError,
    KeyExistsError,
    MalformedHandleError,
    PeerDiedError,
    PoolTimeoutError,
    ShmBlocksError,
)
from shmblocks.handle import BlockHandle
from shmblocks.lease import Lease
from shmblocks.nodes.address import Address, address_text, checked_address
from shmblocks.nodes.owners import Owners
from shmblocks.nodes.remote import DEFAULT_TIMEOUT, RemotePool
from shmblocks.pool import BlockPool

# Seconds that a key may take, if nothing else is said. Shorter: a large entry over a slow network
# is encoded again. Longer: an owner that stands still holds up whoever asks it first.
KEY_TIMEOUT = 5.0
# Seconds that an owner that failed is not asked. Shorter: one that stands still costs more often.
# Longer: after a restart its keys are misses for longer.
PAUSE = 10.0
# What goes wrong with an owner, and not with the own pool.
_OWNERS = (
    AuthenticationError,
    ForeignHandleError,
    IncompatibleConfigError,
    IncompatiblePoolError,
    MalformedHandleError,
    PeerDiedError,
    PoolTimeoutError,
)
# Nodes that are asked at the same time which pools they serve.
_ASKED_AT_ONCE = 32

_log = logging.getLogger("shmblocks")


class _Answer(NamedTuple):
    """What asking one node gave: its pools, or why there is no answer."""

    node: RemotePool
    pool_ids: frozenset[int]
    problem: ShmBlocksError | None


class Nodes:
    """Other nodes' pools, to fetch from into a pool of this node.

    Owns a `RemotePool` for each node. Close it before the pool that it fetches into.
    """

    def __init__(
        self,
        pool: BlockPool,
        addresses: Iterable[Address | str],
        *,
        key: bytes | None = None,
        connections: int = 2,
        tls: ssl.SSLContext | None = None,
        patience: float = 3.0,
        checksum: bool = False,
        host: BlockPool | None = None,
        engine: str = "tcp",
    ) -> None:
        """Connects to nobody yet; the arguments are those of `RemotePool`, `connections` per node.

        Each address is (host, port) or "host:port". The own node may be in the list, and must be
        for keys: all nodes have the same list, in whatever order, written alike.
        """
        self._pool = pool
        self._nodes = tuple(
            RemotePool(
                pool,
                address,
                key=key,
                connections=connections,
                tls=tls,
                patience=patience,
                checksum=checksum,
                host=host,
                engine=engine,
            )
            for address in dict.fromkeys(map(checked_address, addresses))
        )
        self._owners = Owners([node.address for node in self._nodes])
        self._by_pool: dict[int, RemotePool] = {}

    @property
    def nodes(self) -> tuple[RemotePool, ...]:
        """One reader per node, in the order of the addresses."""
        return self._nodes

    def close(self) -> None:
        """Close all of them. Idempotent."""
        for node in self._nodes:
            node.close()

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Nodes({', '.join(address_text(node.address) for node in self._nodes)})"

    # ---- fetching ----------------------------------------------------------------------------

    def fetch(
        self,
        handle: BlockHandle,
        *,
        readers: int = 1,
        timeout: float | None = DEFAULT_TIMEOUT,
        req_id: str | None = None,
    ) -> BlockHandle:
        """`RemotePool.fetch` from the node that serves the handle's pool.

        A handle of the own pool is given back unchanged: nothing crosses, and its readers are those
        that its `publish` announced.
        """
        if self._is_own(handle):
            return handle
        deadline = deadline_of(timeout)
        node = self.node_of(handle, timeout)
        left = _left(deadline)
        return node.fetch(handle, readers=readers, timeout=left, req_id=req_id)

    async def fetch_async(
        self,
        handle: BlockHandle,
        *,
        readers: int = 1,
        timeout: float | None = DEFAULT_TIMEOUT,
        req_id: str | None = None,
    ) -> BlockHandle:
        """`fetch` for asyncio."""
        if self._is_own(handle):
            return handle
        deadline = deadline_of(timeout)
        node = self._by_pool.get(handle.pool_id)
        if node is None:
            node = await asyncio.to_thread(self.node_of, handle, timeout)
        left = _left(deadline)
        return await node.fetch_async(handle, readers=readers, timeout=left, req_id=req_id)

    def fetch_into(
        self,
        handle: BlockHandle,
        landing: BlockHandle,
        *,
        first_token: int = 0,
        num_tokens: int | None = None,
        offset: int = 0,
        keep_claim: bool = False,
        timeout: float | None = DEFAULT_TIMEOUT,
    ) -> None:
        """`RemotePool.fetch_into` from the node that serves the handle's pool."""
        deadline = deadline_of(timeout)
        node = self.node_of(handle, timeout)
        node.fetch_into(
            handle,
            landing,
            first_token=first_token,
            num_tokens=num_tokens,
            offset=offset,
            keep_claim=keep_claim,
            timeout=_left(deadline),
        )

    # ---- by key ------------------------------------------------------------------------------

    def owner_of(self, key: bytes) -> Address:
        """The address of the node that owns a key: where it is to be encoded, so that all find it.

        Raises ValueError when the list is empty.
        """
        stored_key(key)  # TypeError, ValueError: not a key
        if not self._nodes:
            raise ValueError("addresses: the list of nodes is empty, so that no key has an owner")
        return self._nodes[self._owners.owner_of(key)].address

    def node_to_ask(self, key: bytes) -> RemotePool | None:
        """A key's owner, if it is another node, and has not failed in the last seconds.

        For those who ask it themselves (`RemotePool.fetch_key`), under a claim on the key.
        """
        if not self._nodes:
            return None
        node = self._nodes[self._owners.owner_of(key)]
        return None if node.is_own or node.seconds_since_failure < PAUSE else node

    def get(
        self,
        key: bytes,
        *,
        num_tokens: int | None = None,
        timeout: float | None = KEY_TIMEOUT,
        req_id: str | None = None,
    ) -> Lease | None:
        """A lease on the entry of a key: of the own pool's, or fetched into it from its owner.

        None: a miss. `num_tokens`: an entry of another length is one, too. While another process of
        this node fetches or encodes the key, this waits for it; what is not here within `timeout`
        seconds (None: for ever) is a miss.

        An owner that cannot be asked makes a miss as well: it is logged, and not asked again for
        some seconds, so that a dead node costs its share of the hits and no time. Raises only what
        the own pool does.
        """
        deadline = deadline_of(timeout)
        while True:
            found, answer = self._here(key, num_tokens)
            if found is not None or answer is None:
                return found
            if answer.state == "mine":
                try:
                    return self.fetch_key(
                        key, num_tokens=num_tokens, timeout=_left(deadline), req_id=req_id
                    )
                finally:
                    self._pool.end_claim(key, answer)
            if seconds_left(deadline) <= 0:
                return None
            self._pool.wait_for_claim(answer, seconds_left(deadline))

    async def get_async(
        self,
        key: bytes,
        *,
        num_tokens: int | None = None,
        timeout: float | None = KEY_TIMEOUT,
        req_id: str | None = None,
    ) -> Lease | None:
        """`get` for asyncio. Cancelled, it gives its claim back."""
        deadline = deadline_of(timeout)
        while True:
            found, answer = self._here(key, num_tokens)
            if found is not None or answer is None:
                return found
            if answer.state == "mine":
                try:
                    return await self.fetch_key_async(
                        key, num_tokens=num_tokens, timeout=_left(deadline), req_id=req_id
                    )
                finally:
                    self._pool.end_claim(key, answer)
            if seconds_left(deadline) <= 0:
                return None
            await self._pool.wait_for_claim_async(answer, seconds_left(deadline))

    def fetch_key(
        self,
        key: bytes,
        *,
        num_tokens: int | None = None,
        timeout: float | None = KEY_TIMEOUT,
        req_id: str | None = None,
    ) -> Lease | None:
        """The part of `get` behind a claim: ask the owner, and enter what it has.

        For a process that has claimed the key, or does without: its claim ends when this gives a
        lease, and stays when it gives None, so that the key can be encoded under it.
        """
        node = self.node_to_ask(key)
        if node is None:
            return None
        try:
            return node.fetch_key(key, num_tokens=num_tokens, timeout=timeout, req_id=req_id)
        except KeyExistsError:
            return _only(self._pool.get(key, num_tokens=num_tokens))
        except _OWNERS as error:
            _log_failure(error)
            return None

    async def fetch_key_async(
        self,
        key: bytes,
        *,
        num_tokens: int | None = None,
        timeout: float | None = KEY_TIMEOUT,
        req_id: str | None = None,
    ) -> Lease | None:
        """`fetch_key` for asyncio."""
        node = self.node_to_ask(key)
        if node is None:
            return None
        try:
            return await node.fetch_key_async(
                key, num_tokens=num_tokens, timeout=timeout, req_id=req_id
            )
        except KeyExistsError:
            return _only(self._pool.get(key, num_tokens=num_tokens))
        except _OWNERS as error:
            _log_failure(error)
            return None

    def _here(self, key: bytes, num_tokens: int | None) -> tuple[Lease | None, ClaimAnswer | None]:
        """The own entry, or what came of claiming the key; neither: nothing can come of waiting."""
        found = _only(self._pool.get(key, num_tokens=num_tokens))
        if found is not None:
            return found, None
        answer = self._pool.claim(key)
        if answer.state != "ready":
            return None, answer
        # It came between the two, or is of another length, or a stream has not completed it.
        return _only(self._pool.get(key, num_tokens=num_tokens)), None

    # ---- whose it is -------------------------------------------------------------------------

    def _is_own(self, handle: BlockHandle) -> bool:
        if not isinstance(handle, BlockHandle):
            raise TypeError(f"handle: expected BlockHandle, got {type(handle).__name__}")
        return handle.pool_id == self._pool.pool_id

    def node_of(self, handle: BlockHandle, timeout: float | None = DEFAULT_TIMEOUT) -> RemotePool:
        """The node that serves the handle's pool; asks all of them when nobody has told yet.

        Raises `ForeignHandleError` when all have answered and none does; `PeerDiedError` or
        `PoolTimeoutError` when one that did not answer may be the one.
        """
        known = self._by_pool.get(handle.pool_id)
        if known is not None:
            return known
        answers = self._ask_all(deadline_of(timeout))
        for node, pool_ids, _ in answers:
            self._by_pool.update(dict.fromkeys(pool_ids, node))
        found = self._by_pool.get(handle.pool_id)
        if found is None:
            raise _nobodys(handle, answers)
        return found

    def _ask_all(self, deadline: float | None) -> list[_Answer]:
        if not self._nodes:
            return []
        at_once = min(len(self._nodes), _ASKED_AT_ONCE)
        with concurrent.futures.ThreadPoolExecutor(at_once, "shmblocks-asking") as threads:
            return list(threads.map(lambda node: _ask(node, deadline), self._nodes))


def _ask(node: RemotePool, deadline: float | None) -> _Answer:
    try:
        pools = node.served_pools(_left(deadline))
    except ShmBlocksError as error:
        return _Answer(node, frozenset(), error)
    return _Answer(node, frozenset(pool.pool_id for pool in pools), None)


def _nobodys(handle: BlockHandle, answers: list[_Answer]) -> ShmBlocksError:
    silent = [answer for answer in answers if answer.problem is not None]
    if not silent:
        return ForeignHandleError(
            f"{handle}: none of the {len(answers)} nodes serves the pool {handle.pool_id:#x}: its "
            "node is not in the list, or the pool was created anew since"
        )
    late = all(isinstance(answer.problem, PoolTimeoutError) for answer in silent)
    kind = PoolTimeoutError if late else PeerDiedError
    reasons = "; ".join(str(answer.problem) for answer in silent[:4])
    return kind(
        f"{handle}: no node that answers serves the pool {handle.pool_id:#x}, and {len(silent)} of "
        f"{len(answers)} do not answer: {reasons}"
    )


def _log_failure(error: ShmBlocksError) -> None:
    _log.warning("%s (a miss; a node that fails is asked again after %g s)", str(error), PAUSE)


def _only(leases: list[Lease] | None) -> Lease | None:
    return leases[0] if leases else None


def _left(deadline: float | None) -> float | None:
    left = seconds_left(deadline)
    return None if left == math.inf else max(left, 0.0)
