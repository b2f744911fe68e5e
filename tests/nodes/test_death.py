"""A node's process is killed, stopped, goes on: errors within the deadline, all blocks back.

And not one byte that comes late into blocks that are used again.
"""

from __future__ import annotations

import random

import pytest

from shmblocks import BlockHandle, PeerDiedError, PoolTimeoutError
from shmblocks.nodes import RemotePool
from shmblocks.testing import assert_survives, remember
from tests.nodes import nodes_in_processes as processes
from tests.nodes.kit import (
    KEY,
    LARGE,
    LARGE_TOKENS,
    LONG,
    Fetching,
    Proxy,
    assert_arrived,
    assert_fetchable,
    assert_nothing_held,
    holds_leases,
    publish,
    read,
    two_nodes,
    two_pools,
)
from tests.support.children import spawn, wait_until

PATIENCE = 1.0
TOTAL_BYTES = LARGE_TOKENS * 4096


def server_address(channel_says: object) -> tuple[str, int]:
    assert isinstance(channel_says, tuple)
    host, port = channel_says
    return host, port


# The rest must be more than the kernels hold: what a dead server has sent whole is whole.
@pytest.mark.parametrize("share", [0.0, 0.15, 0.3])
def test_a_killed_server_is_told_at_once_and_all_blocks_come_back(
    share: float, rng: random.Random
) -> None:
    with two_pools(LARGE) as (here, there), spawn(processes.serve, there.name, LONG) as server:
        published = publish(there, LARGE_TOKENS, rng, readers=2)
        with Proxy(server_address(server.receive())) as proxy:
            proxy.stall_after(300 + int(share * TOTAL_BYTES))
            with RemotePool(here, proxy.address, key=KEY) as remote:
                fetching = Fetching(remote, published.handle)
                assert proxy.has_stalled.wait(LONG)
                server.kill()
                proxy.go_on()
                assert isinstance(fetching.wait().error, PeerDiedError)
        assert_survives(here)
        assert_nothing_held(here)
        # A dead reader of the other node, as any: one of the two.
        there.reap()
        assert read(there, published.handle) == published.content
        assert_nothing_held(there)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_killed_reader_has_fetched_nothing(share: float, rng: random.Random) -> None:
    with two_nodes(LARGE) as pair, Proxy(pair.server.address) as proxy:
        published = publish(pair.there, LARGE_TOKENS, rng)
        proxy.stall_after(300 + int(share * TOTAL_BYTES))
        arguments = (pair.here.name, proxy.address, published.handle, LONG)
        with spawn(processes.fetch, *arguments) as reader:
            reader.hear("fetching")
            assert proxy.has_stalled.wait(LONG)
            reader.kill()
        wait_until(lambda: pair.server.stats().given_back == 1, "the server has noticed", LONG)
        assert_survives(pair.here)
        assert_nothing_held(pair.here)
        # The same handle again, by somebody else.
        assert_arrived(pair.here, pair.remote.fetch(published.handle, timeout=LONG), published)
        assert_nothing_held(pair.there)


def test_a_publisher_that_dies_takes_nothing_with_it() -> None:
    with two_nodes(LARGE) as pair, Proxy(pair.server.address) as proxy:
        with spawn(processes.publish_and_die, pair.there.name, LARGE_TOKENS) as publisher:
            handle = publisher.receive()
            assert isinstance(handle, BlockHandle)
            proxy.stall_after(100_000)
            with RemotePool(pair.here, proxy.address, key=KEY) as remote:
                fetching = Fetching(remote, handle)
                assert proxy.has_stalled.wait(LONG)
                publisher.kill()
                pair.there.reap()
                proxy.go_on()
                local = fetching.wait().local
        assert local is not None
        expected = bytes(index % 251 for index in range(LARGE_TOKENS * 4096))
        assert read(pair.here, local)["x"] == expected
        assert_nothing_held(pair.there)


