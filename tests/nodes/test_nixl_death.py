"""Agents, servers and readers that die or stand still while an agent reads."""

from __future__ import annotations

import os
import random
import signal
from typing import cast

import pytest

from shmblocks import BlockHandle, BlockPool, PeerDiedError, PoolTimeoutError
from shmblocks.nodes import RemotePool
from shmblocks.testing import assert_survives
from tests.nodes import nixl_in_processes
from tests.nodes.kit import (
    KEY,
    LARGE,
    LARGE_TOKENS,
    LONG,
    Fetching,
    assert_arrived,
    assert_fetchable,
    assert_nothing_held,
    holds_leases,
    publish,
    read,
    two_pools,
)
from tests.nodes.nixl_kit import (
    TOTAL_BYTES,
    Agents,
    agent_of,
    assert_quarantine_ends,
    current_agent,
    has_ended,
    two_nixl_nodes,
    wait_for_read,
    warm_up,
)
from tests.support.children import spawn, wait_until

PATIENCE = 1.0


def test_a_killed_agent_of_the_reader_is_told_and_another_one_is_started(
    agents: Agents, rng: random.Random
) -> None:
    with two_nixl_nodes() as pair:
        warm_up(pair, rng)
        published = publish(pair.there, LARGE_TOKENS, rng)
        agents.hold(pair.server)
        first = agent_of(pair.remote)
        fetching = Fetching(pair.remote, published.handle)
        wait_for_read(pair.remote)
        os.kill(first, signal.SIGKILL)
        error = fetching.wait().error
        assert isinstance(error, PeerDiedError)
        assert f"(pid {first}) was killed by SIGKILL" in str(error)
        assert pair.remote.stats().quarantined == 0, "its death is the end of it"
        assert_nothing_held(pair.here)
        agents.go_on()
        assert_arrived(pair.here, pair.remote.fetch(published.handle, timeout=LONG), published)
        # Between two fetches as well.
        second = agent_of(pair.remote)
        os.kill(second, signal.SIGKILL)
        wait_until(lambda: current_agent(pair.remote) != second, "its death is known", LONG)
        warm_up(pair, rng)


def test_a_killed_agent_of_the_server_is_told_and_another_one_is_started(
    real: Agents, rng: random.Random
) -> None:
    with two_nixl_nodes() as pair:
        warm_up(pair, rng)
        published = publish(pair.there, LARGE_TOKENS, rng)
        real.hold(pair.server)
        fetching = Fetching(pair.remote, published.handle)
        wait_for_read(pair.remote)
        os.kill(agent_of(pair.server), signal.SIGKILL)
        error = fetching.wait().error
        assert isinstance(error, PeerDiedError)
        assert "NIXL" in str(error)
        assert_quarantine_ends(pair.remote)
        assert_nothing_held(pair.here)
        assert_arrived(pair.here, pair.remote.fetch(published.handle, timeout=LONG), published)
        # Between two fetches: the reader's agent still knows the dead one.
        reader, source = agent_of(pair.remote), agent_of(pair.server)
        os.kill(source, signal.SIGKILL)
        wait_until(lambda: current_agent(pair.server) != source, "its death is known", LONG)
        warm_up(pair, rng)
        assert agent_of(pair.remote) == reader
        assert_nothing_held(pair.there)


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_server_that_dies_or_stands_still_costs_nothing_here(
    how: str, agents: Agents, rng: random.Random
) -> None:
    with two_pools(LARGE) as (here, there):
        arguments = (there.name, LONG, agents.is_fake)
        with spawn(nixl_in_processes.serve, *arguments) as serving:
            address, source = cast("tuple[tuple[str, int], int]", serving.receive())
            with RemotePool(here, address, key=KEY, engine="nixl") as remote:
                small = publish(there, 1, rng)
                assert_arrived(here, remote.fetch(small.handle, timeout=LONG), small)
                published = publish(there, LARGE_TOKENS, rng, readers=2)
                if agents.is_fake:
                    agents.tell(f"hold-{TOTAL_BYTES}")
                else:
                    os.kill(source, signal.SIGSTOP)
                fetching = Fetching(
                    remote, published.handle, timeout=LONG if how == "killed" else 2
                )
                wait_for_read(remote)
                if how == "killed":
                    serving.kill()
                    assert isinstance(fetching.wait().error, PeerDiedError)
                else:
                    serving.stop()
                    assert isinstance(fetching.wait().error, PoolTimeoutError)
                    serving.resume()
                assert_quarantine_ends(remote)
                assert_nothing_held(here)
                # The agent of a dead server ends with it; one that is stopped, when it goes on.
                os.kill(source, signal.SIGCONT)
            if how == "stopped":
                wait_until(lambda: not holds_leases(there), "it has given up", LONG)
                serving.say("end")
        there.reap()
        assert read(there, published.handle) == published.content
        wait_until(lambda: has_ended(source), "its agent has ended", LONG)
        there.drop_all()
        for info in there.allocations():
            there.free(there.handle_at(info.start_block))


