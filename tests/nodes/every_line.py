"""A fetch, killed at every line on either side; what must be true on both nodes after each.

The functions here run in a fresh interpreter, away from pytest, which has no torch. The points are
the lines of `shmblocks.nodes`: the pool's operations between them are killed by the crash tests.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
from collections.abc import Callable, Iterator

import shmblocks.nodes
from shmblocks import BlockHandle, BlockPool, PeerDiedError, State
from shmblocks.nodes import Nodes, NodeServer, RemotePool, agent_process, nixl_reads
from shmblocks.nodes.service import Service
from shmblocks.nodes.stream import plain_stream
from shmblocks.testing import Coverage, Point, Scope, assert_survives, kill_at_every_line
from tests.nodes.fake_agent import FOLDER_VARIABLE
from tests.nodes.kit import (
    KEY,
    LONG,
    Published,
    config,
    content_of,
    holds_leases,
    publish,
    publish_entry,
    read,
)
from tests.nodes.nixl_kit import use_fake_agents
from tests.support.children import wait_until
from tests.support.naming import new_pool_name

TOKENS = 9
ENTRY = b"the key of 16 B."

Call = Callable[[], object]


class Scene:
    """Two pools of the survivor's, a handle, and where a server listens or is to listen."""

    def __init__(self, here: BlockPool, there: BlockPool) -> None:
        self.here = here
        self.there = there
        self.published: Published = publish(there, TOKENS, random.Random(1))
        self.server: NodeServer | None = None
        self.listener: socket.socket | None = None
        # Of the survivor that fetches.
        self.has_fetched = False
        self.local: BlockHandle | None = None
        # By key.
        self.entry: Published | None = None


@contextlib.contextmanager
def two_survivors() -> Iterator[Scene]:
    with (
        BlockPool.create(new_pool_name(), config(), role="survivor", prefault="off") as here,
        BlockPool.create(new_pool_name(), config(), role="survivor", prefault="off") as there,
    ):
        yield Scene(here, there)


# ---- the reader dies ---------------------------------------------------------------------------


@contextlib.contextmanager
def a_server() -> Iterator[Scene]:
    """The survivor serves."""
    with two_survivors() as scene, NodeServer(scene.there, ("127.0.0.1", 0), key=KEY) as server:
        scene.server = server
        yield scene


def _remote(scene: Scene, *, checksum: bool = False) -> tuple[BlockPool, RemotePool]:
    assert scene.server is not None
    pool = BlockPool.attach(scene.here.name, role="victim", prefault="off")
    return pool, RemotePool(pool, scene.server.address, key=KEY, checksum=checksum)


def fetch(scene: Scene) -> Call:
    """Connects, proves the key, fetches, publishes."""
    _, remote = _remote(scene)
    return lambda: remote.fetch(scene.published.handle, timeout=LONG)


def fetch_over_an_idle_connection(scene: Scene) -> Call:
    _, remote = _remote(scene)
    remote.ping(LONG)
    return lambda: remote.fetch(scene.published.handle, timeout=LONG)


def fetch_into(scene: Scene) -> Call:
    pool, remote = _remote(scene)
    remote.ping(LONG)
    landing = pool.reserve(TOKENS)
    # Kept: a reservation that is dropped is given back, with a warning.
    vars(scene)["landing"] = landing
    return lambda: remote.fetch_into(scene.published.handle, landing.handle, timeout=LONG)


def fetch_with_a_checksum(scene: Scene) -> Call:
    _, remote = _remote(scene, checksum=True)
    remote.ping(LONG)
    return lambda: remote.fetch(scene.published.handle, timeout=LONG)


def close(scene: Scene) -> Call:
    _, remote = _remote(scene)
    remote.ping(LONG)
    return remote.close


READERS = {
    each.__name__: each
    for each in (
        fetch,
        fetch_over_an_idle_connection,
        fetch_with_a_checksum,
        fetch_into,
        close,
    )
}


def kill_reader(name: str) -> Coverage:
    return kill_at_every_line(a_server, READERS[name], _judge_reader, scope=_scope())


def _scope() -> Scope:
    return Scope([shmblocks.nodes], library=False)


