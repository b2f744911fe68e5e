"""Fixtures of the tests of transfers.

Every test that takes `pool` ends with the pool as it began: all free, `check()` clean.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from shmblocks import BlockPool
from shmblocks.transfer import EmbeddingEndpoint, LanguageEndpoint
from tests.transfer.kit import assert_nothing_held, config


@pytest.fixture(autouse=True)
def _torch_uses_one_thread() -> Iterator[None]:
    """So that a forked child does not wait for threads that only its parent has."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pool(pool_name: str) -> Iterator[BlockPool]:
    with BlockPool.create(pool_name, config(), role="tests", prefault="off") as made:
        yield made
        assert_nothing_held(made)


class Pair(NamedTuple):
    """Both sides in this process and thread, and the queues between them to look into."""

    pool: BlockPool
    embedding: EmbeddingEndpoint
    language: LanguageEndpoint
    to_language: queue.SimpleQueue[bytes]
    to_embedding: queue.SimpleQueue[bytes]


@pytest.fixture
def pair(pool: BlockPool) -> Iterator[Pair]:
    to_language: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    to_embedding: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with (
        EmbeddingEndpoint(pool, to_language, to_embedding) as embedding,
        LanguageEndpoint(pool, to_embedding, to_language) as language,
    ):
        yield Pair(pool, embedding, language, to_language, to_embedding)
