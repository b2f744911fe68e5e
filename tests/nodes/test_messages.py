"""Messages that somebody has changed: an error, every block back, and never a byte too much.

What one end says in one connection is recorded once, with nonces that are always the same, changed,
and said again to a fresh end. SHMBLOCKS_NODES_MUTATIONS is how often, for each end.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from typing import cast

import msgspec
import pytest

from fuzzing.mutate import mutated
from shmblocks import BlockHandle, BlockPool, MalformedMessageError, ShmBlocksError
from shmblocks.lease import Lease
from shmblocks.nodes import RemotePool
from shmblocks.nodes.agent_process import AgentRead
from shmblocks.nodes.info import NodeServerStats
from shmblocks.nodes.messages import (
    MAX_FIELDS,
    MAX_MESSAGE_BYTES,
    MAX_METADATA_BYTES,
    MAX_POOLS,
    Absent,
    AnyMessage,
    Commit,
    Done,
    Fetch,
    Find,
    Found,
    Granted,
    Hello,
    Message,
    Ping,
    Prove,
    Read,
    Sent,
    ServedPool,
    StillReading,
    Taken,
    Welcome,
    decode,
    encode,
    frame_length,
    refused,
)
from shmblocks.nodes.nixl_offer import NixlOffer
from shmblocks.nodes.nixl_reads import NixlReads
from shmblocks.nodes.service import Service
from shmblocks.nodes.stream import Stream
from tests.nodes.kit import (
    BLOCKS,
    KEY,
    LONG,
    Proxy,
    Published,
    config,
    publish,
    publish_entry,
    read,
    two_nodes,
    two_pools,
)
from tests.nodes.nixl_kit import two_nixl_nodes

MUTATIONS = int(os.environ.get("SHMBLOCKS_NODES_MUTATIONS", "5000"))
TOKENS = 5
ENTRY = b"the key of 16 B."
# More than are ever fetched here.
READERS = 1 << 20

HANDLE = BlockHandle((1 << 32) - 1, (1 << 32) - 1, (1 << 44) - 1, (1 << 64) - 1, (1 << 64) - 1)
LARGEST_POOL = ServedPool((1 << 64) - 1, "/" + 200 * "n", bytes(32), 160 * "d")
LARGEST: list[Message] = [
    Hello((1 << 64) - 1, bytes(32)),
    Prove(bytes(32), bytes(32)),
    Welcome((LARGEST_POOL,) * MAX_POOLS, bytes(32)),
    Ping((1 << 64) - 1),
    Find((1 << 64) - 1, bytes(32), bytes(32), (1 << 64) - 1),
    Found((1 << 64) - 1, HANDLE.encode()),
    Absent((1 << 64) - 1, (1 << 64) - 1),
    Fetch((1 << 64) - 1, HANDLE.encode(), (1 << 44) - 1, (1 << 44) - 1, True),
    Taken((1 << 64) - 1, (1 << 44) - 1, bytes(64)),
    Read((1 << 64) - 1, HANDLE.encode(), (1 << 44) - 1, (1 << 44) - 1),
    Granted(
        (1 << 64) - 1,
        (1 << 44) - 1,
        bytes(64),
        (1 << 64) - 1,
        bytes(MAX_METADATA_BYTES),
        ((1 << 64) - 1,) * MAX_FIELDS,
    ),
    StillReading((1 << 64) - 1),
    Commit((1 << 64) - 1, True),
    Sent((1 << 64) - 1, (1 << 64) - 1),
    Done((1 << 64) - 1, True),
    refused((1 << 64) - 1, 64 * "k", 5000 * "\N{SNOWMAN}"),
]


@pytest.mark.parametrize("message", LARGEST, ids=lambda message: type(message).__name__)
def test_the_largest_message_of_each_kind_fits_and_comes_back(message: AnyMessage) -> None:
    frame = encode(message)
    assert frame_length(frame[:4]) == len(frame) - 4
    assert decode(frame[4:], (type(message),)) == message


@pytest.mark.parametrize("length", [0, MAX_MESSAGE_BYTES + 1, (1 << 32) - 1])
def test_a_frame_that_no_message_has_is_refused_before_anything_is_received(length: int) -> None:
    with pytest.raises(MalformedMessageError, match=str(length)):
        frame_length(length.to_bytes(4, "little"))


def test_another_message_than_the_expected_is_refused() -> None:
    with pytest.raises(MalformedMessageError, match="expected Taken or Refused, got Ping"):
        decode(encode(Ping(1))[4:], (Taken, type(refused(1, "", ""))))
    with pytest.raises(MalformedMessageError):
        decode(msgspec.msgpack.encode({"rid": 1}), (Ping,))


# ---- said again, with changes ------------------------------------------------------------------


@pytest.fixture
def _same_nonces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "token_bytes", bytes)


class Saying(Stream):
    """It has said everything before it was asked."""

    @property
    def is_quiet(self) -> bool:
        return True


def stream_that_says(data: bytes, keep: list[socket.socket]) -> Stream:
    """A connection whose other end has said this and no more."""
    ours, theirs = socket.socketpair()
    theirs.sendall(data)
    theirs.shutdown(socket.SHUT_WR)
    keep.append(theirs)
    return Saying(ours, "somebody")


def let_go(kept: list[socket.socket]) -> None:
    for each in kept:
        each.close()
    kept.clear()


def changed(said: bytes, chooser: random.Random) -> bytes:
    """Changes at one place of a conversation, mostly in or around a message."""
    at = chooser.randrange(len(said))
    end = min(len(said), at + 60)
    return said[:at] + mutated(said[at:end], chooser, [said]) + said[end:]


def record(pair_of: Callable[[Proxy], None], target: tuple[str, int]) -> bytes:
    with Proxy(target) as proxy:
        pair_of(proxy)
        return bytes(proxy.from_reader)


@pytest.mark.usefixtures("_same_nonces")
@pytest.mark.watchdog(600 + MUTATIONS // 50)
def test_a_server_survives_every_changed_conversation(rng: random.Random) -> None:
    with two_nodes() as pair:
        published = publish(pair.there, TOKENS, rng, readers=READERS)
        publish_entry(pair.there, ENTRY, TOKENS, rng)

        def converse(proxy: Proxy) -> None:
            with RemotePool(pair.here, proxy.address, key=KEY) as remote:
                pair.here.free(remote.fetch(published.handle, timeout=LONG))
                remote.ping()
                with pair.here.reserve(3) as landing:
                    remote.fetch_into(
                        published.handle, landing.handle, num_tokens=3, keep_claim=True
                    )
                remote.ping()
                lease = remote.fetch_key(ENTRY, timeout=LONG)
                assert lease is not None
                lease.release()
                assert remote.fetch_key(bytes(16), timeout=LONG) is None

        said = record(converse, pair.server.address)
        service = Service([pair.there], KEY, None, LONG, 4)
        stats = after_changed_conversations(service, said, rng, fetched=3)
        assert stats.peers == ()
        assert stats.strangers > 0
        assert stats.fetched > 3
        assert [info.leases for info in pair.there.allocations()] == [[], []]
        assert read(pair.there, published.handle) == published.content
        assert pair.there.check() == []
        pair.there.free(published.handle)
        pair.there.drop_all()
        pair.here.drop_all()


def after_changed_conversations(
    service: Service, said: bytes, rng: random.Random, *, fetched: int
) -> NodeServerStats:
    """What a server counted that heard what a reader `said`, unchanged and in many other ways."""
    kept: list[socket.socket] = []
    service.serve(stream_that_says(said, kept))
    assert service.stats("").fetched == fetched, "unchanged it is understood"
    for _ in range(MUTATIONS):
        service.serve(stream_that_says(changed(said, rng), kept))
        let_go(kept)
    let_go(kept)
    return service.stats("")


@pytest.mark.usefixtures("_same_nonces", "fakes")
@pytest.mark.watchdog(600 + MUTATIONS // 50)
def test_a_server_survives_every_changed_conversation_about_reads(rng: random.Random) -> None:
    with two_nixl_nodes(config(), checksum=True) as pair:
        published = publish(pair.there, TOKENS, rng, readers=READERS)

        def converse(proxy: Proxy) -> None:
            with RemotePool(
                pair.here, proxy.address, key=KEY, checksum=True, engine="nixl"
            ) as remote:
                for _ in range(2):
                    pair.here.free(remote.fetch(published.handle, timeout=LONG))

        said = record(converse, pair.server.address)
        service = Service([pair.there], KEY, None, LONG, 4, pair.server._nixl)
        stats = after_changed_conversations(service, said, rng, fetched=2)
        assert stats.peers == ()
        assert stats.given_back > 0
        assert stats.fetched > 2
        assert [info.leases for info in pair.there.allocations()] == [[]]
        assert read(pair.there, published.handle) == published.content
        assert pair.there.check() == []
        pair.there.free(published.handle)


class _Answers:
    """What a server says in one connection with one fetch, said again to a fresh reader."""

    def __init__(self, here: BlockPool, published: Published, engine: str) -> None:
        self._here = here
        self._engine = engine
        self._published = published
        self._kept: list[socket.socket] = []

    def fetch(self, said: bytes) -> BlockHandle | None:
        """The fetched handle, or None after an error of the library."""
        return self._ask(said, lambda remote: remote.fetch(self._published.handle, timeout=LONG))

    def get(self, said: bytes) -> BlockHandle | None:
        """The handle of the entry that came by key, or None after an error or a miss."""

        def get(remote: RemotePool) -> BlockHandle | None:
            lease = remote.fetch_key(ENTRY, timeout=LONG)
            if lease is None:
                return None
            with lease:
                return lease.handle

        return self._ask(said, get)

    def _ask(
        self, said: bytes, question: Callable[[RemotePool], BlockHandle | None]
    ) -> BlockHandle | None:
        with RemotePool(self._here, ("127.0.0.1", 1), key=KEY, engine=self._engine) as remote:
            stream = stream_that_says(said, self._kept)
            vars(remote._dialer)["_connected"] = lambda _, use: use(stream) or stream
            try:
                return question(remote)
            except ShmBlocksError:
                return None
            finally:
                stream.close()
                let_go(self._kept)


@contextlib.contextmanager
def recorded_answers(
    rng: random.Random, question: Callable[[RemotePool, BlockHandle], None], engine: str = "tcp"
) -> Iterator[tuple[BlockPool, _Answers, bytes]]:
    """The own pool, a server that repeats itself, and what it says."""
    with two_pools() as (here, there):
        published = publish(there, TOKENS, rng, readers=READERS)
        publish_entry(there, ENTRY, TOKENS, rng)
        # A reader's half of the conversation is the same each time, and so is the server's.
        offer = NixlOffer([there], "lo", LONG) if engine == "nixl" else None
        service = Service([there], KEY, None, LONG, 4, offer)
        ours, theirs = socket.socketpair()
        with RemotePool(here, ("127.0.0.1", 1), key=KEY, engine=engine) as remote:
            said = _server_half(
                remote, service, lambda: question(remote, published.handle), ours, theirs
            )
        if offer is not None:
            offer.close()
        yield here, _Answers(here, published, engine), said
        there.free(published.handle)
        there.drop_all()


def _server_half(
    remote: RemotePool,
    service: Service,
    question: Callable[[], None],
    ours: socket.socket,
    theirs: socket.socket,
) -> bytes:
    heard = bytearray()

    class Recording(Stream):
        """Remembers what it receives."""

        def _receive_some(self, memory: memoryview, deadline: float | None) -> int:
            count = super()._receive_some(memory, deadline)
            heard.extend(memory[:count])
            return count

    serving = threading.Thread(target=service.serve, args=(Stream(theirs, "the reader"),))
    serving.start()
    stream = Recording(ours, "the server")
    vars(remote._dialer)["_connected"] = lambda _, use: use(stream) or stream
    question()
    remote.close()
    serving.join()
    return bytes(heard)


def _fetch(remote: RemotePool, handle: BlockHandle) -> None:
    remote._pool.free(remote.fetch(handle, timeout=LONG))


def _get(remote: RemotePool, _: BlockHandle) -> None:
    lease = remote.fetch_key(ENTRY, timeout=LONG)
    assert lease is not None
    lease.release()
    remote._pool.drop_all()


@pytest.mark.usefixtures("_same_nonces")
@pytest.mark.watchdog(600 + MUTATIONS // 50)
def test_a_reader_survives_every_changed_answer(rng: random.Random) -> None:
    with recorded_answers(rng, _fetch) as (here, server, said):
        ask_changed(here, server.fetch, here.free, said, rng)


@pytest.mark.usefixtures("_same_nonces")
@pytest.mark.watchdog(600 + MUTATIONS // 50)
def test_a_reader_by_key_survives_every_changed_answer(rng: random.Random) -> None:
    with recorded_answers(rng, _get) as (here, server, said):
        ask_changed(here, server.get, lambda _: here.drop(ENTRY), said, rng)


@pytest.mark.usefixtures("_same_nonces", "fakes")
@pytest.mark.watchdog(600 + MUTATIONS // 50)
def test_a_reader_with_an_agent_survives_every_changed_answer(
    rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rows are no message: whatever the server says of them, as many come as were asked for.
    monkeypatch.setattr(NixlReads, "prepare", lambda *_: None)
    monkeypatch.setattr(NixlReads, "_try", lambda *_: AgentRead(cast("Lease", None), 1))
    with recorded_answers(rng, _fetch, "nixl") as (here, server, said):
        ask_changed(here, server.fetch, here.free, said, rng)


def ask_changed(
    here: BlockPool,
    ask: Callable[[bytes], BlockHandle | None],
    free: Callable[[BlockHandle], object],
    said: bytes,
    rng: random.Random,
) -> None:
    unchanged = ask(said)
    assert unchanged is not None
    free(unchanged)
    rows = TOKENS * here.config.token_bytes
    outcomes = {True: 0, False: 0}
    for _ in range(MUTATIONS):
        data = changed(said, rng)
        local = ask(data)
        outcomes[local is not None] += 1
        if local is not None:
            # Only what has no check of its own (rows, aux) can have changed, and it is as long.
            assert local.num_tokens == TOKENS
            assert sum(map(len, read(here, local).values())) == rows + 64
            if here.available_blocks() != BLOCKS:
                free(local)
        if here.available_blocks() != BLOCKS:
            raise AssertionError(f"{here.allocations()} after {data!r}")
    assert outcomes[False] > 0
    assert outcomes[True] > 0
    assert here.check() == []
    assert here.config == config()
