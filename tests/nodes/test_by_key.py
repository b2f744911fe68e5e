"""Entries of a content cache, fetched by key from the node that owns the key."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
from collections import Counter
from collections.abc import Iterator

import pytest

from shmblocks import BlockPool, Field, KeyExistsError, Namespace, PoolClosedError
from shmblocks.lease import Lease
from shmblocks.nodes import Nodes, NodeServer, RemotePool
from shmblocks.nodes import nodes as nodes_module
from shmblocks.nodes.owners import Owners
from tests.nodes.kit import (
    BLOCK,
    BLOCKS,
    KEY,
    LARGE,
    LARGE_TOKENS,
    LONG,
    Pair,
    Proxy,
    Published,
    assert_arrived,
    config,
    content_of,
    holds_leases,
    publish,
    publish_entry,
    two_nodes,
    two_pools,
)
from tests.support.children import wait_until
from tests.support.naming import new_pool_name

ENTRY = b"the key of 16 B."
OTHER = b"another of 32 B." * 2


@pytest.fixture
def entries() -> Iterator[Pair]:
    """A served pool and a reader; entries may stay in both, and nothing else."""
    with two_nodes() as pair:
        yield pair
        for pool in (pair.here, pair.there):
            assert_only_entries(pool)
    vars(pair).clear()


def assert_only_entries(pool: BlockPool) -> None:
    wait_until(lambda: not holds_leases(pool), "no lease is open", LONG)
    assert pool.cache_stats().claims == 0
    pool.drop_all()
    assert pool.available_blocks() == pool.config.total_blocks
    assert pool.check() == []


@contextlib.contextmanager
def nodes_of(pair: Pair, *more: str) -> Iterator[Nodes]:
    with Nodes(pair.here, [pair.server.address, *more], key=KEY) as nodes:
        yield nodes


def assert_leased(lease: Lease | None, published: Published) -> None:
    assert lease is not None
    with lease:
        assert content_of(lease) == published.content


# ---- who owns a key ----------------------------------------------------------------------------

ADDRESSES = [(f"10.0.0.{node}", 7400) for node in range(16)]


def keys_of(count: int) -> list[bytes]:
    namespace = Namespace(model="some-encoder")
    return [namespace.key(f"picture {number}") for number in range(count)]


def test_all_nodes_name_the_same_owner_whatever_the_order_of_their_lists() -> None:
    there, back = Owners(ADDRESSES), Owners(ADDRESSES[::-1])
    for key in keys_of(200):
        assert ADDRESSES[there.owner_of(key)] == ADDRESSES[::-1][back.owner_of(key)]


def test_each_node_owns_about_as_many_keys_as_the_others() -> None:
    owners = Owners(ADDRESSES)
    owned = Counter(owners.owner_of(key) for key in keys_of(16_000))
    # 1,000 each on average; the deviation of such a count is 31.
    assert len(owned) == 16
    assert 800 < min(owned.values()) <= max(owned.values()) < 1200


def test_a_node_that_goes_takes_only_its_own_keys_with_it() -> None:
    whole, less = Owners(ADDRESSES), Owners(ADDRESSES[:-1])
    for key in keys_of(2000):
        owner = whole.owner_of(key)
        if owner != len(ADDRESSES) - 1:
            assert less.owner_of(key) == owner


def test_the_owner_is_an_address_of_the_list(entries: Pair) -> None:
    with nodes_of(entries, "10.0.0.9:7400", "10.0.0.9:7400") as nodes:
        assert len(nodes.nodes) == 2, "an address that stands twice is one node"
        assert nodes.owner_of(ENTRY) in {entries.server.address, ("10.0.0.9", 7400)}
        with pytest.raises(ValueError, match="16 or 32 bytes"):
            nodes.owner_of(b"short")
    with (
        Nodes(entries.here, [], key=KEY) as nobody,
        pytest.raises(ValueError, match="list of nodes is empty"),
    ):
        nobody.owner_of(ENTRY)


# ---- getting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [ENTRY, OTHER], ids=["16 bytes", "32 bytes"])
@pytest.mark.parametrize("num_tokens", [1, BLOCK, 4 * BLOCK + 3])
def test_an_entry_of_the_owner_becomes_an_entry_here(
    entries: Pair, key: bytes, num_tokens: int, rng: random.Random
) -> None:
    published = publish_entry(entries.there, key, num_tokens, rng)
    with nodes_of(entries) as nodes:
        assert_leased(nodes.get(key), published)
        wait_until(lambda: entries.server.stats().fetched == 1, "`Done` is there", LONG)
        assert entries.here.find(key) is not None
        assert_leased(nodes.get(key), published)
        assert_leased(entries.here.get(key, leases=1)[0], published)  # type: ignore[index]
        assert entries.server.stats().fetched == 1, "it crossed once"
    assert entries.there.find(key) is not None, "the owner keeps its own"


def test_what_is_here_is_not_asked_for(entries: Pair, rng: random.Random) -> None:
    published = publish_entry(entries.here, ENTRY, 9, rng)
    with nodes_of(entries) as nodes:
        assert_leased(nodes.get(ENTRY), published)
    assert entries.server.stats().peers == ()


def test_what_nobody_has_is_a_miss_and_leaves_nothing(entries: Pair) -> None:
    with nodes_of(entries) as nodes:
        assert nodes.get(ENTRY) is None
        assert entries.here.cache_stats().claims == 0
        assert nodes.nodes[0].stats().failed == 0
        with pytest.raises(ValueError, match="16 or 32 bytes"):
            nodes.get(b"short")
    with Nodes(entries.here, [], key=KEY) as nobody:
        assert nobody.get(ENTRY) is None


def test_an_entry_of_another_length_is_a_miss(entries: Pair, rng: random.Random) -> None:
    published = publish_entry(entries.there, ENTRY, 9, rng)
    with nodes_of(entries) as nodes:
        assert nodes.get(ENTRY, num_tokens=8) is None
        assert entries.server.stats().fetched == 0
        assert_leased(nodes.get(ENTRY, num_tokens=9), published)
        assert nodes.get(ENTRY, num_tokens=8) is None


def test_another_namespace_is_another_key(entries: Pair, rng: random.Random) -> None:
    ours, theirs = (
        Namespace(model="encoder", revision=revision).key("picture") for revision in ("a", "b")
    )
    publish_entry(entries.there, theirs, 9, rng)
    with nodes_of(entries) as nodes:
        assert nodes.get(ours) is None


def test_a_node_at_another_epoch_has_nothing_for_us(
    entries: Pair, rng: random.Random, caplog: pytest.LogCaptureFixture
) -> None:
    """A key of the same epoch's number says nothing: each pool counts its own."""
    published = publish_entry(entries.there, ENTRY, 9, rng)
    with nodes_of(entries) as nodes, caplog.at_level(logging.WARNING, "shmblocks"):
        entries.there.bump_epoch()
        for _ in range(3):
            assert nodes.get(ENTRY) is None
        assert caplog.text.count("nothing is fetched by key until both are the same") == 1
        entries.here.bump_epoch()
        assert_leased(nodes.get(ENTRY), published)


