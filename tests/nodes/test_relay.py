"""A transfer between two nodes: the endpoints are unchanged, and a relay stands between them."""

from __future__ import annotations

import queue

import pytest
import torch

from shmblocks import BlockHandle, BlockPool, PoolConfig, multimodal_fields
from shmblocks.nodes import NodeServer, RemotePool
from shmblocks.transfer import EmbeddingEndpoint, LanguageEndpoint, Sender
from tests.nodes.kit import KEY, LONG, assert_nothing_held
from tests.support.naming import new_pool_name

HIDDEN = 8
CONFIG = PoolConfig(
    total_tokens=256, fields=multimodal_fields(HIDDEN), block_size=4, default_num_blocks=2
)


def encode(pool: BlockPool, num_tokens: int, delta: int) -> tuple[BlockHandle, torch.Tensor]:
    """On the encoder's node: published for one reader, whichever node that is on."""
    embeddings = torch.randn(num_tokens, HIDDEN).to(torch.bfloat16)
    with pool.reserve(num_tokens) as reservation:
        reservation["input_embeddings"].copy_(embeddings)
        reservation["fill_ids"].copy_(torch.arange(num_tokens))
        reservation["mrope_positions"].fill_(num_tokens)
        reservation.aux[0], reservation.aux[1] = num_tokens, delta
        return reservation.publish(), embeddings


def relay(node: RemotePool, endpoint: EmbeddingEndpoint, room: int, handle: BlockHandle) -> Sender:
    """On the language node: what an embedding process would do there, with a fetch for a model."""
    local = node.fetch(handle, timeout=LONG, req_id=f"room {room}")
    return endpoint.send_handle(room, local, published=True)


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 50])
def test_a_language_endpoint_receives_what_was_encoded_on_another_node(num_tokens: int) -> None:
    there_and_back: tuple[queue.Queue[bytes], queue.Queue[bytes]] = (queue.Queue(), queue.Queue())
    to_language, to_embedding = there_and_back
    with (
        BlockPool.create(new_pool_name(), CONFIG, prefault="off") as there,
        BlockPool.create(new_pool_name(), CONFIG, prefault="off") as here,
        NodeServer(there, ("127.0.0.1", 0), key=KEY) as server,
        RemotePool(here, server.address, key=KEY) as node,
        EmbeddingEndpoint(here, to_language, to_embedding) as embedding,
        LanguageEndpoint(here, to_embedding, to_language) as language,
    ):
        handle, embeddings = encode(there, num_tokens, delta=-3)
        receiver = language.receive(7, mode="push")
        sender = relay(node, embedding, 7, handle)
        with receiver.wait(LONG) as result:
            assert torch.equal(result["input_embeddings"], embeddings)
            assert result["fill_ids"].tolist() == list(range(num_tokens))
            assert result.mrope_position_delta == -3
        embedding.poll()
        sender.wait(LONG)
        del result
        assert_nothing_held(here)
        assert_nothing_held(there)
