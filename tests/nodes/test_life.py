"""Forks and ends of processes that serve and fetch: harmless, whenever they come."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import sys
import threading
import weakref

import pytest

from shmblocks import BlockPool, PeerDiedError, ShmBlocksError
from shmblocks.nodes import NodeServer, RemotePool
from tests.nodes.kit import (
    KEY,
    LARGE,
    LARGE_TOKENS,
    LONG,
    Pair,
    Proxy,
    Published,
    assert_arrived,
    assert_fetchable,
    assert_nothing_held,
    publish,
    two_nodes,
    two_pools,
)
from tests.support.children import run_in_fork, run_program, wait_until


def sockets_of_this_process() -> set[str]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


def test_a_forked_child_has_none_of_the_connections(pair: Pair, rng: random.Random) -> None:
    before = sockets_of_this_process()
    published = publish(pair.there, 9, rng)
    assert_arrived(pair.here, pair.remote.fetch(published.handle, timeout=LONG), published)
    opened = sockets_of_this_process() - before
    assert opened, "a connection is kept for the next fetch"

    def look() -> tuple[set[str], bool, bool, int]:
        shared = sockets_of_this_process() & opened
        return shared, pair.server.is_closed, pair.remote.is_closed, pair.remote.stats().idle

    shared, server_is_closed, remote_is_closed, idle = run_in_fork(look)
    assert not shared
    assert server_is_closed, "its threads stayed in the parent"
    assert not remote_is_closed
    assert idle == 0


def test_a_forked_child_fetches_over_connections_of_its_own(pair: Pair, rng: random.Random) -> None:
    first, second, third = (publish(pair.there, 9, rng) for _ in range(3))
    assert_arrived(pair.here, pair.remote.fetch(first.handle, timeout=LONG), first)

    def fetch() -> bool:
        with pair.remote as remote:
            assert_arrived(pair.here, remote.fetch(second.handle, timeout=LONG), second)
        pair.server.close()
        return True

    assert run_in_fork(fetch)
    # Whatever the child closed was its own.
    assert_arrived(pair.here, pair.remote.fetch(third.handle, timeout=LONG), third)
    assert not pair.server.is_closed


def test_a_fork_in_the_middle_of_a_fetch_disturbs_nobody(rng: random.Random) -> None:
    with two_nodes(LARGE) as pair, Proxy(pair.server.address) as proxy:
        published = publish(pair.there, LARGE_TOKENS, rng)
        proxy.stall_after(100_000)
        with RemotePool(pair.here, proxy.address, key=KEY) as remote:
            results = []
            fetching = threading.Thread(
                target=lambda: results.append(remote.fetch(published.handle, timeout=LONG))
            )
            fetching.start()
            assert proxy.has_stalled.wait(LONG)

            def look() -> tuple[int, int]:
                remote.close()
                return remote.stats().in_flight, len(pair.here.allocations())

            assert run_in_fork(look) == (0, 1)
            proxy.go_on()
            fetching.join()
            assert_arrived(pair.here, results[0], published)


def test_a_living_child_does_not_keep_a_dead_parents_connection(rng: random.Random) -> None:
    """The server forks a child that lives on, and is killed: its reader hears of it at once."""
    with two_pools(LARGE) as (here, there):
        published = publish(there, LARGE_TOKENS, rng)
        ours, theirs = multiprocessing.Pipe()
        stay, leave = multiprocessing.Pipe()
        parent = os.fork()
        if parent == 0:
            _serve_and_fork(there.name, theirs, stay)
        try:
            address, child = ours.recv()
            with Proxy(address) as proxy, RemotePool(here, proxy.address, key=KEY) as remote:
                proxy.stall_after(300)
                errors: list[type[BaseException]] = []

                def fetch() -> None:
                    try:
                        remote.fetch(published.handle, timeout=LONG)
                    except ShmBlocksError as error:
                        errors.append(type(error))

                fetching = threading.Thread(target=fetch)
                fetching.start()
                assert proxy.has_stalled.wait(LONG)
                os.kill(parent, 9)
                os.waitpid(parent, 0)
                proxy.go_on()
                fetching.join()
                assert errors == [PeerDiedError]
        finally:
            leave.send("leave")
            for end in (ours, theirs, stay, leave):
                end.close()
        wait_until(lambda: not os.path.exists(f"/proc/{child}") or _is_zombie(child), "it left")
        assert_nothing_held(here)


def _serve_and_fork(
    name: str,
    tell: multiprocessing.connection.Connection,
    stay: multiprocessing.connection.Connection,
) -> None:
    try:
        pool = BlockPool.attach(name, role="server", prefault="off")
        server = NodeServer(pool, ("127.0.0.1", 0), key=KEY)
        child = os.fork()
        if child == 0:
            stay.recv()
            os._exit(0)
        tell.send((server.address, child))
        threading.Event().wait()
    finally:
        os._exit(1)


def _is_zombie(pid: int) -> bool:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "Z"


SERVES_AND_FETCHES = """
import sys
from shmblocks import BlockPool, Field, PoolConfig
from shmblocks.nodes import NodeServer, RemotePool
config = PoolConfig(total_tokens=64, fields=(Field("x", (), "int32"),), block_size=4)
here = BlockPool.create(sys.argv[1] + "-here", config, prefault="off")
there = BlockPool.create(sys.argv[1] + "-there", config, prefault="off")
server = NodeServer(there, ("127.0.0.1", 0))
remote = RemotePool(here, server.address)
with there.reserve(9) as r:
    handle = r.publish()
print(remote.fetch(handle).num_tokens)
{end}
"""


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "del server, remote", "import multiprocessing"])
def test_a_process_that_ends_without_closing_anything_ends_cleanly(
    pool_name: str, end: str
) -> None:
    program = SERVES_AND_FETCHES.format(end=end)
    ended = run_program([sys.executable, "-W", "error", "-c", program, pool_name])
    assert ended.stdout.split() == ["9"]
    assert ended.stderr == ""
    assert not [name for name in os.listdir("/dev/shm") if pool_name in name]


def test_what_is_dropped_is_closed(rng: random.Random) -> None:
    with two_pools() as (here, there):
        server = NodeServer(there, ("127.0.0.1", 0), key=KEY)
        remote = RemotePool(here, server.address, key=KEY)
        published = publish(there, 9, rng)
        assert_arrived(here, remote.fetch(published.handle, timeout=LONG), published)
        address = server.address
        gone = weakref.ref(server)
        del server, remote
        gc.collect()
        assert gone() is None, "its own threads keep it alive"
        with RemotePool(here, address, key=KEY) as late, pytest.raises(PeerDiedError):
            late.ping(LONG)


def test_nothing_of_torch_is_needed() -> None:
    program = "import sys, shmblocks.nodes; print('torch' in sys.modules)"
    assert run_program([sys.executable, "-c", program]).stdout.split() == ["False"]


def test_closing_twice_and_in_any_order_is_fine(pair: Pair, rng: random.Random) -> None:
    published: Published = publish(pair.there, 9, rng)
    for _ in range(2):
        pair.server.close()
        pair.remote.close()
    assert pair.server.is_closed
    assert pair.remote.is_closed
    assert "closed" in repr(pair.server)
    assert "closed" in repr(pair.remote)
    assert_fetchable(pair.there, published)
