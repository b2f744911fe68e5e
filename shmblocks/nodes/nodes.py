"""`Nodes`: the launcher's list of other nodes, asked by the pool that a handle is of.

A node says in the handshake which pools it serves. What was learned is kept: a pool's number is
never used again, so that it is either right, or nobody's any more. A handle of a pool that nobody
has told of makes all nodes be asked, at the same time, before the fetch's deadline.

What it does not do: find nodes by itself, watch them, or prefer one.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import ssl
from collections.abc import Iterable
from types import TracebackType
from typing import NamedTuple

from shmblocks._os.wait import deadline_of, seconds_left
from shmblocks.errors import ForeignHandleError, PeerDiedError, PoolTimeoutError, ShmBlocksError
from shmblocks.handle import BlockHandle
from shmblocks.nodes.address import Address, address_text
from shmblocks.nodes.remote import DEFAULT_TIMEOUT, RemotePool
from shmblocks.pool import BlockPool

# Nodes that are asked at the same time which pools they serve.
_ASKED_AT_ONCE = 32


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
        addresses: Iterable[Address],
        *,
        key: bytes | None = None,
        connections: int = 2,
        tls: ssl.SSLContext | None = None,
        patience: float = 3.0,
    ) -> None:
        """Connects to nobody yet; the arguments are those of `RemotePool`, `connections` per node.

        The own node may be in the list: it is then asked like the others, and has nothing to give.
        """
        self._pool = pool
        self._nodes = tuple(
            RemotePool(pool, address, key=key, connections=connections, tls=tls, patience=patience)
            for address in addresses
        )
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
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


def _left(deadline: float | None) -> float | None:
    left = seconds_left(deadline)
    return None if left == math.inf else max(left, 0.0)