def test_an_entry_that_is_evicted_after_it_was_found_is_a_miss(
    entries: Pair, rng: random.Random
) -> None:
    publish_entry(entries.there, ENTRY, 9, rng)
    with nodes_of(entries) as nodes:
        conversation = nodes.nodes[0]._conversation
        found = conversation.find

        def find_and_drop(*arguments: object) -> object:
            handle = found(*arguments)  # type: ignore[arg-type]
            entries.there.drop(ENTRY)
            return handle

        vars(conversation)["find"] = find_and_drop
        assert nodes.get(ENTRY) is None
        assert nodes.nodes[0].seconds_since_failure > LONG, "it is no failure of the node"


def test_a_pool_without_room_that_may_be_evicted_makes_a_miss(
    entries: Pair, rng: random.Random
) -> None:
    published = publish_entry(entries.there, ENTRY, 9, rng)
    kept = publish(entries.here, BLOCKS * BLOCK, rng)
    with nodes_of(entries) as nodes:
        assert nodes.get(ENTRY) is None
        entries.here.free(kept.handle)
        assert_leased(nodes.get(ENTRY), published)


def test_an_entry_is_evicted_for_one_that_is_fetched(entries: Pair, rng: random.Random) -> None:
    published = publish_entry(entries.there, ENTRY, 9, rng)
    publish_entry(entries.here, OTHER, BLOCKS * BLOCK, rng)
    with nodes_of(entries) as nodes:
        assert_leased(nodes.get(ENTRY), published)
    assert entries.here.find(OTHER) is None


def test_an_entry_larger_than_the_own_pool_is_a_miss(rng: random.Random) -> None:
    with (
        BlockPool.create(new_pool_name(), config(4), prefault="off") as here,
        BlockPool.create(new_pool_name(), config(), prefault="off") as there,
        NodeServer(there, ("127.0.0.1", 0), key=KEY) as server,
        Nodes(here, [server.address], key=KEY) as nodes,
    ):
        publish_entry(there, ENTRY, 5 * BLOCK, rng)
        assert nodes.get(ENTRY) is None
        assert_only_entries(here)
        assert_only_entries(there)


