"""Who may fetch: both ends know the key, and a recording of another connection is of no use."""

from __future__ import annotations

import random
import socket
import ssl
import subprocess
import threading
from pathlib import Path
from typing import NamedTuple

import pytest

from shmblocks import AuthenticationError, PeerDiedError, PoolTimeoutError, ShmBlocksError
from shmblocks.nodes import NodeServer, RemotePool
from shmblocks.nodes.handshake import introduce
from shmblocks.nodes.messages import Hello, Prove, Welcome, served
from shmblocks.nodes.stream import Stream, plain_stream
from tests.nodes.kit import (
    KEY,
    LONG,
    Pair,
    Proxy,
    assert_arrived,
    assert_fetchable,
    assert_nothing_held,
    garble,
    publish,
    two_pools,
)
from tests.support.children import wait_until

OTHER_KEY = b"another sixteen bytes or more"


@pytest.mark.parametrize("key", [OTHER_KEY, KEY + b"\0", None], ids=["wrong", "longer", "none"])
def test_a_reader_without_the_key_gets_nothing(
    pair: Pair, key: bytes | None, rng: random.Random
) -> None:
    published = publish(pair.there, 9, rng)
    with RemotePool(pair.here, pair.server.address, key=key) as remote:
        with pytest.raises(AuthenticationError, match="keys of the two nodes differ"):
            remote.fetch(published.handle, timeout=LONG)
        assert_nothing_held(pair.here)
    assert pair.server.stats().strangers == 1
    assert_fetchable(pair.there, published)


def test_a_server_without_the_key_is_not_believed(rng: random.Random) -> None:
    with (
        two_pools() as (here, there),
        NodeServer(there, ("127.0.0.1", 0)) as server,
        RemotePool(here, server.address, key=KEY) as remote,
    ):
        published = publish(there, 9, rng)
        with pytest.raises(AuthenticationError):
            remote.fetch(published.handle, timeout=LONG)
        assert_fetchable(there, published)


def test_a_server_that_skips_the_proof_is_not_believed(pair: Pair, rng: random.Random) -> None:
    """The server's own mac is garbled on its way: the reader must look at it."""
    published = publish(pair.there, 9, rng)
    with (
        Proxy(pair.server.address) as proxy,
        RemotePool(pair.here, proxy.address, key=KEY) as remote,
    ):
        remote.ping()
        answered = proxy.from_server
    handshake = answered - 4 - len(b"\x92\xa4ping\x01")
    with (
        Proxy(pair.server.address, garble(handshake - 1)) as proxy,
        RemotePool(pair.here, proxy.address, key=KEY) as remote,
        pytest.raises(AuthenticationError, match="did not prove"),
    ):
        remote.fetch(published.handle, timeout=LONG)
    assert_fetchable(pair.there, published)


def test_without_a_key_only_loopback_is_served_and_fetched_from(rng: random.Random) -> None:
    with two_pools() as (here, there):
        with pytest.raises(ValueError, match="without a key"):
            NodeServer(there, ("0.0.0.0", 0))
        with pytest.raises(ValueError, match="without a key"):
            RemotePool(here, ("192.0.2.1", 7400)).ping()
        with (
            NodeServer(there, ("127.0.0.1", 0)) as server,
            RemotePool(here, server.address) as remote,
        ):
            published = publish(there, 9, rng)
            assert_arrived(here, remote.fetch(published.handle, timeout=LONG), published)


def connected(address: tuple[str, int]) -> Stream:
    return plain_stream(socket.create_connection(address), "the server", LONG)


def test_a_recorded_handshake_is_of_no_use(pair: Pair) -> None:
    """Everything that a reader with the key has said, said again on a new connection."""
    with Proxy(pair.server.address) as proxy:
        with RemotePool(pair.here, proxy.address, key=KEY) as remote:
            remote.ping()
        recorded = bytes(proxy.from_reader)
    with socket.create_connection(pair.server.address) as replaying:
        replaying.settimeout(LONG)
        replaying.sendall(recorded)
        heard = bytearray()
        while data := replaying.recv(1 << 12):
            heard += data
    assert b"AuthenticationError" in heard
    assert b"welcome" not in heard
    wait_until(lambda: pair.server.stats().strangers == 1, "it is counted")


def test_a_proof_that_is_sent_back_to_its_author_proves_nothing(pair: Pair) -> None:
    """Somebody without the key plays the server, and gives the reader its own mac."""
    listening = socket.create_server(("127.0.0.1", 0))

    def play() -> None:
        stream = plain_stream(listening.accept()[0], "a reader", LONG)
        stream.send(Hello(1, bytes(32)), None)
        proved = stream.receive(None, Prove)
        pool = served(pair.there.config, pair.there.pool_id, pair.there.name)
        stream.send(Welcome((pool,), proved.mac), None)
        stream.close()

    playing = threading.Thread(target=play)
    playing.start()
    with (
        RemotePool(pair.here, listening.getsockname(), key=KEY) as remote,
        pytest.raises(AuthenticationError, match="did not prove"),
    ):
        remote.ping()
    playing.join()
    listening.close()


