"""A queue per test, looked at when the test is over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shmblocks import HandleQueue
from tests.queue.kit import CAPACITY, MESSAGE_BYTES, give_up_the_net, require_right


@pytest.fixture
def queue(pool_name: str) -> Iterator[HandleQueue[bytes]]:
    """Room for four messages of bytes."""
    with HandleQueue.create(pool_name, CAPACITY, message_bytes=MESSAGE_BYTES) as made:
        yield made
        if not made.is_closed:
            require_right(made)


@pytest.fixture
def no_net(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sleeps end by being woken, and only so. Name it before `queue`."""
    give_up_the_net(monkeypatch)