def test_blocks_of_a_killed_reader_are_nobodys_until_its_agent_has_ended(
    agents: Agents, rng: random.Random
) -> None:
    with two_nixl_nodes() as pair:
        small, published = publish(pair.there, 1, rng), publish(pair.there, LARGE_TOKENS, rng)
        if agents.is_fake:
            agents.hold(pair.server)
        arguments = (
            pair.here.name,
            pair.server.address,
            (small.handle, published.handle),
            LONG,
            agents.is_fake,
        )
        with spawn(nixl_in_processes.fetch, *arguments) as reader:
            agent = reader.receive()
            assert isinstance(agent, int)
            wait_until(lambda: holds_leases(pair.there), "it fetches", LONG)
            wait_until(lambda: len(pair.here.allocations()) == 1, "it has blocks", LONG)
            # It does not hear of the death: as an agent that a busy machine does not let run.
            os.kill(agent, signal.SIGSTOP)
            reader.kill()
        wait_until(lambda: pair.server.stats().given_back == 1, "the server has noticed", LONG)
        pair.here.reap()
        assert len(pair.here.allocations()) == 1, "something may still come into it"
        os.kill(agent, signal.SIGCONT)
        wait_until(lambda: has_ended(agent), "it has heard of it", LONG)
        assert_survives(pair.here)
        assert_nothing_held(pair.here)
        agents.go_on()
        assert_arrived(pair.here, pair.remote.fetch(published.handle, timeout=LONG), published)


def is_read(pool: BlockPool, handle: BlockHandle) -> bool:
    """Whether somebody has a lease on it."""
    return any(info.leases for info in pool.allocations() if info.start_block == handle.start_block)


def test_a_stopped_reader_loses_its_lease_and_publishes_nothing(
    agents: Agents, rng: random.Random
) -> None:
    with two_nixl_nodes(patience=PATIENCE) as pair:
        small, published = publish(pair.there, 1, rng), publish(pair.there, LARGE_TOKENS, rng)
        agents_of_the_reader = (
            pair.here.name,
            pair.server.address,
            (small.handle, published.handle),
            LONG,
            agents.is_fake,
        )
        if agents.is_fake:
            agents.hold(pair.server)
        with spawn(nixl_in_processes.fetch, *agents_of_the_reader) as reader:
            reader.receive()
            # The large one: the lease of the small one may still be there.
            wait_until(lambda: is_read(pair.there, published.handle), "it fetches", LONG)
            reader.stop()
            wait_until(lambda: pair.server.stats().given_back == 1, "it had enough", LONG)
            agents.go_on()
            reader.resume()
            reader.hear("PeerDiedError")
        assert_nothing_held(pair.here)
        assert_fetchable(pair.there, published)
