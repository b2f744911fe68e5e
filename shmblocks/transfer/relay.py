"""A transfer between two nodes: both endpoints are unchanged, and a relay stands between them.

    node 1                                             node 2
    EmbeddingEndpoint --> relay_from ---- handle ----> relay_to --> LanguageEndpoint
    pool A ==================== fetched over TCP ==================> pool B

    handle = relay_from(language_end, room=7, timeout=30)              on node 1
    sender = relay_to(embedding_end, node1, 7, handle, timeout=30)     on node 2; sender.wait(...)

The relay on node 1 is the language side of that node, the one on node 2 the embedding side of that.
The handle and the number of the room travel by the launcher's own queue. Nothing is copied on
node 1; rows cross once, straight into blocks of node 2, and the language side there may ask for
them as it likes (push in place, or a landing of its own, resumed if it is short).

- The rows are on node 1 until node 2 has all of them. A relay that dies between the two leaves them
  to the pool's `unclaimed_timeout`, or to another relay with the same handle.
- A room that fails on node 2 fails there: the embedding side of node 1 was done with it before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from shmblocks.transfer.embedding import EmbeddingEndpoint, Sender
from shmblocks.transfer.language import LanguageEndpoint

if TYPE_CHECKING:
    from shmblocks.handle import BlockHandle


class Fetches(Protocol):
    """A `RemotePool`, or `Nodes`."""

    def fetch_into(
        self, handle: BlockHandle, landing: BlockHandle, *, timeout: float | None
    ) -> None: ...


def relay_from(
    endpoint: LanguageEndpoint, room: int, *, timeout: float | None, req_id: str | None = None
) -> BlockHandle:
    """Receive a room in this node's pool, and give the handle that another node may fetch.

    `endpoint` is the language end of this node's embedding process. The handle has one reader to
    come. `timeout` in seconds. Raises as `Receiver.wait` does.
    """
    with endpoint.receive(room, mode="push", req_id=req_id).wait(timeout) as result:
        return result.hand_on()


def relay_to(
    endpoint: EmbeddingEndpoint,
    node: Fetches,
    room: int,
    handle: BlockHandle,
    *,
    timeout: float | None,
    req_id: str | None = None,
) -> Sender:
    """Fetch what a handle of another node names, and send it to this node's language process.

    `endpoint` is the embedding end of that process's queues, `node` fetches into its pool. Wait for
    the `Sender`; the blocks are the endpoint's, however the room ends. Raises as `fetch` does, and
    has given everything back then.
    """
    pool = endpoint.pool
    with pool.reserve(handle.num_tokens, req_id=req_id, timeout=timeout) as landing:
        node.fetch_into(handle, landing.handle, timeout=timeout)
        landing.note_published()  # the endpoint owns it from here on
        return endpoint.send_handle(room, landing.handle, req_id=req_id)
