"""What is seen of servers and readers from outside: `stat`, `top`, metrics."""

from __future__ import annotations

import random

import pytest

from shmblocks import PoolInspector, StaleHandleError
from shmblocks._state.layout import PEER_ROWS
from shmblocks._state.peers import NO_ROW
from shmblocks.cli.main import main
from shmblocks.metrics import read_metrics
from shmblocks.nodes import RemotePool
from tests.nodes import nodes_in_processes
from tests.nodes.kit import (
    KEY,
    LARGE,
    LONG,
    Pair,
    assert_arrived,
    publish,
    two_nodes,
    two_pools,
)
from tests.support.children import spawn, wait_until


def test_peers_and_what_they_fetched_are_seen_in_the_pool(pair: Pair, rng: random.Random) -> None:
    published = publish(pair.there, 9, rng)
    assert_arrived(pair.here, pair.remote.fetch(published.handle, timeout=LONG), published)
    with pytest.raises(StaleHandleError):
        pair.remote.fetch(published.handle, timeout=LONG)
    size = 9 * pair.here.config.token_bytes
    with PoolInspector(pair.there.name) as looking:
        wait_until(lambda: looking.stats().counters.node_reads == 1, "`Done` is there", LONG)
        snapshot = looking.snapshot()
        (peer,) = snapshot.peers
        assert peer.address.startswith("127.0.0.1:")
        assert (peer.fetched, peer.sent_bytes) == (1, size)
        served = snapshot.stats.counters
        assert (served.node_sent_bytes, served.node_refusals, snapshot.stats.node_peers) == (
            size,
            1,
            1,
        )
        pair.remote.close()
        wait_until(lambda: looking.snapshot().peers == [], "its row is free", LONG)
    fetched = pair.here.stats().counters
    assert (fetched.node_fetches, fetched.node_received_bytes, fetched.node_failures) == (
        1,
        size,
        1,
    )


def test_the_command_line_and_metrics_show_them(
    pair: Pair, rng: random.Random, capsys: pytest.CaptureFixture[str]
) -> None:
    published = publish(pair.there, 9, rng)
    assert_arrived(pair.here, pair.remote.fetch(published.handle, timeout=LONG), published)
    wait_until(lambda: pair.there.stats().counters.node_reads == 1, "`Done` is there", LONG)
    main(["stat", pair.there.name])
    shown = capsys.readouterr().out
    assert "peers on other nodes" in shown
    assert "127.0.0.1:" in shown
    assert "to other nodes" in shown
    main(["stat", pair.here.name])
    assert "from other nodes" in capsys.readouterr().out
    main(["top", pair.there.name, "--once"])
    assert "nodes: 1 peer" in capsys.readouterr().out
    values = {
        metric.name: metric.samples[0].value
        for metric in read_metrics([pair.there.name])
        if metric.name.startswith("shmblocks_node")
    }
    assert values["shmblocks_node_peers"] == 1
    assert values["shmblocks_node_reads_total"] == 1
    assert values["shmblocks_node_sent_bytes_total"] == 9 * pair.here.config.token_bytes


def test_connections_that_are_turned_away_are_counted(rng: random.Random) -> None:
    with two_nodes(max_connections=1) as pair:
        pair.remote.ping()
        with (
            RemotePool(pair.here, pair.server.address, key=KEY) as second,
            pytest.raises(Exception, match="max_connections"),
        ):
            second.ping(timeout=0.05)
        wait_until(
            lambda: pair.there.stats().counters.node_turned_away >= 1, "it was counted", LONG
        )


def test_the_peers_of_a_killed_server_are_seen_no_more() -> None:
    with two_pools(LARGE) as (here, there):
        with spawn(nodes_in_processes.serve, there.name, LONG) as serving:
            address = serving.receive()
            with RemotePool(here, address, key=KEY) as remote:  # type: ignore[arg-type]
                remote.ping(LONG)
                assert len(there.state.snapshot().peers) == 1
                serving.kill()
                assert there.state.snapshot().peers == []
                assert there.stats().node_peers == 0
        # The row is the next one's.
        assert there.peer_state.connect("[2001:db8::1]:7400") == 0
        (peer,) = there.state.snapshot().peers
        assert peer.address == "[2001:db8::1]:7400"
        there.peer_state.disconnect(0)
        assert there.state.snapshot().peers == []


def test_more_peers_than_rows_are_counted_and_not_shown() -> None:
    with two_pools() as (pool, _):
        rows = [pool.peer_state.connect(f"10.0.0.{number}:1") for number in range(PEER_ROWS + 2)]
        assert rows == [*range(PEER_ROWS), NO_ROW, NO_ROW]
        pool.peer_state.served(NO_ROW, 10)
        pool.peer_state.disconnect(NO_ROW)
        assert len(pool.state.snapshot().peers) == PEER_ROWS
        assert pool.stats().counters.node_sent_bytes == 10
        assert pool.check() == []
