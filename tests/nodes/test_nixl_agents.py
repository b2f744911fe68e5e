"""Who may have rows read by an agent, what an agent is, and when it ends."""

from __future__ import annotations

import os
import random
import ssl
import sys
from pathlib import Path

import pytest

from shmblocks import (
    AuthenticationError,
    IncompatibleConfigError,
    PeerDiedError,
)
from shmblocks.nodes import NodeServer, RemotePool, nixl_agent
from tests.nodes import nixl_in_processes
from tests.nodes.kit import (
    KEY,
    LONG,
    assert_arrived,
    assert_fetchable,
    assert_nothing_held,
    config,
    publish,
    two_nodes,
    two_pools,
)
from tests.nodes.nixl_kit import (
    Agents,
    agent_of,
    current_agent,
    has_ended,
    processes_of,
    two_nixl_nodes,
    warm_up,
)
from tests.support.children import run_in_child, run_in_fork, run_program, wait_until


@pytest.mark.usefixtures("agents")
def test_without_the_key_nobody_learns_where_the_agent_is(rng: random.Random) -> None:
    with two_nixl_nodes(config()) as pair:
        published = publish(pair.there, 9, rng)
        other = b"another secret of 16 bytes or more"
        with (
            RemotePool(pair.here, pair.server.address, key=other, engine="nixl") as remote,
            pytest.raises(AuthenticationError),
        ):
            remote.fetch(published.handle, timeout=LONG)
        assert processes_of(remote) == [], "no agent is started before"
        assert_nothing_held(pair.here)
        assert_fetchable(pair.there, published)


@pytest.mark.usefixtures("fakes")
def test_a_server_that_does_not_offer_it_says_so(rng: random.Random) -> None:
    with two_nodes() as pair:
        published = publish(pair.there, 9, rng)
        with (
            RemotePool(pair.here, pair.server.address, key=KEY, engine="nixl") as remote,
            pytest.raises(IncompatibleConfigError, match=r"nixl=True"),
        ):
            remote.fetch(published.handle, timeout=LONG)
        assert_nothing_held(pair.here)
        # And one that offers it serves streams as before.
        with (
            NodeServer(pair.there, ("127.0.0.1", 0), key=KEY, nixl=True) as server,
            RemotePool(pair.here, server.address, key=KEY) as remote,
        ):
            assert_arrived(pair.here, remote.fetch(published.handle, timeout=LONG), published)
            assert_nothing_held(pair.there)


def test_without_nixl_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_agent, "PACKAGES", ("no_such_package_of_nixl",))
    with two_pools() as (here, there):
        with pytest.raises(ImportError, match=r"pip install 'shmblocks\[nixl\]'"):
            RemotePool(here, ("127.0.0.1", 1), engine="nixl")
        with pytest.raises(ImportError, match=r"pip install 'shmblocks\[nixl\]'"):
            NodeServer(there, ("127.0.0.1", 0), nixl=True)


@pytest.mark.usefixtures("fakes")
def test_what_it_cannot_keep_is_refused() -> None:
    with two_pools() as (here, there):
        with pytest.raises(ValueError, match="expected one of tcp, nixl"):
            RemotePool(here, ("127.0.0.1", 1), engine="rdma")
        with pytest.raises(ValueError, match="rows would cross as they are"):
            RemotePool(
                here, ("127.0.0.1", 1), engine="nixl", tls=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            )
        with pytest.raises(ValueError, match="rows would cross as they are"):
            NodeServer(
                there, ("127.0.0.1", 0), nixl=True, tls=ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            )
    with two_pools(config(fields=())) as (here, _), pytest.raises(ValueError, match="no rows"):
        RemotePool(here, ("127.0.0.1", 1), engine="nixl")


def test_an_agent_that_does_not_start_is_told(fakes: Agents, rng: random.Random) -> None:
    with two_nixl_nodes(config()) as pair:
        published = publish(pair.there, 9, rng)
        fakes.tell("no-agent")
        with pytest.raises(PeerDiedError, match="does not start: told to be none"):
            pair.remote.fetch(published.handle, timeout=LONG)
        with pytest.raises(PeerDiedError, match="told to be none"):
            NodeServer(pair.there, ("127.0.0.1", 0), key=KEY, nixl=True)
        fakes.untell("no-agent")
        assert_nothing_held(pair.here)
        assert_arrived(pair.here, pair.remote.fetch(published.handle, timeout=LONG), published)


