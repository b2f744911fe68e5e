"""A network between two nodes that cuts, stalls and garbles; slow readers; servers that come again.

Whatever happens: a clear error, every block back on this node, the reader still to come on that.
"""

from __future__ import annotations

import random
import socket
import threading

import msgspec
import pytest

from shmblocks import (
    BlockPool,
    ForeignHandleError,
    PeerDiedError,
    PoolTimeoutError,
    ShmBlocksError,
)
from shmblocks.nodes import NodeServer, RemotePool
from shmblocks.nodes.messages import Fetch, Hello, Message, Sent, Welcome, encode, served
from tests.nodes.kit import (
    KEY,
    LARGE,
    LARGE_TOKENS,
    LONG,
    Fetching,
    Pair,
    Proxy,
    assert_arrived,
    assert_fetchable,
    assert_nothing_held,
    config,
    garble,
    publish,
    two_nodes,
    two_pools,
)
from tests.support.children import wait_until
from tests.support.naming import new_pool_name

TOKENS = 21


def answer_bytes(pair: Pair, rng: random.Random) -> int:
    """How many bytes a server sends for one connection with one fetch of `TOKENS` tokens."""
    published = publish(pair.there, TOKENS, rng)
    with Proxy(pair.server.address) as proxy:
        with RemotePool(pair.here, proxy.address, key=KEY) as remote:
            assert_arrived(pair.here, remote.fetch(published.handle, timeout=LONG), published)
            # Before the proxy ends: it would take `Done` with it, and the blocks would stay.
            mine = published.handle.generation
            wait_until(
                lambda: all(info.generation != mine for info in pair.there.allocations()),
                "the other node has heard `Done`",
                LONG,
            )
        return proxy.from_server


def fetch_through_a_cut(pair: Pair, count: int, rng: random.Random) -> None:
    """One fetch that must fail with an error of the library, and give everything back."""
    published = publish(pair.there, TOKENS, rng)
    with (
        Proxy(pair.server.address, cut_after=count) as proxy,
        RemotePool(pair.here, proxy.address, key=KEY) as remote,
    ):
        with pytest.raises(PeerDiedError) as raised:
            remote.fetch(published.handle, timeout=LONG)
        assert str(proxy.address[1]) in str(raised.value), "the text names the node"
        assert remote.stats().in_flight == 0
    assert_nothing_held(pair.here)
    assert_fetchable(pair.there, published)


def test_a_connection_that_is_cut_anywhere_costs_only_that_fetch(
    pair: Pair, rng: random.Random
) -> None:
    total = answer_bytes(pair, rng)
    # Every byte of the handshake and around the ends of messages, and some of the rows.
    tried = {*range(12), *range(40, 48), *range(total - 12, total), *rng.sample(range(total), 30)}
    for count in sorted(tried):
        fetch_through_a_cut(pair, count, rng)


def test_a_cut_behind_the_last_byte_is_no_failure_and_no_loss(
    pair: Pair, rng: random.Random
) -> None:
    """`Done` is lost: this node has the data, and the other still keeps it."""
    total = answer_bytes(pair, rng)
    published = publish(pair.there, TOKENS, rng)
    with (
        Proxy(pair.server.address, cut_after=total) as proxy,
        RemotePool(pair.here, proxy.address, key=KEY) as remote,
    ):
        assert_arrived(pair.here, remote.fetch(published.handle, timeout=LONG), published)
    assert_fetchable(pair.there, published)