# ---- one at a time -----------------------------------------------------------------------------


def test_many_who_want_one_key_fetch_it_once(entries: Pair, rng: random.Random) -> None:
    published = publish_entry(entries.there, ENTRY, 9, rng)
    arrived: list[bool] = []
    with contextlib.ExitStack() as stack:
        several = [stack.enter_context(nodes_of(entries)) for _ in range(4)]

        def get(nodes: Nodes) -> None:
            lease = nodes.get(ENTRY, timeout=LONG)
            assert lease is not None
            with lease:
                arrived.append(content_of(lease) == published.content)

        threads = [threading.Thread(target=get, args=(nodes,)) for nodes in several * 3]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert arrived == [True] * 12
        wait_until(lambda: entries.server.stats().fetched >= 1, "`Done` is there", LONG)
        assert entries.server.stats().fetched == 1


def test_a_key_that_is_being_encoded_here_is_waited_for(entries: Pair, rng: random.Random) -> None:
    with (
        BlockPool.attach(entries.here.name, prefault="off") as encoder,
        nodes_of(entries) as nodes,
    ):
        claim = encoder.claim(ENTRY)
        assert nodes.get(ENTRY, timeout=0.05) is None
        found: list[Lease | None] = []
        getting = threading.Thread(target=lambda: found.append(nodes.get(ENTRY, timeout=LONG)))
        getting.start()
        wait_until(
            lambda: entries.here.stats().counters.waits >= 2, "it waits for the encoder", LONG
        )
        published = publish_entry(encoder, ENTRY, 9, rng)
        getting.join()
        assert_leased(found[0], published)
        assert encoder.end_claim(ENTRY, claim) is False, "the publish has ended it"
    assert entries.server.stats().fetched == 0


def test_an_entry_that_comes_here_meanwhile_is_the_one(rng: random.Random) -> None:
    """Somebody encodes without a claim while it is fetched."""
    with two_nodes(LARGE) as pair, Proxy(pair.server.address) as proxy:
        publish_entry(pair.there, ENTRY, LARGE_TOKENS, rng)
        proxy.stall_after(100_000)
        with Nodes(pair.here, [proxy.address], key=KEY) as nodes:
            found: list[Lease | None] = []
            getting = threading.Thread(target=lambda: found.append(nodes.get(ENTRY, timeout=LONG)))
            getting.start()
            assert proxy.has_stalled.wait(LONG)
            mine = publish_entry(pair.here, ENTRY, 64, rng)
            proxy.go_on()
            getting.join()
            assert_leased(found.pop(), mine)
            assert nodes.nodes[0].stats().failed == 1
            assert nodes.nodes[0].seconds_since_failure > LONG
            with pytest.raises(KeyExistsError):
                nodes.nodes[0].fetch_key(ENTRY, timeout=LONG)
        for pool in (pair.here, pair.there):
            assert_only_entries(pool)


# ---- owners that fail --------------------------------------------------------------------------


