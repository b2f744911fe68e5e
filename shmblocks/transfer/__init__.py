"""Transfers between an embedding side and a language side that share a pool.

embedding process                              language process
endpoint = EmbeddingEndpoint(pool, tx, rx)     endpoint = LanguageEndpoint(pool, tx, rx)
sender = endpoint.send(7, {...})               receiver = endpoint.receive(7)
sender.wait()                                  with receiver.wait() as result:
                                                   result["input_embeddings"]

Both take `spill=other_pool`: a pool in host memory for what theirs, on a GPU, has no room for.
"""

from __future__ import annotations

from shmblocks.transfer.channel import QueueLike
from shmblocks.transfer.embedding import EmbeddingEndpoint, Sender
from shmblocks.transfer.endpoint import EndpointStats
from shmblocks.transfer.language import LanguageEndpoint, Receiver
from shmblocks.transfer.result import TransferResult
from shmblocks.transfer.status import Status
from shmblocks.transfer.zmqqueue import ZmqQueue

__all__ = [
    "EmbeddingEndpoint",
    "EndpointStats",
    "LanguageEndpoint",
    "QueueLike",
    "Receiver",
    "Sender",
    "Status",
    "TransferResult",
    "ZmqQueue",
]
