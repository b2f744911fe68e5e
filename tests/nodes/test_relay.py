"""A transfer between two nodes: the endpoints are unchanged, and a relay stands between them."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import pytest
import torch

from shmblocks import BlockPool, InvalidStateError, PeerDiedError, PoolConfig, multimodal_fields
from shmblocks.nodes import NodeServer, RemotePool
from shmblocks.transfer import (
    EmbeddingEndpoint,
    LanguageEndpoint,
    TransferResult,
    relay_from,
    relay_to,
)
from tests.nodes.kit import KEY, LONG, assert_nothing_held
from tests.support.naming import new_pool_name

HIDDEN = 8
CONFIG = PoolConfig(
    total_tokens=256, fields=multimodal_fields(HIDDEN), block_size=4, default_num_blocks=2
)
DELTA = -3


class Two(NamedTuple):
    """Two nodes, each with its own pair of endpoints."""

    there: BlockPool
    here: BlockPool
    server: NodeServer
    node: RemotePool
    encoder: EmbeddingEndpoint
    relay_in: LanguageEndpoint
    relay_out: EmbeddingEndpoint
    language: LanguageEndpoint


@contextlib.contextmanager
def endpoints(pool: BlockPool) -> Iterator[tuple[EmbeddingEndpoint, LanguageEndpoint]]:
    there: queue.Queue[bytes] = queue.Queue()
    back: queue.Queue[bytes] = queue.Queue()
    with (
        EmbeddingEndpoint(pool, there, back) as embedding,
        LanguageEndpoint(pool, back, there) as language,
    ):
        yield embedding, language


@pytest.fixture
def two() -> Iterator[Two]:
    with (
        BlockPool.create(new_pool_name(), CONFIG, prefault="off") as there,
        BlockPool.create(new_pool_name(), CONFIG, prefault="off") as here,
        NodeServer(there, ("127.0.0.1", 0), key=KEY) as server,
        RemotePool(here, server.address, key=KEY) as node,
        endpoints(there) as (encoder, relay_in),
        endpoints(here) as (relay_out, language),
    ):
        yield Two(there, here, server, node, encoder, relay_in, relay_out, language)
        assert_nothing_held(here)
        assert_nothing_held(there)


def tensors(num_tokens: int) -> dict[str, torch.Tensor]:
    return {
        "input_embeddings": torch.randn(num_tokens, HIDDEN).to(torch.bfloat16),
        "fill_ids": torch.arange(num_tokens, dtype=torch.int32),
        "mrope_positions": torch.full((3, num_tokens), num_tokens, dtype=torch.int32),
    }


@contextlib.contextmanager
def in_thread(*bodies: Callable[[], object]) -> Iterator[None]:
    """What other processes do meanwhile."""
    threads = [threading.Thread(target=body) for body in bodies]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.join()


@contextlib.contextmanager
def encoded_and_relayed(two: Two, room: int, sent: dict[str, torch.Tensor]) -> Iterator[None]:
    """The encoder, and both halves of the relay; a variable is the queue between the nodes."""
    sender = two.encoder.send(room, sent, mrope_position_delta=DELTA)

    def relay() -> None:
        handle = relay_from(two.relay_in, room, timeout=LONG)
        relay_to(two.relay_out, two.node, room, handle, timeout=LONG).wait(LONG)

    with in_thread(lambda: sender.wait(LONG), relay):
        yield


def assert_same(result: TransferResult, sent: dict[str, torch.Tensor]) -> None:
    for name, tensor in sent.items():
        assert torch.equal(result[name], tensor)
    assert result.mrope_position_delta == DELTA


@pytest.mark.parametrize("mode", ["push", "landing"])
@pytest.mark.parametrize("num_tokens", [1, 7, 8, 50])
def test_a_language_endpoint_receives_what_an_embedding_endpoint_of_another_node_sent(
    two: Two, num_tokens: int, mode: Literal["push", "landing"]
) -> None:
    sent = tensors(num_tokens)
    with (
        encoded_and_relayed(two, 7, sent),
        two.language.receive(7, mode=mode).wait(LONG) as result,
    ):
        assert_same(result, sent)
        # Eight tokens are the landing: more of them come in a second round.
        assert result.rounds == (2 if mode == "landing" and num_tokens > 8 else 1)


def test_many_rooms_go_through_one_relay(two: Two) -> None:
    for room in range(20):
        sent = tensors(1 + room)
        with (
            encoded_and_relayed(two, room, sent),
            two.language.receive(room, mode="push").wait(LONG) as result,
        ):
            assert_same(result, sent)


def test_a_fetch_that_fails_leaves_the_rows_to_another_relay(two: Two) -> None:
    sent = tensors(9)
    sender = two.encoder.send(3, sent, mrope_position_delta=DELTA)
    with in_thread(lambda: sender.wait(LONG)):
        handle = relay_from(two.relay_in, 3, timeout=LONG)
    with RemotePool(two.here, ("127.0.0.1", 1), key=KEY) as nobody:
        with pytest.raises(PeerDiedError):
            relay_to(two.relay_out, nobody, 3, handle, timeout=LONG)
        assert_nothing_held(two.here)
    second = relay_to(two.relay_out, two.node, 3, handle, timeout=LONG)
    with (
        in_thread(lambda: second.wait(LONG)),
        two.language.receive(3, mode="push").wait(LONG) as result,
    ):
        assert_same(result, sent)


def test_only_what_is_read_in_place_can_be_handed_on(two: Two) -> None:
    sender = two.encoder.send(4, tensors(9), mrope_position_delta=DELTA)
    with in_thread(lambda: sender.wait(LONG)):
        result = two.relay_in.receive(4, mode="landing").wait(LONG)
    with result, pytest.raises(InvalidStateError, match="push"):
        result.hand_on()
    with pytest.raises(InvalidStateError, match="released"):
        result.hand_on()
