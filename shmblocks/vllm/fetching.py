"""Items of other nodes, fetched in the background of the scheduler's process, never in a hook.

    the scheduler's thread                       a thread of `Fetches`
    begin         another node owns the key      claim the key: nobody else here asks or encodes
    is_under_way  the request is held            fetch it into the pool of this node
                                                 end the claim
    the entry is there, and a hit; or it is not, and is encoded here

Contract
- Of the methods for the scheduler none but `close` waits, takes the pool's lock, or lets go of the
  interpreter's: what has begun goes on when the hook has returned.
- A fetch ends within `timeout` seconds from its `begin`, whatever its owner does. What stands in
  line for an owner that fails ends with that, and the owner is not asked for some seconds
  (`Nodes.node_to_ask`).
- What was fetched is an entry as any other. One that contradicts itself is dropped.

What it does not do: give other nodes what was encoded here. `shmblocks serve` does, when they ask.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from shmblocks.cache import TensorCache
from shmblocks.errors import KeyExistsError, PeerDiedError, ShmBlocksError
from shmblocks.nodes import Nodes, RemotePool
from shmblocks.vllm.tally import Tally

# Fetches from one node at a time; each has a thread and a connection. Fewer: one that is large
# holds up the others. More: threads that take the interpreter from the scheduler.
CONNECTIONS = 2
# Seconds that an item is not evicted after it was fetched. Shorter: a request that is held by a
# long step finds it evicted, and fails if it has no media. Longer: room that others need.
HOLD = 5.0

_log = logging.getLogger("vllm.ec.shmblocks")


class _Wanted(NamedTuple):
    """A key, the node to ask, and until when, monotonic."""

    key: bytes
    node: RemotePool
    deadline: float


class Fetches:
    """Fetches of one scheduler. Owns the nodes, and borrows the cache that they fetch into."""

    def __init__(self, cache: TensorCache, nodes: Nodes, *, timeout: float) -> None:
        """Starts a thread. `timeout`: seconds that one fetch may take."""
        self._cache = cache
        self._pool = cache.pool
        self._nodes = nodes
        self._timeout = timeout
        # Keys; the scheduler adds them, and the threads take them out.
        self._under_way: set[bytes] = set()
        self._counts: deque[tuple[str, float]] = deque()
        self._is_closed = False
        # None: the end. To wake a thread by a loop of asyncio, or to start one, would let go of the
        # interpreter's lock in the middle of a hook, which then waits for that thread's work.
        self._wanted: queue.SimpleQueue[_Wanted | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="shmblocks-vllm-nodes", daemon=True)
        self._thread.start()

    # ---- for the scheduler ---------------------------------------------------------------------

    def begin(self, key: bytes) -> None:
        """Fetch a key from its owner, if that is another node which has not failed just now."""
        if self._is_closed or key in self._under_way:
            return
        node = self._nodes.node_to_ask(key)
        if node is not None:
            self._under_way.add(key)
            self._wanted.put(_Wanted(key, node, time.monotonic() + self._timeout))

    def is_under_way(self, key: bytes) -> bool:
        """Whether it is worth while to wait for a key."""
        return key in self._under_way

    def count_in(self, tally: Tally) -> None:
        """Add what was counted since the last call."""
        while self._counts:
            tally.add(*self._counts.popleft())

    def close(self) -> None:
        """End all fetches, and give back what they hold. Idempotent; before the pool is closed."""
        if self._is_closed:
            return
        self._is_closed = True
        self._nodes.close()  # ends those that are under way
        self._wanted.put(None)
        self._thread.join()

    # ---- in the threads ------------------------------------------------------------------------

    def _run(self) -> None:
        """Hand each key to the threads of its node: one that stands still holds up no other."""
        threads: dict[RemotePool, ThreadPoolExecutor] = {}
        try:
            for wanted in iter(self._wanted.get, None):
                if wanted.node not in threads:
                    threads[wanted.node] = ThreadPoolExecutor(CONNECTIONS, self._thread.name)
                threads[wanted.node].submit(self._fetch, wanted)
        finally:
            for each in threads.values():
                each.shutdown(cancel_futures=True)

    def _fetch(self, wanted: _Wanted) -> None:
        key = wanted.key
        failed = True
        try:
            claim = self._pool.claim(key)
            if claim.state == "mine":
                try:
                    self._bring(wanted)
                finally:
                    self._pool.end_claim(key, claim)
            # Else it is here, or another instance is at it: the scheduler sees that by itself.
            failed = False
        except ShmBlocksError as error:
            if not self._is_closed:
                _log.warning("an item is not fetched: %s", str(error))  # its frames hold memory
        except Exception:  # noqa: BLE001  nobody else would tell of it
            _log.exception("an item is not fetched")
        finally:
            if failed:
                self._count("fetch_failures")
            # Last: a scheduler that does not see it under way any more sees what came of it.
            self._under_way.discard(key)

    def _bring(self, wanted: _Wanted) -> None:
        """Enter what the owner has into the own pool; nothing, if it has nothing."""
        key, node, deadline = wanted
        began = time.monotonic()
        if self._nodes.node_to_ask(key) is None and not node.is_own:
            raise PeerDiedError(f"key {key.hex()}: its node has failed while it stood in line")
        try:
            lease = node.fetch_key(key, timeout=max(deadline - began, 0.0))
        except KeyExistsError:
            return  # somebody has encoded it here meanwhile
        if lease is None:
            self._count("fetch_misses")
            return
        try:
            # Raises when the entry contradicts itself, and releases the lease.
            found = self._cache.as_expected(lease, None, None)
        except ShmBlocksError:
            self._pool.drop(key)
            raise
        if found is not None:
            with found:
                self._pool.touch(key, hold=HOLD)
        self._count("fetches")
        self._count("fetch_bytes", lease.handle.num_tokens * self._pool.config.token_bytes)
        self._count("fetch_seconds", time.monotonic() - began)

    def _count(self, name: str, amount: float = 1) -> None:
        self._counts.append((name, amount))
