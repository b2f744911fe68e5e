"""Transfers between an embedding side and a language side that share a pool.

embedding process                              language process
endpoint = EmbeddingEndpoint(pool, tx, rx)     endpoint = LanguageEndpoint(pool, tx, rx)
sender = endpoint.send(7, {...})               receiver = endpoint.receive(7)
sender.wait(timeout=30)                        with receiver.wait(timeout=30) as result:
                                                   result["input_embeddings"]

With asyncio: `sender = await endpoint.send_async(7, {...})`, `await sender`; `receiver = await
endpoint.receive_async(7)`, `with await receiver as result:`.

Between two nodes: `relay_from` and `relay_to`, with the same endpoints.

Both endpoints take `spill=other_pool`: a pool in host memory that is used when theirs, on a GPU,
has no free blocks.
"""

from __future__ import annotations

from shmblocks.transfer.connection import EndpointStats
from shmblocks.transfer.embedding import EmbeddingEndpoint, Sender
from shmblocks.transfer.language import LanguageEndpoint, Receiver
from shmblocks.transfer.messages import Mode
from shmblocks.transfer.queues import QueueLike, ZmqQueue
from shmblocks.transfer.relay import relay_from, relay_to
from shmblocks.transfer.result import TransferResult
from shmblocks.transfer.room import Status

__all__ = [
    "EmbeddingEndpoint",
    "EndpointStats",
    "LanguageEndpoint",
    "Mode",
    "QueueLike",
    "Receiver",
    "Sender",
    "Status",
    "TransferResult",
    "ZmqQueue",
    "relay_from",
    "relay_to",
]