def test_a_dead_owner_makes_a_miss_and_is_not_asked_again_at_once(
    entries: Pair, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = publish_entry(entries.there, ENTRY, 9, rng)
    with nodes_of(entries) as nodes:
        node = nodes.nodes[0]
        entries.server.close()
        assert nodes.get(ENTRY) is None
        assert node.stats().failed == 1
        assert nodes.get(ENTRY) is None
        assert node.stats().failed == 1, "it was not asked"
        monkeypatch.setattr(nodes_module, "PAUSE", 0.0)
        assert nodes.get(ENTRY) is None
        assert node.stats().failed == 2
        with NodeServer(entries.there, node.address, key=KEY):
            assert_leased(nodes.get(ENTRY), published)


def test_an_owner_that_stands_still_costs_the_deadline_once(
    entries: Pair, rng: random.Random
) -> None:
    published = publish_entry(entries.there, ENTRY, 9, rng)
    with Proxy(entries.server.address) as proxy:
        proxy.stall_after(0)
        with Nodes(entries.here, [proxy.address], key=KEY) as nodes:
            assert nodes.get(ENTRY, timeout=0.2) is None
            assert nodes.get(ENTRY, timeout=LONG) is None
            assert nodes.nodes[0].stats().failed == 1
            nodes.close()
            with pytest.raises(PoolClosedError):
                nodes.nodes[0].fetch_key(ENTRY)
    with nodes_of(entries) as nodes:
        assert_leased(nodes.get(ENTRY), published)


@pytest.mark.parametrize("what", ["another key", "another layout"])
def test_an_owner_that_is_not_ours_makes_a_miss_and_says_why(
    what: str, rng: random.Random, caplog: pytest.LogCaptureFixture
) -> None:
    fields = (Field("x", (4,), "int32"),) if what == "another layout" else config().fields
    key = KEY if what == "another layout" else KEY + b"!"
    with (
        caplog.at_level(logging.WARNING, "shmblocks"),
        BlockPool.create(new_pool_name(), config(), prefault="off") as here,
        BlockPool.create(new_pool_name(), config(fields=fields), prefault="off") as there,
        NodeServer(there, ("127.0.0.1", 0), key=KEY) as server,
        Nodes(here, [server.address], key=key) as nodes,
    ):
        publish_entry(there, ENTRY, 9, rng)
        assert nodes.get(ENTRY) is None
        assert ("keys of the two nodes" if what == "another key" else "x int32[4]") in caplog.text
        assert_only_entries(here)
        assert_only_entries(there)


def test_the_own_node_is_not_asked_for_its_own_keys(rng: random.Random) -> None:
    """The list is the same on all nodes, so that this one stands in it."""
    with (
        two_pools() as (here, there),
        NodeServer(here, ("127.0.0.1", 0), key=KEY) as own,
        NodeServer(there, ("127.0.0.1", 0), key=KEY) as other,
        Nodes(here, [own.address, other.address], key=KEY) as nodes,
    ):
        for number, key in enumerate(keys_of(40)):
            published = publish_entry(there, key, 1 + number % 3, rng)
            if nodes.owner_of(key) == other.address:
                assert_leased(nodes.get(key), published)
            else:
                assert nodes.get(key) is None
            there.drop(key)
        assert [node.is_own for node in nodes.nodes] == [True, False]
        assert own.stats().fetched == own.stats().refused == 0
        assert_only_entries(here)
        assert_only_entries(there)


# ---- asyncio -----------------------------------------------------------------------------------


def test_coroutines_get_by_key(entries: Pair, rng: random.Random) -> None:
    published = [publish_entry(entries.there, key, 5, rng) for key in keys_of(6)]

    async def get_all(nodes: Nodes) -> list[Lease | None]:
        return await asyncio.gather(*(nodes.get_async(key) for key in keys_of(7) * 2))

    with nodes_of(entries) as nodes:
        found = asyncio.run(get_all(nodes))
        for index, lease in enumerate(found):
            if index % 7 == 6:
                assert lease is None
            else:
                assert_leased(lease, published[index % 7])
        wait_until(lambda: entries.server.stats().fetched >= 6, "every `Done` is there", LONG)
        assert entries.server.stats().fetched == 6


def test_a_get_that_is_cancelled_gives_its_claim_and_its_blocks_back(rng: random.Random) -> None:
    with two_nodes(LARGE) as pair, Proxy(pair.server.address) as proxy:
        published = publish_entry(pair.there, ENTRY, LARGE_TOKENS, rng)
        proxy.stall_after(100_000)

        async def cancelled(nodes: Nodes) -> None:
            getting = asyncio.create_task(nodes.get_async(ENTRY, timeout=LONG))
            while not proxy.has_stalled.is_set():
                await asyncio.sleep(0.01)
            getting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await getting
            assert pair.here.available_blocks() == pair.here.config.total_blocks
            assert pair.here.cache_stats().claims == 0
            assert nodes.nodes[0].seconds_since_failure > LONG, "it is no failure of the node"

        with Nodes(pair.here, [proxy.address], key=KEY) as nodes:
            asyncio.run(cancelled(nodes))
        with nodes_of(pair) as nodes:
            assert_leased(nodes.get(ENTRY, timeout=LONG), published)
        for pool in (pair.here, pair.there):
            assert_only_entries(pool)


# ---- several pools of one server ---------------------------------------------------------------


def test_all_pools_of_a_server_that_have_the_layout_are_looked_through(rng: random.Random) -> None:
    other = config(fields=(Field("x", (4,), "int32"),))
    with (
        two_pools() as (here, there),
        BlockPool.create(new_pool_name(), config(), prefault="off") as second,
        BlockPool.create(new_pool_name(), other, prefault="off") as unlike,
        NodeServer([there, unlike, second], ("127.0.0.1", 0), key=KEY) as server,
        RemotePool(here, server.address, key=KEY) as remote,
    ):
        published = publish_entry(second, ENTRY, 9, rng)
        publish_entry(unlike, OTHER, 9, rng)
        assert_leased(remote.fetch_key(ENTRY, timeout=LONG), published)
        assert remote.fetch_key(OTHER, timeout=LONG) is None
        by_handle = publish(there, 9, rng)
        assert_arrived(here, remote.fetch(by_handle.handle, timeout=LONG), by_handle)
        for pool in (here, there, second, unlike):
            assert_only_entries(pool)