def _judge_reader(scene: Scene, _: Point) -> None:
    """The server's lease is given back; the blocks of the dead are free, or published and whole."""
    server = scene.server
    assert server is not None
    wait_until(lambda: not server.stats().peers, "the server has noticed the death", LONG)
    assert not holds_leases(scene.there)
    assert_survives(scene.there)
    assert_survives(scene.here)
    arrived = [info for info in scene.here.allocations() if info.state is State.PUBLISHED]
    for info in arrived:
        handle = scene.here.handle_at(info.start_block)
        assert read(scene.here, handle) == scene.published.content
    left = scene.there.allocations()
    if left:
        assert read(scene.there, scene.published.handle) == scene.published.content
    # A landing dies with its process, after the server was told; else nothing is lost.
    assert arrived or left or server.stats().fetched == 1
    assert scene.here.available_blocks() == scene.here.config.total_blocks


# ---- the reader dies, whose agent reads ---------------------------------------------------------


@contextlib.contextmanager
def a_server_with_an_agent() -> Iterator[Scene]:
    """The survivor serves, by a fake agent."""
    with (
        two_survivors() as scene,
        NodeServer(scene.there, ("127.0.0.1", 0), key=KEY, nixl=True) as server,
    ):
        scene.server = server
        yield scene


def fetch_by_agent(scene: Scene) -> Call:
    """Starts an agent, which reads; the connection is there."""
    assert scene.server is not None
    pool = BlockPool.attach(scene.here.name, role="victim", prefault="off")
    remote = RemotePool(pool, scene.server.address, key=KEY, engine="nixl")
    remote.ping(LONG)
    return lambda: remote.fetch(scene.published.handle, timeout=LONG)


def kill_reader_with_an_agent(folder: str) -> Coverage:
    """`folder`: for fake agents, an empty one."""
    os.environ[FOLDER_VARIABLE] = folder
    use_fake_agents()
    # Waiting is one step, however long an agent takes: the points are to be the same each time.
    vars(nixl_reads)["LOOK"] = LONG
    scope = Scope([nixl_reads, agent_process], library=False)
    return kill_at_every_line(
        a_server_with_an_agent, fetch_by_agent, _judge_reader_with_an_agent, scope=scope
    )


def _judge_reader_with_an_agent(scene: Scene, point: Point) -> None:
    """As any; what the dead one held comes back when its agent has heard of it."""

    def nobody_is_dead() -> bool:
        scene.here.reap()
        return all(each.is_alive for each in scene.here.participants())

    wait_until(nobody_is_dead, "the agent of the dead has ended", LONG)
    _judge_reader(scene, point)


# ---- the reader dies, by key -------------------------------------------------------------------


@contextlib.contextmanager
def an_owner() -> Iterator[Scene]:
    """The survivor has an entry, and serves it."""
    with a_server() as scene:
        scene.entry = publish_entry(scene.there, ENTRY, TOKENS, random.Random(2))
        yield scene


def get(scene: Scene) -> Call:
    """Claims the key, finds its owner, connects, finds, fetches, enters, leases."""
    assert scene.server is not None
    pool = BlockPool.attach(scene.here.name, role="victim", prefault="off")
    nodes = Nodes(pool, [scene.server.address], key=KEY)
    return lambda: nodes.get(ENTRY, timeout=LONG)


def get_what_nobody_has(scene: Scene) -> Call:
    assert scene.server is not None
    pool = BlockPool.attach(scene.here.name, role="victim", prefault="off")
    nodes = Nodes(pool, [scene.server.address], key=KEY)
    return lambda: nodes.get(bytes(16), timeout=LONG)


GETTERS = {each.__name__: each for each in (get, get_what_nobody_has)}


def kill_getter(name: str) -> Coverage:
    return kill_at_every_line(an_owner, GETTERS[name], _judge_getter, scope=_scope())