def test_a_stopped_server_costs_the_deadline_and_no_byte_of_it_comes_late(
    rng: random.Random,
) -> None:
    with two_pools(LARGE) as (here, there), spawn(processes.serve, there.name, LONG) as server:
        published = publish(there, LARGE_TOKENS, rng)
        # No proxy: what the kernels hold may come when it likes.
        with RemotePool(here, server_address(server.receive()), key=KEY) as remote:
            remote.ping()
            server.stop()
            with pytest.raises(PoolTimeoutError, match="it waited for"):
                remote.fetch(published.handle, timeout=0.5)
            # The blocks are used again at once, and belong to others now.
            others = [publish(here, LARGE_TOKENS, rng) for _ in range(2)]
            kept = [remember(here, other.handle) for other in others]
            server.resume()
            # The lease that it takes now is for a connection that is gone.
            wait_until(lambda: not holds_leases(there), "nothing is sent any more", LONG)
            assert [remember(here, each.handle) for each in kept] == kept, "a byte came late"
            for other in others:
                assert read(here, other.handle) == other.content
            assert_fetchable(there, published)
        server.say("end")
        assert_nothing_held(here)


def test_a_server_that_is_stopped_in_the_middle_sends_no_byte_late(rng: random.Random) -> None:
    with two_pools(LARGE) as (here, there), spawn(processes.serve, there.name, LONG) as server:
        published = publish(there, LARGE_TOKENS, rng)
        with Proxy(server_address(server.receive())) as proxy:
            proxy.stall_after(TOTAL_BYTES // 4)
            with RemotePool(here, proxy.address, key=KEY) as remote:
                fetching = Fetching(remote, published.handle, timeout=2.0)
                assert proxy.has_stalled.wait(LONG)
                server.stop()
                proxy.go_on()
                assert isinstance(fetching.wait().error, PoolTimeoutError)
                others = [publish(here, LARGE_TOKENS, rng) for _ in range(2)]
                server.resume()
                wait_until(lambda: not holds_leases(there), "it has given up", LONG)
                for other in others:
                    assert read(here, other.handle) == other.content, "a byte came late"
                assert_fetchable(there, published)
        server.say("end")
        assert_nothing_held(here)


def test_a_stopped_reader_loses_its_connection_and_not_its_blocks(rng: random.Random) -> None:
    with two_nodes(LARGE, patience=PATIENCE) as pair:
        published = publish(pair.there, LARGE_TOKENS, rng)
        with Proxy(pair.server.address) as proxy:
            proxy.stall_after(TOTAL_BYTES // 4)
            arguments = (pair.here.name, proxy.address, published.handle, LONG)
            with spawn(processes.fetch, *arguments) as reader:
                reader.hear("fetching")
                assert proxy.has_stalled.wait(LONG)
                reader.stop()
                # The server's own patience: nobody tells it.
                wait_until(lambda: pair.server.stats().given_back == 1, "it had enough", LONG)
                assert len(pair.here.allocations()) == 1, "a stopped process keeps its blocks"
                assert_fetchable(pair.there, published)
                proxy.go_on()
                reader.resume()
                reader.hear("PeerDiedError")
        assert_nothing_held(pair.here)


def test_kills_at_random_moments_lose_no_block(rng: random.Random) -> None:
    """The reader's process, somewhere between its start and its end."""
    with two_nodes(LARGE) as pair:
        for _ in range(4):
            published = publish(pair.there, LARGE_TOKENS, rng)
            with Proxy(pair.server.address) as proxy:
                proxy.stall_after(rng.randrange(1, TOTAL_BYTES))
                arguments = (pair.here.name, proxy.address, published.handle, LONG)
                with spawn(processes.fetch, *arguments) as reader:
                    reader.hear("fetching")
                    assert proxy.has_stalled.wait(LONG)
                    proxy.go_on()
                    reader.kill()
            assert_survives(pair.here)
            for info in pair.here.allocations():
                pair.here.free(pair.here.handle_at(info.start_block))
            wait_until(lambda: not holds_leases(pair.there), "the server has noticed", LONG)
            for info in pair.there.allocations():
                assert read(pair.there, published.handle) == published.content, info
            assert_nothing_held(pair.here)
            assert_nothing_held(pair.there)