def test_each_connection_has_nonces_of_its_own(pair: Pair) -> None:
    nonces = set()
    for _ in range(20):
        stream = connected(pair.server.address)
        nonces.add(stream.receive(None, Hello).nonce)
        stream.close()
    assert len(nonces) == 20


def test_a_reader_with_the_key_is_told_what_is_served(pair: Pair) -> None:
    stream = connected(pair.server.address)
    (pool,) = introduce(stream, KEY, None)
    stream.close()
    assert (pool.pool_id, pool.name) == (pair.there.pool_id, pair.there.name)
    assert "x int32[3]" in pool.description
    assert [each.pool_id for each in pair.remote.served_pools()] == [pool.pool_id]


# ---- TLS ---------------------------------------------------------------------------------------


class Contexts(NamedTuple):
    server: ssl.SSLContext
    client: ssl.SSLContext


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> Contexts:
    folder: Path = tmp_path_factory.mktemp("certificates")
    command = [
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
        *("-subj", "/CN=node", "-addext", "subjectAltName=IP:127.0.0.1"),
        *("-keyout", str(folder / "key"), "-out", str(folder / "certificate")),
    ]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("the program openssl, which makes certificates, is not installed")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "certificate", folder / "key")
    client = ssl.create_default_context(cafile=str(folder / "certificate"))
    return Contexts(server, client)


def test_rows_cross_under_tls(contexts: Contexts, rng: random.Random) -> None:
    with (
        two_pools() as (here, there),
        NodeServer(there, ("127.0.0.1", 0), key=KEY, tls=contexts.server) as server,
        RemotePool(here, server.address, key=KEY, tls=contexts.client) as remote,
    ):
        for num_tokens in (1, 9, 200):
            published = publish(there, num_tokens, rng)
            assert_arrived(here, remote.fetch(published.handle, timeout=LONG), published)
        assert_nothing_held(here)
        assert_nothing_held(there)


def test_under_tls_every_garbled_byte_is_noticed(contexts: Contexts, rng: random.Random) -> None:
    with (
        two_pools() as (here, there),
        NodeServer(there, ("127.0.0.1", 0), key=KEY, tls=contexts.server) as server,
    ):
        published = publish(there, 100, rng)
        with Proxy(server.address) as proxy:
            with (
                RemotePool(here, proxy.address, key=KEY, tls=contexts.client) as remote,
                here.reserve(100) as landing,
            ):
                remote.fetch_into(published.handle, landing.handle, keep_claim=True)
            total = proxy.from_server
        for at in sorted(rng.sample(range(total - 100), 25)):
            with (
                Proxy(server.address, garble(at)) as proxy,
                RemotePool(here, proxy.address, key=KEY, tls=contexts.client) as remote,
                pytest.raises(ShmBlocksError),
            ):
                remote.fetch(published.handle, timeout=1.0)
            assert_nothing_held(here)
        assert_fetchable(there, published)


def test_one_end_with_tls_and_one_without_are_told_so(
    contexts: Contexts, rng: random.Random
) -> None:
    with (
        two_pools() as (here, there),
        NodeServer(there, ("127.0.0.1", 0), key=KEY, tls=contexts.server, patience=1.0) as safe,
        NodeServer(there, ("127.0.0.1", 0), key=KEY, patience=1.0) as plain,
    ):
        published = publish(there, 9, rng)
        with (
            RemotePool(here, plain.address, key=KEY, tls=contexts.client) as remote,
            pytest.raises(AuthenticationError, match="TLS"),
        ):
            remote.fetch(published.handle, timeout=LONG)
        with (
            RemotePool(here, safe.address, key=KEY) as remote,
            pytest.raises((PeerDiedError, PoolTimeoutError)),
        ):
            remote.fetch(published.handle, timeout=LONG)
        assert_nothing_held(here)
        assert_fetchable(there, published)


def test_a_certificate_that_nobody_vouches_for_is_refused(
    contexts: Contexts, rng: random.Random
) -> None:
    with (
        two_pools() as (here, there),
        NodeServer(there, ("127.0.0.1", 0), key=KEY, tls=contexts.server) as server,
        RemotePool(here, server.address, key=KEY, tls=ssl.create_default_context()) as remote,
    ):
        published = publish(there, 9, rng)
        with pytest.raises(AuthenticationError, match="certificate"):
            remote.fetch(published.handle, timeout=LONG)
        assert_nothing_held(here)
        assert_fetchable(there, published)
