"""The pools of one node, fetched from others over TCP.

node 1                                            node 2
encoder --publish(readers=n)--> pool A            pool B <--open-- language ranks
             | handle, by any queue                  ^ publish(readers=m)
             v                                       | recv_into
         NodeServer (attached to A) ==== TCP ====> RemotePool (attached to B)

with NodeServer(pool_a, ("10.0.0.1", 7400), key=key): ...          # on node 1
with RemotePool(pool_b, ("10.0.0.1", 7400), key=key) as node1:     # on node 2
    local = node1.fetch(handle, readers=m)

Sockets of the standard library and threads; no dependency. With `engine="nixl"` an agent of NIXL
reads the rows, in a process of its own (experimental). `docs/nodes.md` says what to expect when
something dies.
"""

from __future__ import annotations

from shmblocks.nodes.info import NodeServerStats, PeerInfo, RemotePoolStats
from shmblocks.nodes.messages import ServedPool
from shmblocks.nodes.nodes import Nodes
from shmblocks.nodes.remote import RemotePool
from shmblocks.nodes.server import NodeServer

__all__ = [
    "NodeServer",
    "NodeServerStats",
    "Nodes",
    "PeerInfo",
    "RemotePool",
    "RemotePoolStats",
    "ServedPool",
]