@pytest.mark.usefixtures("agents")
def test_agents_hold_the_fields_and_nothing_else() -> None:
    with two_nixl_nodes(config()) as pair:
        warm_up(pair, random.Random(1))
        for node, pool, access in (
            (pair.server, pair.there, "r--s"),
            (pair.remote, pair.here, "rw-s"),
        ):
            pid = agent_of(node)
            maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
            (mapped,) = (line.split() for line in maps if "/dev/shm" in line)
            first = min(pool.state.layout.fields.values())
            inode = os.stat(f"/dev/shm{pool.name}").st_ino
            assert (mapped[1], int(mapped[2], 16), int(mapped[4])) == (access, first, inode)
            links = [os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir()]
            assert not [link for link in links if "/dev/shm" in link]
            limits = Path(f"/proc/{pid}/limits").read_text()
            assert "Max core file size        0" in limits
            assert os.getsid(pid) == pid


@pytest.mark.usefixtures("real")
def test_a_peer_that_writes_kills_the_agent_of_the_server_and_changes_nothing(
    rng: random.Random,
) -> None:
    """NIXL checks neither the right nor the place; the kernel does."""
    with two_nixl_nodes(config()) as pair:
        published = publish(pair.there, 9, rng)
        source = agent_of(pair.server)
        arguments = (pair.server.address, published.handle)
        assert run_in_child(nixl_in_processes.write_over, *arguments) == "nixlRemoteDisconnectError"
        wait_until(lambda: current_agent(pair.server) != source, "it is dead", LONG)
        assert_arrived(pair.here, pair.remote.fetch(published.handle, timeout=LONG), published)
        assert_nothing_held(pair.there)


# ---- processes ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("agents")
def test_a_forked_child_has_agents_of_its_own(rng: random.Random) -> None:
    with two_nixl_nodes(config()) as pair:
        warm_up(pair, rng)
        parents = agent_of(pair.remote)
        second, third = publish(pair.there, 9, rng), publish(pair.there, 9, rng)

        def fetch() -> tuple[bool, int]:
            assert current_agent(pair.server) is None
            with pair.remote as remote:
                assert_arrived(pair.here, remote.fetch(second.handle, timeout=LONG), second)
                pid = agent_of(remote)
            pair.server.close()
            return has_ended(pid), pid

        is_over, childs = run_in_fork(fetch)
        assert is_over
        assert childs != parents
        assert_arrived(pair.here, pair.remote.fetch(third.handle, timeout=LONG), third)
        assert agent_of(pair.remote) == parents
        assert_nothing_held(pair.here)
        assert_nothing_held(pair.there)


ENDS = """
import os, sys
from shmblocks import BlockPool, Field, PoolConfig
from shmblocks.nodes import NodeServer, RemotePool
if {is_fake}:
    from tests.nodes.nixl_kit import use_fake_agents
    use_fake_agents()
config = PoolConfig(total_tokens=64, fields=(Field("x", (), "int32"),), block_size=4)
here = BlockPool.create(sys.argv[1] + "-here", config, prefault="off")
there = BlockPool.create(sys.argv[1] + "-there", config, prefault="off")
server = NodeServer(there, ("127.0.0.1", 0), nixl=True)
remote = RemotePool(here, server.address, engine="nixl")
with there.reserve(9) as r:
    handle = r.publish()
print(remote.fetch(handle).num_tokens, not any("nixl_cu" in name for name in sys.modules))
print(server._nixl.agent_pid, remote._nixl.agent_pid)
{end}
"""


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "del server, remote", "os._exit(0)"])
def test_a_process_that_ends_without_closing_anything_leaves_no_agent(
    pool_name: str, end: str, agents: Agents
) -> None:
    program = ENDS.format(end=end and f"sys.stdout.flush()\n{end}", is_fake=agents.is_fake)
    ended = run_program([sys.executable, "-W", "error", "-c", program, pool_name])
    told, *pids = ended.stdout.replace("\n", " ").split(" True ")
    assert told == "9"
    assert ended.stderr == ""
    for pid in pids[0].split():
        wait_until(lambda pid=pid: has_ended(pid), "it has ended", LONG)  # type: ignore[misc]
    left = [name for name in os.listdir("/dev/shm") if pool_name in name]
    assert not left or end == "os._exit(0)"
    for name in left:
        os.unlink(f"/dev/shm/{name}")


def test_nothing_of_nixl_is_imported_unless_it_is_asked_for() -> None:
    program = "import sys, shmblocks.nodes; print([n for n in sys.modules if n.startswith('nixl')])"
    assert run_program([sys.executable, "-c", program]).stdout.strip() == "[]"
