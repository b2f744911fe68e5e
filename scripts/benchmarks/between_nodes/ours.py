"""NodeServer and RemotePool: with blocks reserved, a lease, and a publish at the end."""

from __future__ import annotations

import contextlib
from typing import cast

from benchmarks.between_nodes.kit import KEY, LOOPBACK, own_pool
from shmblocks import BlockHandle, BlockPool
from shmblocks.nodes import NodeServer, RemotePool


class NodesSource:
    def __init__(self, pool: BlockPool, server: NodeServer) -> None:
        self._pool = pool
        self.told: object = server.address

    def prepare(self, tokens: int) -> object:
        with self._pool.reserve(tokens, timeout=10.0) as reservation:
            return reservation.publish()


def nodes_source(stack: contextlib.ExitStack, name: str, most: int, _: object) -> NodesSource:
    pool = own_pool(stack, name, most)
    server = stack.enter_context(NodeServer(pool, (LOOPBACK, 0), key=KEY))
    return NodesSource(pool, server)


class NodesReader:
    def __init__(self, pool: BlockPool, remote: RemotePool) -> None:
        self._pool = pool
        self._remote = remote

    def carry(self, _: int, prepared: object) -> None:
        local = self._remote.fetch(cast("BlockHandle", prepared), timeout=60.0)
        self._pool.free(local)


def nodes_reader(stack: contextlib.ExitStack, name: str, most: int, told: object) -> NodesReader:
    pool = own_pool(stack, name, most)
    address = cast("tuple[str, int]", told)
    return NodesReader(pool, stack.enter_context(RemotePool(pool, address, key=KEY)))
