"""`engine="nixl"`: the promises of the streams, with an engine that makes none.

Every test runs with fake agents, which need no NIXL and can be held up where a test wants, and once
more with NIXL's over UCX/TCP where it is installed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import ssl
import sys
from pathlib import Path
from typing import cast

import pytest

from shmblocks import (
    AuthenticationError,
    BlockPool,
    IncompatibleConfigError,
    PeerDiedError,
    PoolClosedError,
    PoolTimeoutError,
)
from shmblocks.cli.main import main
from shmblocks.metrics import read_metrics
from shmblocks.nodes import Nodes, NodeServer, RemotePool, agent_process, nixl_agent
from shmblocks.nodes.agent_messages import unpack_answer
from shmblocks.testing import assert_survives, remember
from tests.nodes import nixl_in_processes
from tests.nodes.kit import (
    BLOCK,
    BLOCKS,
    KEY,
    LARGE,
    LARGE_TOKENS,
    LONG,
    Fetching,
    Pair,
    Published,
    assert_arrived,
    assert_fetchable,
    assert_nothing_held,
    config,
    fill,
    holds_leases,
    publish,
    publish_entry,
    read,
    two_nodes,
    two_pools,
)
from tests.nodes.nixl_kit import (
    TOTAL_BYTES,
    Agents,
    agent_of,
    assert_quarantine_ends,
    current_agent,
    has_ended,
    processes_of,
    two_nixl_nodes,
    wait_for_read,
    wait_for_rows,
)
from tests.support.children import run_in_child, run_in_fork, run_program, spawn, wait_until
from tests.support.naming import new_pool_name

ENTRY = b"the key of 16 B."
# Tokens and bytes of a second fetch beside a large one.
SMALL_TOKENS = 128
SMALL_BYTES = SMALL_TOKENS * 4096
PATIENCE = 1.0


def warm_up(pair: Pair, rng: random.Random) -> None:
    """One fetch, so that the agents are there and know each other."""
    published = publish(pair.there, 1, rng)
    assert_arrived(pair.here, pair.remote.fetch(published.handle, timeout=LONG), published)


def assert_arrives_elsewhere(pair: Pair, published: Published) -> None:
    """The same handle can be fetched by another agent, into another pool."""
    with (
        BlockPool.create(new_pool_name(), LARGE, prefault="off") as pool,
        RemotePool(pool, pair.server.address, key=KEY, engine="nixl") as remote,
    ):
        assert_arrived(pool, remote.fetch(published.handle, timeout=LONG), published)
        assert_nothing_held(pool)


def clear(pool: BlockPool) -> None:
    """Zeros in all blocks."""
    with pool.reserve(pool.config.total_tokens, timeout=LONG) as everything:
        memory = everything.memory("x")
        memory[:] = bytes(len(memory))


def publish_when_free(pool: BlockPool, rng: random.Random) -> Published:
    """As `publish`, of blocks that have to come back first."""
    with pool.reserve(LARGE_TOKENS, timeout=LONG) as reservation:
        content = fill(reservation, rng)
        return Published(reservation.publish(), content)


# ---- bytes -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("agents")
def test_every_field_and_aux_arrive_byte_for_byte(rng: random.Random) -> None:
    with two_nixl_nodes(config()) as pair:
        for num_tokens in (1, 3, BLOCK, BLOCK + 1, 31, BLOCKS * BLOCK):
            published = publish(pair.there, num_tokens, rng)
            assert_arrived(pair.here, pair.remote.fetch(published.handle, timeout=LONG), published)
            assert_nothing_held(pair.there)
        size = (1 + 3 + BLOCK + BLOCK + 1 + 31 + BLOCKS * BLOCK) * pair.here.config.token_bytes
        stats = pair.remote.stats()
        assert (stats.fetched, stats.failed, stats.received_bytes) == (6, 0, size)
        assert (stats.quarantined, pair.server.stats().sent_bytes) == (0, size)
        assert_nothing_held(pair.here)


@pytest.mark.usefixtures("agents")
def test_parts_land_where_they_belong(rng: random.Random) -> None:
    with two_nixl_nodes(config()) as pair:
        published = publish(pair.there, 21, rng)
        with pair.here.reserve(30, timeout=0.0) as landing:
            for first, count in ((0, 8), (8, 1), (9, 12)):
                pair.remote.fetch_into(
                    published.handle,
                    landing.handle,
                    first_token=first,
                    num_tokens=count,
                    offset=5 + first,
                    keep_claim=first + count < 21,
                    timeout=LONG,
                )
            for field in pair.here.config.fields:
                start = 5 * field.token_bytes
                rows = bytes(landing.memory(field.name))[start : start + 21 * field.token_bytes]
                assert rows == published.content[field.name]
            assert bytes(landing.memory("aux")) == published.content["aux"]
        assert_nothing_held(pair.here)
        assert_nothing_held(pair.there)


@pytest.mark.usefixtures("agents")
def test_by_key_in_asyncio_and_with_a_checksum(rng: random.Random) -> None:
    with two_nixl_nodes(config(), checksum=True) as pair:
        published = publish(pair.there, 9, rng)
        local = asyncio.run(pair.remote.fetch_async(published.handle, timeout=LONG))
        assert_arrived(pair.here, local, published)
        entry = publish_entry(pair.there, ENTRY, 9, rng)
        lease = pair.remote.fetch_key(ENTRY, timeout=LONG)
        assert lease is not None
        with lease:
            assert bytes(lease.memory("x")) == entry.content["x"]
        pair.here.drop_all()
        wait_until(lambda: not holds_leases(pair.there), "it is confirmed", LONG)
        pair.there.drop_all()
        assert_nothing_held(pair.here)
        assert_nothing_held(pair.there)


@pytest.mark.usefixtures("agents")
def test_nodes_fetch_with_it_and_many_threads_share_one_agent(rng: random.Random) -> None:
    with (
        two_nixl_nodes(config()) as pair,
        Nodes(pair.here, [pair.server.address], key=KEY, connections=4, engine="nixl") as nodes,
    ):
        all_of_them = [publish(pair.there, 9, rng) for _ in range(8)]
        (node,) = nodes.nodes
        fetching = [Fetching(node, each.handle) for each in all_of_them]
        for each, published in zip(fetching, all_of_them, strict=True):
            local = each.wait().local
            assert local is not None, each.error
            assert_arrived(pair.here, local, published)
        assert len(processes_of(node)) == 1
        assert_nothing_held(pair.here)


# ---- the lease over there ----------------------------------------------------------------------


def test_the_source_keeps_its_lease_until_the_rows_are_here(
    agents: Agents, rng: random.Random
) -> None:
    with two_nixl_nodes(patience=PATIENCE) as pair:
        warm_up(pair, rng)
        published = publish(pair.there, LARGE_TOKENS, rng)
        agents.hold(pair.server)
        fetching = Fetching(pair.remote, published.handle)
        wait_for_read(pair.remote)
        # Much longer than the server's patience: it hears that the read goes on.
        with pytest.raises(AssertionError, match="waited"):
            wait_until(lambda: not holds_leases(pair.there), "the lease is gone", 2.5 * PATIENCE)
        agents.go_on()
        local = fetching.wait().local
        assert local is not None, fetching.error
        assert_arrived(pair.here, local, published)
        assert_nothing_held(pair.there)
        assert pair.server.stats().given_back == 0


def test_a_lease_that_ended_too_early_means_that_nothing_is_published(
    agents: Agents, rng: random.Random
) -> None:
    """The server closes while an agent reads: all rows may come, and do not count."""
    with two_nixl_nodes() as pair:
        warm_up(pair, rng)
        published = publish(pair.there, LARGE_TOKENS, rng)
        agents.hold(pair.server)
        fetching = Fetching(pair.remote, published.handle)
        wait_for_read(pair.remote)
        pair.server.close()
        agents.go_on()
        assert isinstance(fetching.wait().error, PeerDiedError)
        assert_quarantine_ends(pair.remote)
        assert_nothing_held(pair.here)
        assert_fetchable(pair.there, published)


# ---- quarantine --------------------------------------------------------------------------------


def test_a_deadline_is_kept_and_the_blocks_stay_apart_until_the_agent_has_ended(
    agents: Agents, rng: random.Random, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = LARGE.blocks_for(LARGE_TOKENS)
    with two_nixl_nodes() as pair:
        warm_up(pair, rng)
        published = publish(pair.there, LARGE_TOKENS, rng)
        agents.hold(pair.server)
        reader = agent_of(pair.remote)
        fetching = Fetching(pair.remote, published.handle, timeout=1.0)
        wait_for_read(pair.remote)
        # The agent cannot end by itself: its blocks have to wait until it was killed.
        os.kill(reader, signal.SIGSTOP)
        error = fetching.wait().error
        assert isinstance(error, PoolTimeoutError)
        assert "it waited for its rows, which the NIXL agent reads" in str(error)
        assert pair.remote.stats().quarantined == blocks
        assert pair.here.available_blocks() == LARGE.total_blocks - blocks
        assert not pair.here.reap().blocks
        main(["stat", pair.here.name])
        assert f"{blocks} blocks quarantined" in capsys.readouterr().out
        (counted,) = (
            metric.samples[0].value
            for metric in read_metrics([pair.here.name])
            if metric.name == "shmblocks_node_quarantined_blocks_total"
        )
        assert counted == blocks
        assert not has_ended(reader)
        assert_quarantine_ends(pair.remote)
        assert has_ended(reader)
        assert_nothing_held(pair.here)
        agents.go_on()
        assert_arrived(pair.here, pair.remote.fetch(published.handle, timeout=LONG), published)
        assert_nothing_held(pair.there)


def test_no_byte_comes_late_into_blocks_that_are_used_again(
    agents: Agents, rng: random.Random
) -> None:
    with two_nixl_nodes() as pair:
        warm_up(pair, rng)
        times_in_the_middle = 0
        for _ in range(10):
            if times_in_the_middle == 2:
                break
            published = publish(pair.there, LARGE_TOKENS, rng)
            clear(pair.here)
            if agents.is_fake:
                agents.hold(pair.server)
            fetching = Fetching(pair.remote, published.handle, timeout=2.0)
            wait_for_rows(pair.here, fetching)
            if not agents.is_fake:
                agents.hold(pair.server)  # in the middle of it
            if (local := fetching.wait().local) is not None:
                # All of it was away before the source was stopped.
                agents.go_on()
                assert_arrived(pair.here, local, published)
                continue
            assert isinstance(fetching.error, PoolTimeoutError)
            times_in_the_middle += 1
            # As soon as they can be had, the blocks are others'.
            others = [publish_when_free(pair.here, rng) for _ in range(2)]
            kept = [remember(pair.here, other.handle) for other in others]
            agents.go_on()
            # Once the source's agent has served somebody else, it has sent what it had to send.
            assert_arrives_elsewhere(pair, published)
            assert [remember(pair.here, each.handle) for each in kept] == kept, "a byte came late"
            for other in others:
                assert read(pair.here, other.handle) == other.content
        assert times_in_the_middle == 2
        assert_nothing_held(pair.here)
        assert_nothing_held(pair.there)


def test_a_read_that_goes_on_keeps_its_agent_and_with_it_the_quarantine_of_another(
    fakes: Agents, rng: random.Random
) -> None:
    with two_nixl_nodes() as pair:
        warm_up(pair, rng)
        first, second = agent_of(pair.remote), publish(pair.there, SMALL_TOKENS, rng)
        published = publish(pair.there, LARGE_TOKENS, rng)
        fakes.hold(pair.server, SMALL_BYTES)
        fakes.hold(pair.server, TOTAL_BYTES)
        going_on = Fetching(pair.remote, second.handle)
        wait_for_read(pair.remote)
        given_up = Fetching(pair.remote, published.handle, timeout=0.5)
        assert isinstance(given_up.wait().error, PoolTimeoutError)
        blocks = LARGE.blocks_for(LARGE_TOKENS)
        assert pair.remote.stats().quarantined == blocks
        # Another fetch goes by another agent meanwhile.
        third = publish(pair.there, 1, rng)
        assert_arrived(pair.here, pair.remote.fetch(third.handle, timeout=LONG), third)
        assert agent_of(pair.remote) != first
        assert pair.remote.stats().quarantined == blocks, "the first agent still reads"
        fakes.untell(f"hold-{SMALL_BYTES}")
        local = going_on.wait().local
        assert local is not None, going_on.error
        assert_arrived(pair.here, local, second)
        assert_quarantine_ends(pair.remote)
        assert_nothing_held(pair.here)
        pair.there.forgo(published.handle)


def test_a_read_that_was_given_up_and_ends_well_is_in_quarantine_no_longer(
    fakes: Agents, rng: random.Random
) -> None:
    with two_nixl_nodes() as pair:
        warm_up(pair, rng)
        second = publish(pair.there, SMALL_TOKENS, rng)
        published = publish(pair.there, LARGE_TOKENS, rng)
        fakes.hold(pair.server, SMALL_BYTES)
        fakes.hold(pair.server, TOTAL_BYTES)
        going_on = Fetching(pair.remote, second.handle)
        wait_for_read(pair.remote)
        given_up = Fetching(pair.remote, published.handle, timeout=0.5)
        assert isinstance(given_up.wait().error, PoolTimeoutError)
        fakes.untell(f"hold-{TOTAL_BYTES}")
        wait_until(lambda: pair.remote.stats().quarantined == 0, "all of it has come", LONG)
        assert pair.remote.stats().in_flight == 1, "the other one goes on"
        fakes.go_on()
        local = going_on.wait().local
        assert local is not None, going_on.error
        assert_arrived(pair.here, local, second)
        assert_nothing_held(pair.here)
        pair.there.forgo(published.handle)


def test_a_failed_read_is_an_error_of_the_node(fakes: Agents, rng: random.Random) -> None:
    fakes.tell(f"fail-{TOTAL_BYTES}")
    with two_nixl_nodes() as pair:
        published = publish(pair.there, LARGE_TOKENS, rng)
        with pytest.raises(PeerDiedError, match="told to fail"):
            pair.remote.fetch(published.handle, timeout=LONG)
        assert_quarantine_ends(pair.remote)
        assert_nothing_held(pair.here)
        assert pair.here.stats().counters.node_quarantined == LARGE.blocks_for(LARGE_TOKENS)
        fakes.untell(f"fail-{TOTAL_BYTES}")
        assert_arrived(pair.here, pair.remote.fetch(published.handle, timeout=LONG), published)


def test_an_agent_that_has_lost_its_connection_is_replaced_within_the_fetch(
    fakes: Agents, rng: random.Random
) -> None:
    with two_nixl_nodes() as pair:
        warm_up(pair, rng)
        first = agent_of(pair.remote)
        published = publish(pair.there, LARGE_TOKENS, rng)
        fakes.tell(f"refuse-{TOTAL_BYTES}")
        assert_arrived(pair.here, pair.remote.fetch(published.handle, timeout=LONG), published)
        assert has_ended(first), "before the other one read into the same blocks"
        assert agent_of(pair.remote) != first
        assert pair.remote.stats().failed == 0
        assert_nothing_held(pair.there)


def test_an_agent_that_does_not_let_itself_be_closed_is_killed(
    fakes: Agents, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_process, "ENDING_PATIENCE", 0.5)
    with two_nixl_nodes() as pair:
        warm_up(pair, rng)
        fakes.tell("hang")
        published = publish(pair.there, LARGE_TOKENS, rng)
        fakes.hold(pair.server)
        with pytest.raises(PoolTimeoutError):
            pair.remote.fetch(published.handle, timeout=0.5)
        assert_quarantine_ends(pair.remote)
        assert_nothing_held(pair.here)
        fakes.go_on()
        assert_arrived(pair.here, pair.remote.fetch(published.handle, timeout=LONG), published)


def test_an_agent_that_says_what_none_says_is_ended(
    fakes: Agents, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that a peer has written over."""
    with two_nixl_nodes() as pair:
        warm_up(pair, rng)
        first = agent_of(pair.remote)
        published = publish(pair.there, LARGE_TOKENS, rng)
        fakes.hold(pair.server)
        fetching = Fetching(pair.remote, published.handle)
        wait_for_read(pair.remote)
        with monkeypatch.context() as patched:
            patched.setattr(agent_process, "unpack_answer", lambda _: unpack_answer(b"garbage"))
            fakes.go_on()
            assert isinstance(fetching.wait().error, PeerDiedError)
        assert has_ended(first)
        assert_nothing_held(pair.here)
        assert_arrived(pair.here, pair.remote.fetch(published.handle, timeout=LONG), published)


