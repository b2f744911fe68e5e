"""Items of other nodes, fetched in the background of the scheduler's process, never in a hook.

    the scheduler's thread                       the thread of `Fetches`
    begin         another node owns the key      claim the key: nobody else here asks or encodes
    is_under_way  the request is held            fetch it into the pool of this node
                                                 end the claim
    the entry is there, and a hit; or it is not, and is encoded here

Contract
- Of the methods for the scheduler none but `close` waits, and none takes the pool's lock.
- A fetch ends within `timeout` seconds, whatever its owner does. When an owner fails, all fetches
  from it end with that, and it is not asked for some seconds (`Nodes.node_to_ask`).
- What was fetched is an entry as any other. One that contradicts itself is dropped.

What it does not do: give other nodes what was encoded here. `shmblocks serve` does, when they ask.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque

from shmblocks.cache import TensorCache
from shmblocks.errors import KeyExistsError, ShmBlocksError
from shmblocks.nodes import Nodes, RemotePool
from shmblocks.vllm.tally import Tally

# Seconds that an item is not evicted after it was fetched. Shorter: a request that is held by a
# long step finds it evicted, and fails if it has no media. Longer: room that others need.
HOLD = 5.0

_log = logging.getLogger("vllm.ec.shmblocks")


class Fetches:
    """Fetches of one scheduler. Owns the nodes, and borrows the cache that they fetch into."""

    def __init__(self, cache: TensorCache, nodes: Nodes, *, timeout: float) -> None:
        """Starts the thread. `timeout`: seconds that one fetch may take."""
        self._cache = cache
        self._pool = cache.pool
        self._nodes = nodes
        self._timeout = timeout
        # Keys; the scheduler adds them, and the thread takes them out.
        self._under_way: set[bytes] = set()
        self._counts: deque[tuple[str, float]] = deque()
        self._is_closed = False
        # Of the thread alone.
        self._tasks: dict[asyncio.Task[None], RemotePool] = {}
        self._end = asyncio.Event()
        self._loop = asyncio.new_event_loop()
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
            self._loop.call_soon_threadsafe(self._start, key, node)

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
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()
        self._nodes.close()

    # ---- in the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._work())
        finally:
            self._loop.close()

    async def _work(self) -> None:
        await self._end.wait()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, key: bytes, node: RemotePool) -> None:
        task = self._loop.create_task(self._fetch(key, node))
        self._tasks[task] = node
        task.add_done_callback(self._tasks.pop)

    async def _fetch(self, key: bytes, node: RemotePool) -> None:
        failed = True
        try:
            claim = self._pool.claim(key)
            if claim.state == "mine":
                try:
                    await self._bring(key, node)
                finally:
                    self._pool.end_claim(key, claim)
            # Else it is here, or another instance is at it: the scheduler sees that by itself.
            failed = False
        except ShmBlocksError as error:
            _log.warning("an item is not fetched: %s", str(error))  # its frames hold memory
            self._end_with(node, key)
        except Exception:  # noqa: BLE001  nobody else would tell of it
            _log.exception("an item is not fetched")
        finally:
            if failed:
                self._count("fetch_failures")
            # Last: a scheduler that does not see it under way any more sees what came of it.
            self._under_way.discard(key)

    async def _bring(self, key: bytes, node: RemotePool) -> None:
        """Enter what the owner has into the own pool; nothing, if it has nothing."""
        began = time.monotonic()
        try:
            lease = await node.fetch_key_async(key, timeout=self._timeout)
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

    def _end_with(self, failed: RemotePool, key: bytes) -> None:
        """When a node has failed, no other fetch waits for it until its own deadline."""
        if self._nodes.node_to_ask(key) is failed:
            return  # that fetch has failed, and not the node
        for task, node in self._tasks.items():
            if node is failed and task is not asyncio.current_task():
                task.cancel()

    def _count(self, name: str, amount: float = 1) -> None:
        self._counts.append((name, amount))