def test_a_network_that_stalls_is_waited_for_until_the_deadline(
    pair: Pair, rng: random.Random
) -> None:
    total = answer_bytes(pair, rng)
    for count in (0, 20, 60, total // 2, total - 1):
        published = publish(pair.there, TOKENS, rng)
        with Proxy(pair.server.address) as proxy:
            proxy.stall_after(count)
            with RemotePool(pair.here, proxy.address, key=KEY) as remote:
                with pytest.raises(PoolTimeoutError, match="it waited for"):
                    remote.fetch(published.handle, timeout=0.3)
                assert_nothing_held(pair.here)
        assert_fetchable(pair.there, published)


def test_a_network_that_goes_on_after_a_while_loses_nothing(pair: Pair, rng: random.Random) -> None:
    published = publish(pair.there, TOKENS, rng)
    with (
        Proxy(pair.server.address) as proxy,
        RemotePool(pair.here, proxy.address, key=KEY) as remote,
    ):
        proxy.stall_after(300)
        results = []
        fetching = threading.Thread(
            target=lambda: results.append(remote.fetch(published.handle, timeout=LONG))
        )
        fetching.start()
        assert proxy.has_stalled.wait(LONG)
        proxy.go_on()
        fetching.join()
        assert_arrived(pair.here, results[0], published)


def test_garbled_messages_are_told_and_cost_only_that_fetch(pair: Pair, rng: random.Random) -> None:
    """One bit of every byte of the handshake, one after the other."""
    hello = len(encode(Hello(1, bytes(32))))
    pool = served(pair.there.config, pair.there.pool_id, pair.there.name)
    welcome = len(encode(Welcome((pool,), bytes(32))))
    published = publish(pair.there, TOKENS, rng)
    for at in range(hello + welcome):
        with (
            Proxy(pair.server.address, garble(at)) as proxy,
            RemotePool(pair.here, proxy.address, key=KEY) as remote,
            pytest.raises(ShmBlocksError),
        ):
            remote.fetch(published.handle, timeout=0.5)
        assert pair.here.available_blocks() == pair.here.config.total_blocks
    assert_fetchable(pair.there, published)


# ---- slow readers ------------------------------------------------------------------------------


def test_with_a_checksum_every_garbled_byte_is_told(pair: Pair, rng: random.Random) -> None:
    """Rows and aux have no other check where there is no TLS."""
    total = answer_bytes(pair, rng)
    published = publish(pair.there, TOKENS, rng)
    rows = TOKENS * pair.here.config.token_bytes
    # The last of these is the last byte of the rows: behind it stands `Sent`.
    behind = len(encode(Sent(1, 1 << 31)))
    for at in sorted(rng.sample(range(total - rows - behind - 64, total - 5), 40)):
        with (
            Proxy(pair.server.address, garble(at)) as proxy,
            RemotePool(pair.here, proxy.address, key=KEY, checksum=True) as remote,
            pytest.raises(ShmBlocksError),
        ):
            remote.fetch(published.handle, timeout=2.0)
        assert_nothing_held(pair.here)
    with RemotePool(pair.here, pair.server.address, key=KEY, checksum=True) as remote:
        assert_arrived(pair.here, remote.fetch(published.handle, timeout=LONG), published)


def test_a_question_that_was_garbled_shows_in_the_checksum(pair: Pair, rng: random.Random) -> None:
    """The other node sends another part than was asked for."""
    published = publish(pair.there, TOKENS, rng)
    with (
        RemotePool(pair.here, pair.server.address, key=KEY, checksum=True) as remote,
        pair.here.reserve(4) as landing,
    ):
        remote.ping()
        stream = remote._connections._idle[0]
        send = stream.send

        def send_changed(message: Message, deadline: float | None, more: bool = False) -> None:
            if isinstance(message, Fetch):
                message = msgspec.structs.replace(message, first_token=message.first_token + 1)
            send(message, deadline, more)

        vars(stream)["send"] = send_changed
        with pytest.raises(PeerDiedError, match="checksum"):
            remote.fetch_into(published.handle, landing.handle, num_tokens=4, timeout=LONG)
    assert_fetchable(pair.there, published)


def test_a_reader_that_stands_still_loses_its_connection_and_its_lease_is_given_back(
    rng: random.Random,
) -> None:
    with two_nodes(LARGE, patience=0.3) as pair, Proxy(pair.server.address) as proxy:
        published = publish(pair.there, LARGE_TOKENS, rng)
        proxy.stall_after(200_000)
        with RemotePool(pair.here, proxy.address, key=KEY) as remote:
            fetching = Fetching(remote, published.handle)
            assert proxy.has_stalled.wait(LONG)
            wait_until(lambda: pair.server.stats().given_back, "the server has had enough", LONG)
            assert_fetchable(pair.there, published)
            proxy.go_on()
            fetching.wait()
            assert isinstance(fetching.error, PeerDiedError)
        assert_nothing_held(pair.here)


def test_a_reader_that_never_says_done_has_fetched_nothing(pair: Pair, rng: random.Random) -> None:
    """It got every byte, and then its end of the connection was cut."""
    published = publish(pair.there, TOKENS, rng)
    total = answer_bytes(pair, rng)
    with two_pools() as (here, _), Proxy(pair.server.address) as proxy:
        proxy.stall_after(total - 1)
        with (
            RemotePool(here, proxy.address, key=KEY) as remote,
            pytest.raises(PoolTimeoutError),
        ):
            remote.fetch(published.handle, timeout=0.5)
        assert_nothing_held(here)
    wait_until(lambda: pair.server.stats().given_back == 1, "the server has noticed", LONG)
    assert_fetchable(pair.there, published)


def test_strangers_who_say_nothing_are_let_go(rng: random.Random) -> None:
    with two_nodes(patience=0.2) as pair:
        with socket.create_connection(pair.server.address) as silent:
            silent.settimeout(LONG)
            while silent.recv(1 << 12):
                pass
        wait_until(lambda: pair.server.stats().strangers == 1, "it is counted")
        published = publish(pair.there, 5, rng)
        assert_arrived(pair.here, pair.remote.fetch(published.handle, timeout=LONG), published)


# ---- servers that come and go ------------------------------------------------------------------


def test_nobody_listens(pair: Pair, rng: random.Random) -> None:
    published = publish(pair.there, TOKENS, rng)
    pair.server.close()
    with pytest.raises(PeerDiedError, match="refused"):
        pair.remote.fetch(published.handle, timeout=LONG)
    assert_nothing_held(pair.here)
    assert_fetchable(pair.there, published)


def test_a_name_that_leads_nowhere_is_told(pair: Pair, rng: random.Random) -> None:
    published = publish(pair.there, TOKENS, rng)
    with (
        RemotePool(pair.here, ("no-such-node.invalid", 7400), key=KEY) as remote,
        pytest.raises((PeerDiedError, PoolTimeoutError), match="no-such-node"),
    ):
        remote.fetch(published.handle, timeout=2.0)
    assert_fetchable(pair.there, published)


def test_something_else_listens(pair: Pair, rng: random.Random) -> None:
    published = publish(pair.there, TOKENS, rng)
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            accepted, _ = other.accept()
            with accepted:
                accepted.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        answering = threading.Thread(target=answer)
        answering.start()
        with (
            RemotePool(pair.here, other.getsockname(), key=KEY) as remote,
            pytest.raises(PeerDiedError, match="expected a message"),
        ):
            remote.fetch(published.handle, timeout=LONG)
        answering.join()
    assert_fetchable(pair.there, published)


def test_a_server_that_was_restarted_is_found_again(rng: random.Random) -> None:
    with two_pools() as (here, there):
        with NodeServer(there, ("127.0.0.1", 0), key=KEY) as server:
            address = server.address
            remote = RemotePool(here, address, key=KEY)
            published = publish(there, 9, rng)
            assert_arrived(here, remote.fetch(published.handle, timeout=LONG), published)
        with remote, NodeServer(there, address, key=KEY):
            published = publish(there, 9, rng)
            assert_arrived(here, remote.fetch(published.handle, timeout=LONG), published)


def test_a_handle_of_a_pool_that_was_created_anew_under_the_same_name_is_foreign(
    rng: random.Random,
) -> None:
    name = new_pool_name()
    with BlockPool.create(new_pool_name(), config(), prefault="off") as here:
        with (
            BlockPool.create(name, config(), prefault="off") as there,
            NodeServer(there, ("127.0.0.1", 0), key=KEY) as server,
        ):
            address = server.address
            remote = RemotePool(here, address, key=KEY)
            old = publish(there, 9, rng)
            remote.ping()
        with (
            remote,
            BlockPool.create(name, config(), prefault="off") as there,
            NodeServer(there, address, key=KEY),
        ):
            with pytest.raises(ForeignHandleError, match="created anew"):
                remote.fetch(old.handle, timeout=LONG)
            published = publish(there, 9, rng)
            assert_arrived(here, remote.fetch(published.handle, timeout=LONG), published)
            assert_nothing_held(here)


def test_closing_a_server_ends_a_fetch_and_gives_its_lease_back(rng: random.Random) -> None:
    with two_nodes(LARGE) as pair, Proxy(pair.server.address) as proxy:
        published = publish(pair.there, LARGE_TOKENS, rng)
        proxy.stall_after(100_000)
        with RemotePool(pair.here, proxy.address, key=KEY) as remote:
            fetching = Fetching(remote, published.handle)
            assert proxy.has_stalled.wait(LONG)
            pair.server.close()
            assert_fetchable(pair.there, published)
            proxy.go_on()
            fetching.wait()
        assert isinstance(fetching.error, PeerDiedError)
        assert_nothing_held(pair.here)


def test_a_pool_that_is_closed_under_its_server_gives_no_bytes_of_others(
    rng: random.Random,
) -> None:
    with (
        two_nodes(LARGE) as pair,
        Proxy(pair.server.address) as proxy,
        BlockPool.attach(pair.there.name, prefault="off") as witness,
    ):
        published = publish(pair.there, LARGE_TOKENS, rng)
        proxy.stall_after(100_000)
        with RemotePool(pair.here, proxy.address, key=KEY) as remote:
            fetching = Fetching(remote, published.handle)
            assert proxy.has_stalled.wait(LONG)
            # The leases of that participant end here, and the blocks are used again.
            pair.there.close()
            publish(witness, LARGE_TOKENS, rng)
            publish(witness, LARGE_TOKENS, rng)
            proxy.go_on()
            fetching.wait()
        assert isinstance(fetching.error, PeerDiedError)
        assert_nothing_held(pair.here)