def test_a_landing_that_is_freed_after_a_failed_part_waits_for_the_agent(
    agents: Agents, rng: random.Random
) -> None:
    with two_nixl_nodes() as pair:
        warm_up(pair, rng)
        published = publish(pair.there, LARGE_TOKENS, rng)
        agents.hold(pair.server)
        reader = agent_of(pair.remote)
        os.kill(reader, signal.SIGSTOP)
        landing = pair.here.reserve(LARGE_TOKENS, timeout=0.0)
        with pytest.raises(PoolTimeoutError):
            pair.remote.fetch_into(published.handle, landing.handle, timeout=0.5)
        landing.free()
        assert pair.here.available_blocks() < LARGE.total_blocks, "something may still come"
        assert_quarantine_ends(pair.remote)
        assert_nothing_held(pair.here)
        agents.go_on()
        assert_fetchable(pair.there, published)


def test_a_cancelled_fetch_gives_everything_back(agents: Agents, rng: random.Random) -> None:
    async def cancel() -> None:
        fetching = asyncio.create_task(pair.remote.fetch_async(published.handle, timeout=LONG))
        await asyncio.to_thread(wait_for_read, pair.remote)
        fetching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await fetching
        assert fetching.cancelled()

    with two_nixl_nodes() as pair:
        warm_up(pair, rng)
        published = publish(pair.there, LARGE_TOKENS, rng)
        agents.hold(pair.server)
        asyncio.run(cancel())
        assert_quarantine_ends(pair.remote)
        assert_nothing_held(pair.here)
        agents.go_on()
        assert_fetchable(pair.there, published)


def test_closing_in_the_middle_ends_the_agent_before_it_returns(
    agents: Agents, rng: random.Random
) -> None:
    with two_nixl_nodes() as pair:
        warm_up(pair, rng)
        published = publish(pair.there, LARGE_TOKENS, rng)
        agents.hold(pair.server)
        reader = agent_of(pair.remote)
        fetching = Fetching(pair.remote, published.handle)
        wait_for_read(pair.remote)
        pair.remote.close()
        assert has_ended(reader)
        assert isinstance(fetching.wait().error, PoolClosedError)
        assert_nothing_held(pair.here)
        agents.go_on()
        assert_fetchable(pair.there, published)


# ---- deaths ------------------------------------------------------------------------------------


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
            wait_until(lambda: holds_leases(pair.there), "it fetches", LONG)
            reader.stop()
            wait_until(lambda: pair.server.stats().given_back == 1, "it had enough", LONG)
            agents.go_on()
            reader.resume()
            reader.hear("PeerDiedError")
        assert_nothing_held(pair.here)
        assert_fetchable(pair.there, published)


# ---- who may, and with what --------------------------------------------------------------------


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