def _judge_getter(scene: Scene, _: Point) -> None:
    """The owner keeps its entry; here is the same entry, whole and free to be evicted, or none; and
    the claim of the dead is the next one's."""
    server, entry = scene.server, scene.entry
    assert server is not None
    assert entry is not None
    wait_until(lambda: not server.stats().peers, "the server has noticed the death", LONG)
    assert not holds_leases(scene.there)
    assert_survives(scene.there)
    assert_survives(scene.here)
    _assert_entry(scene.there, entry)
    if scene.here.find(ENTRY) is None:
        assert scene.here.claim(ENTRY).state == "mine"
        scene.here.end_claim(ENTRY)
    else:
        _assert_entry(scene.here, entry)
    assert scene.here.claim(bytes(16)).state == "mine"
    scene.here.end_claim(bytes(16))
    assert scene.here.cache_stats().claims == 0
    scene.here.drop_all()
    assert scene.here.available_blocks() == scene.here.config.total_blocks


def _assert_entry(pool: BlockPool, entry: Published) -> None:
    leases = pool.get(ENTRY)
    assert leases is not None
    with leases[0] as lease:
        assert content_of(lease) == entry.content


# ---- the server dies ---------------------------------------------------------------------------


@contextlib.contextmanager
def a_listener() -> Iterator[Scene]:
    """The survivor fetches, from a process that takes its connection."""
    with two_survivors() as scene, socket.create_server(("127.0.0.1", 0)) as listener:
        scene.listener = listener
        yield scene


@contextlib.contextmanager
def an_owner_that_dies() -> Iterator[Scene]:
    """The survivor gets by key, from a process that takes its connection."""
    with a_listener() as scene:
        scene.entry = publish_entry(scene.there, ENTRY, TOKENS, random.Random(2))
        yield scene


def get_once(scene: Scene) -> None:
    """In the parent, while the child serves."""
    if scene.has_fetched:
        return
    scene.has_fetched = True
    assert scene.listener is not None
    assert scene.entry is not None
    with Nodes(scene.here, [scene.listener.getsockname()], key=KEY) as nodes:
        lease = nodes.get(ENTRY, timeout=LONG)
        if lease is not None:
            with lease:
                assert content_of(lease) == scene.entry.content
        else:
            assert nodes.nodes[0].stats().failed == 1


def kill_owner() -> Coverage:
    return kill_at_every_line(
        an_owner_that_dies, serve, _judge_owner, scope=_scope(), meanwhile=get_once
    )


def _judge_owner(scene: Scene, _: Point) -> None:
    """The survivor has the whole of it, or a miss; the entry of the dead server's pool stays."""
    get_once(scene)
    assert scene.entry is not None
    assert_survives(scene.there)
    _assert_entry(scene.there, scene.entry)
    assert scene.here.cache_stats().claims == 0
    scene.here.drop_all()
    assert_survives(scene.here)
    assert scene.here.available_blocks() == scene.here.config.total_blocks


def serve(scene: Scene) -> Call:
    """One connection: the handshake, a fetch, the end."""
    assert scene.listener is not None
    pool = BlockPool.attach(scene.there.name, role="victim", prefault="off")
    service = Service([pool], KEY, None, LONG, 4)
    accepted, _ = scene.listener.accept()
    stream = plain_stream(accepted, "the survivor", LONG)
    return lambda: service.serve(stream)


def fetch_once(scene: Scene) -> None:
    """In the parent, while the child serves."""
    if scene.has_fetched:
        return
    scene.has_fetched = True
    assert scene.listener is not None
    with RemotePool(scene.here, scene.listener.getsockname(), key=KEY) as remote:
        try:
            scene.local = remote.fetch(scene.published.handle, timeout=LONG)
        except PeerDiedError:
            assert remote.stats().failed == 1


def kill_server() -> Coverage:
    return kill_at_every_line(
        a_listener, serve, _judge_server, scope=_scope(), meanwhile=fetch_once
    )


def _judge_server(scene: Scene, _: Point) -> None:
    """The survivor has the whole of it, or nothing; the lease of the dead is reaped."""
    fetch_once(scene)  # a child that died before its parent came to it
    if scene.local is not None:
        assert read(scene.here, scene.local) == scene.published.content
    assert_survives(scene.here)
    assert scene.here.available_blocks() == scene.here.config.total_blocks
    assert_survives(scene.there)
    if scene.there.allocations():
        assert read(scene.there, scene.published.handle) == scene.published.content
    assert scene.there.available_blocks() == scene.there.config.total_blocks
