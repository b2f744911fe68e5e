"""What runs in a node of the namespace tests: does what it is told, line by line, in JSON.

["create", patience, engine]          a pool and a server; answers the pool's name
["publish", num_tokens]               answers [handle in hex, sha256 of the rows]
["fetch", address, handle, timeout]   answers ["ok", sha256] or [error's class, text, seconds]
["fill"], ["unchanged"]               fill all blocks with a pattern; whether it is still there
["stats"]                             answers [free blocks, violations, given_back, leases]
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from typing import cast

from shmblocks import BlockHandle, BlockPool, Field, PoolConfig, ShmBlocksError
from shmblocks.lease import Reservation
from shmblocks.nodes import NodeServer, RemotePool

KEY = b"sixteen bytes or more of a secret"
CONFIG = PoolConfig(total_tokens=8192, fields=(Field("x", (4096,), "int8"),), block_size=64)
PORT = 7400
PATTERN = b"\xa5"


class Node:
    """The pool, the server and the readers of this process."""

    def __init__(self, patience: float, engine: str, stack: contextlib.ExitStack) -> None:
        self.pool = stack.enter_context(BlockPool.create("node", CONFIG, prefault="off"))
        self.server = stack.enter_context(
            NodeServer(
                self.pool, ("0.0.0.0", PORT), key=KEY, patience=patience, nixl=engine == "nixl"
            )
        )
        self._engine = engine
        self._patience = patience
        self._stack = stack
        self._remotes: dict[str, RemotePool] = {}
        self._filled: Reservation | None = None

    def publish(self, num_tokens: int) -> list[str]:
        with self.pool.reserve(num_tokens) as reservation:
            memory = reservation.memory("x")
            memory[:] = hashlib.shake_128(str(num_tokens).encode()).digest(len(memory))
            digest = hashlib.sha256(memory).hexdigest()
            return [reservation.publish().encode().hex(), digest]

    def fetch(self, address: str, handle: str, timeout: float) -> list[object]:
        remote = self._remotes.get(address)
        if remote is None:
            remote = self._stack.enter_context(
                RemotePool(
                    self.pool,
                    (address, PORT),
                    key=KEY,
                    patience=self._patience,
                    engine=self._engine,
                )
            )
            self._remotes[address] = remote
        began = time.monotonic()
        try:
            local = remote.fetch(BlockHandle.decode(bytes.fromhex(handle)), timeout=timeout)
        except ShmBlocksError as error:
            return [type(error).__name__, str(error), time.monotonic() - began]
        with self.pool.open(local) as lease:
            return ["ok", hashlib.sha256(lease.memory("x")).hexdigest()]

    def fill(self) -> bool:
        self._filled = self.pool.reserve(CONFIG.total_tokens, timeout=0.0)
        memory = self._filled.memory("x")
        memory[:] = PATTERN * len(memory)
        return True

    def unchanged(self) -> bool:
        assert self._filled is not None
        memory = self._filled.memory("x")
        same = bytes(memory).count(PATTERN) == len(memory)
        self._filled.free()
        return same

    def stats(self) -> list[int]:
        leases = sum(len(info.leases) for info in self.pool.allocations())
        given_back = self.server.stats().given_back
        return [self.pool.available_blocks(), len(self.pool.check()), given_back, leases]


def main() -> None:
    with contextlib.ExitStack() as stack:
        node: Node | None = None
        for line in sys.stdin:
            word, *arguments = cast("list[object]", json.loads(line))
            if node is None:
                patience, engine = arguments
                node = Node(cast("float", patience), str(engine), stack)
                answer: object = node.pool.name
            else:
                answer = getattr(node, str(word))(*arguments)
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
