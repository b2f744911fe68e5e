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

import pytest

from shmblocks import (
    BlockPool,
    PeerDiedError,
    PoolClosedError,
    PoolTimeoutError,
)
from shmblocks.cli.main import main
from shmblocks.metrics import read_metrics
from shmblocks.nodes import Nodes, RemotePool, agent_process
from shmblocks.nodes.agent_messages import unpack_answer
from shmblocks.testing import remember
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
)
from tests.nodes.nixl_kit import (
    TOTAL_BYTES,
    Agents,
    agent_of,
    assert_quarantine_ends,
    has_ended,
    processes_of,
    two_nixl_nodes,
    wait_for_read,
    wait_for_rows,
    warm_up,
)
from tests.support.children import wait_until
from tests.support.naming import new_pool_name

ENTRY = b"the key of 16 B."
# Tokens and bytes of a second fetch beside a large one.
SMALL_TOKENS = 128
SMALL_BYTES = SMALL_TOKENS * 4096
PATIENCE = 1.0


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
