"""Blocks of another node: every byte of them, for any number of readers, whole or in parts."""

from __future__ import annotations

import asyncio
import os
import random
import threading

import pytest

from shmblocks import (
    BlockHandle,
    BlockPool,
    Field,
    ForeignHandleError,
    IncompatibleConfigError,
    InvalidStateError,
    PeerDiedError,
    PoolClosedError,
    PoolConfig,
    PoolTimeoutError,
    StaleHandleError,
)
from shmblocks.nodes import Nodes, NodeServer, RemotePool
from tests.nodes.kit import (
    BLOCK,
    BLOCKS,
    FIELDS,
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
    holds_leases,
    publish,
    read,
    two_nodes,
    two_pools,
)
from tests.support.children import wait_until
from tests.support.naming import new_pool_name

# How many are fetched one after the other; `scripts/nodes-proof` has more.
FETCHES = int(os.environ.get("SHMBLOCKS_NODES_FETCHES", "1000"))


@pytest.mark.parametrize("num_tokens", [1, 3, BLOCK, BLOCK + 1, 31, BLOCKS * BLOCK])
def test_every_field_and_aux_arrive_byte_for_byte(
    pair: Pair, num_tokens: int, rng: random.Random
) -> None:
    published = publish(pair.there, num_tokens, rng)
    assert_arrived(pair.here, pair.remote.fetch(published.handle, timeout=LONG), published)


def test_megabytes_arrive_byte_for_byte(rng: random.Random) -> None:
    with two_nodes(LARGE) as pair:
        published = publish(pair.there, LARGE_TOKENS + 5, rng)
        assert_arrived(pair.here, pair.remote.fetch(published.handle, timeout=LONG), published)


def test_a_pool_without_fields_gives_its_aux(rng: random.Random) -> None:
    with two_nodes(config(fields=())) as pair:
        published = publish(pair.there, 7, rng)
        assert_arrived(pair.here, pair.remote.fetch(published.handle, timeout=LONG), published)


def test_bytes_cross_once_for_all_readers_of_a_node(pair: Pair, rng: random.Random) -> None:
    published = publish(pair.there, 9, rng)
    local = pair.remote.fetch(published.handle, readers=3, timeout=LONG)
    for _ in range(3):
        assert_arrived(pair.here, local, published)
    with pytest.raises(StaleHandleError):
        pair.here.open(local)
    assert pair.server.stats().sent_bytes == 9 * pair.here.config.token_bytes


def test_each_fetch_takes_one_of_the_announced_readers(pair: Pair, rng: random.Random) -> None:
    published = publish(pair.there, 9, rng, readers=2)
    for _ in range(2):
        assert_arrived(pair.here, pair.remote.fetch(published.handle, timeout=LONG), published)
    wait_until(lambda: not pair.there.allocations(), "the last reader's lease has ended")
    with pytest.raises(StaleHandleError, match=r"node 127\.0\.0\.1"):
        pair.remote.fetch(published.handle, timeout=LONG)


def test_the_request_is_shown_while_it_is_fetched(rng: random.Random) -> None:
    with two_nodes(LARGE) as pair, Proxy(pair.server.address) as proxy:
        published = publish(pair.there, LARGE_TOKENS, rng)
        proxy.stall_after(100_000)
        with RemotePool(pair.here, proxy.address, key=KEY) as remote:
            fetching = threading.Thread(
                target=remote.fetch, args=(published.handle,), kwargs={"req_id": "request 7"}
            )
            fetching.start()
            assert proxy.has_stalled.wait(LONG)
            assert [info.req_id for info in pair.here.allocations()] == ["request 7"]
            assert [peer.is_sending for peer in pair.server.stats().peers] == [True]
            assert remote.stats().in_flight == 1
            proxy.go_on()
            fetching.join()
            assert remote.stats().fetched == 1


@pytest.mark.watchdog(120 + FETCHES // 20)
def test_thousands_of_fetches_by_four_threads_lose_nothing(pair: Pair, rng: random.Random) -> None:
    problems: list[BaseException] = []
    seeds = [rng.random() for _ in range(4)]

    def fetch_often(seed: float) -> None:
        own = random.Random(seed)
        try:
            for _ in range(FETCHES // 4):
                published = publish(pair.there, own.randint(1, 30), own)
                local = pair.remote.fetch(published.handle, timeout=LONG)
                assert_arrived(pair.here, local, published)
        except BaseException as error:  # noqa: BLE001 - told by the main thread
            problems.append(error)

    threads = [threading.Thread(target=fetch_often, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert pair.remote.stats().fetched == FETCHES // 4 * 4
    assert len(pair.server.stats().peers) <= 2, "`connections` bounds them"


# ---- asyncio -----------------------------------------------------------------------------------


def test_coroutines_fetch_side_by_side(pair: Pair, rng: random.Random) -> None:
    some = [publish(pair.there, 5, rng) for _ in range(6)]

    async def fetch_all() -> list[BlockHandle]:
        fetches = [pair.remote.fetch_async(each.handle, timeout=LONG) for each in some]
        return await asyncio.gather(*fetches)

    for published, local in zip(some, asyncio.run(fetch_all()), strict=True):
        assert_arrived(pair.here, local, published)


def test_a_cancelled_fetch_gives_everything_back(rng: random.Random) -> None:
    with two_nodes(LARGE) as pair, Proxy(pair.server.address) as proxy:
        published = publish(pair.there, LARGE_TOKENS, rng)
        proxy.stall_after(100_000)

        async def cancel_it(remote: RemotePool) -> None:
            fetching = asyncio.create_task(remote.fetch_async(published.handle, timeout=LONG))
            await asyncio.to_thread(proxy.has_stalled.wait, LONG)
            fetching.cancel()
            with pytest.raises(asyncio.CancelledError):
                await fetching
            assert remote.stats().in_flight == 0

        with RemotePool(pair.here, proxy.address, key=KEY) as remote:
            asyncio.run(cancel_it(remote))
            assert_nothing_held(pair.here)
            assert_fetchable(pair.there, published)


def test_a_fetch_that_is_cancelled_while_it_waits_for_blocks_leaves_no_trace(
    pair: Pair, rng: random.Random
) -> None:
    published = publish(pair.there, 5, rng)

    async def cancel_it() -> None:
        fetching = asyncio.create_task(pair.remote.fetch_async(published.handle, timeout=LONG))
        while not pair.here.waiters():
            await asyncio.sleep(0)
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching

    with pair.here.reserve(BLOCKS * BLOCK):
        asyncio.run(cancel_it())
    assert pair.here.waiters() == []
    assert pair.remote.stats().in_flight == 0
    assert_fetchable(pair.there, published)


# ---- parts -------------------------------------------------------------------------------------


def test_a_fetch_in_two_parts_gives_the_same_bytes(pair: Pair, rng: random.Random) -> None:
    published = publish(pair.there, 31, rng)
    handle = published.handle
    for split in (1, BLOCK, 17, 30):
        last = split == 30
        with pair.here.reserve(split) as first, pair.here.reserve(31 - split + 2) as rest:
            pair.remote.fetch_into(handle, first.handle, num_tokens=split, keep_claim=True)
            pair.remote.fetch_into(
                handle, rest.handle, first_token=split, offset=2, keep_claim=not last
            )
            for field in FIELDS:
                skipped = 2 * field.token_bytes
                joined = bytes(first.memory(field.name)) + rest.memory(field.name)[skipped:]
                assert joined == published.content[field.name]
            assert bytes(first.memory("aux")) == published.content["aux"]
    wait_until(lambda: not pair.there.allocations(), "the last part has used up the claim")


def test_a_part_is_not_published(pair: Pair, rng: random.Random) -> None:
    published = publish(pair.there, 9, rng)
    with pair.here.reserve(9) as landing:
        pair.remote.fetch_into(published.handle, landing.handle)
        with pytest.raises(InvalidStateError):
            pair.here.open(landing.handle)
        local = landing.publish()
    assert_arrived(pair.here, local, published)


@pytest.mark.parametrize(
    ("first_token", "num_tokens", "offset"),
    [(0, 10, 0), (9, None, 0), (-1, 3, 0), (0, 0, 0), (0, 5, 4), (0, 5, -1)],
)
def test_a_part_must_lie_inside_of_both(
    pair: Pair, first_token: int, num_tokens: int | None, offset: int, rng: random.Random
) -> None:
    published = publish(pair.there, 9, rng)
    with pair.here.reserve(8) as landing, pytest.raises(ValueError, match="expected a part"):
        pair.remote.fetch_into(
            published.handle,
            landing.handle,
            first_token=first_token,
            num_tokens=num_tokens,
            offset=offset,
        )
    assert_fetchable(pair.there, published)


def test_a_landing_must_be_a_reservation_of_this_process(pair: Pair, rng: random.Random) -> None:
    published = publish(pair.there, 9, rng)
    landing = publish(pair.here, 9, rng)
    with pytest.raises(InvalidStateError):
        pair.remote.fetch_into(published.handle, landing.handle)
    assert read(pair.here, landing.handle) == landing.content
    assert_fetchable(pair.there, published)


# ---- refusals ----------------------------------------------------------------------------------


def test_what_the_other_node_says_of_a_handle_is_the_readers_error(
    pair: Pair, rng: random.Random
) -> None:
    published = publish(pair.there, 9, rng)
    never = BlockHandle(0, 3, 9, 1 << 40, pair.there.pool_id)
    with pytest.raises(StaleHandleError):
        pair.remote.fetch(never, timeout=LONG)
    with pair.there.open(published.handle), pytest.raises(InvalidStateError, match="every reader"):
        pair.remote.fetch(published.handle, timeout=LONG)
    with pair.there.reserve(5) as unpublished, pytest.raises(InvalidStateError):
        pair.remote.fetch(unpublished.handle, timeout=LONG)
    assert pair.server.stats().refused == 3
    assert pair.remote.stats().failed == 3
    assert len(pair.server.stats().peers) == 1, "a refusal costs no connection"


def test_a_handle_of_a_pool_that_the_node_does_not_serve_is_foreign(
    pair: Pair, rng: random.Random
) -> None:
    published = publish(pair.here, 9, rng)
    with pytest.raises(ForeignHandleError, match="open it there"):
        pair.remote.fetch(published.handle)
    with pytest.raises(ForeignHandleError, match="created anew"):
        pair.remote.fetch(BlockHandle(0, 3, 9, 1, 77), timeout=LONG)
    read(pair.here, published.handle)


def test_a_fake_handle_names_nothing_to_fetch(pair: Pair) -> None:
    with pytest.raises(InvalidStateError, match="fake"):
        pair.remote.fetch(BlockHandle(0, 3, 9, 0, pair.there.pool_id))
    with pytest.raises(TypeError, match="BlockHandle"):
        pair.remote.fetch(b"bytes")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "other",
    [
        config(fields=FIELDS[:-1]),
        config(fields=(*FIELDS[:-1], Field("flags", (), "int8"))),
        config(fields=FIELDS[::-1]),
    ],
    ids=["a field less", "another dtype", "another order"],
)
def test_pools_must_have_the_same_fields(pair: Pair, other: PoolConfig, rng: random.Random) -> None:
    published = publish(pair.there, 9, rng)
    with (
        BlockPool.create(new_pool_name(), other, prefault="off") as pool,
        RemotePool(pool, pair.server.address, key=KEY) as remote,
    ):
        with pytest.raises(IncompatibleConfigError, match="x int32"):
            remote.fetch(published.handle, timeout=LONG)
        assert_nothing_held(pool)
    assert_fetchable(pair.there, published)


# ---- waiting -----------------------------------------------------------------------------------


def test_a_full_destination_takes_no_lease_on_the_other_node(
    pair: Pair, rng: random.Random
) -> None:
    published = publish(pair.there, 9, rng)
    with pair.here.reserve(BLOCKS * BLOCK, req_id="in the way"):
        with pytest.raises(PoolTimeoutError, match="in the way"):
            pair.remote.fetch(published.handle, timeout=0.05)
        assert pair.server.stats().sent_bytes == 0
    assert_arrived(pair.here, pair.remote.fetch(published.handle, timeout=LONG), published)


def test_a_fetch_waits_for_blocks_of_the_own_pool(pair: Pair, rng: random.Random) -> None:
    published = publish(pair.there, 9, rng)
    taken = pair.here.reserve(BLOCKS * BLOCK)
    results: list[BlockHandle] = []
    fetching = threading.Thread(
        target=lambda: results.append(pair.remote.fetch(published.handle, timeout=LONG))
    )
    fetching.start()
    wait_until(pair.here.waiters, "the fetch is in the wait queue")
    assert not holds_leases(pair.there)
    taken.free()
    fetching.join()
    assert_arrived(pair.here, results[0], published)


def test_more_fetches_than_connections_wait_their_turn(rng: random.Random) -> None:
    with two_nodes(LARGE) as pair, Proxy(pair.server.address) as proxy:
        first, second = publish(pair.there, LARGE_TOKENS, rng), publish(pair.there, 9, rng)
        proxy.stall_after(100_000)
        with RemotePool(pair.here, proxy.address, key=KEY, connections=1) as remote:
            fetching = threading.Thread(target=remote.fetch, args=(first.handle,))
            fetching.start()
            assert proxy.has_stalled.wait(LONG)
            with pytest.raises(PoolTimeoutError, match="`connections`"):
                remote.fetch(second.handle, timeout=0.05)
            proxy.go_on()
            assert_arrived(pair.here, remote.fetch(second.handle, timeout=LONG), second)
            fetching.join()


def test_more_connections_than_the_server_takes_are_told_so(rng: random.Random) -> None:
    with two_nodes(max_connections=1) as pair:
        published = publish(pair.there, 9, rng)
        pair.remote.ping()
        with RemotePool(pair.here, pair.server.address, key=KEY) as late:
            with pytest.raises(PoolTimeoutError, match="max_connections"):
                late.fetch(published.handle, timeout=3.0)
            assert pair.server.stats().turned_away >= 1
            assert_nothing_held(pair.here)
            pair.remote.close()
            assert_arrived(pair.here, late.fetch(published.handle, timeout=LONG), published)


# ---- several nodes, several pools --------------------------------------------------------------


def test_the_pool_of_a_handle_says_which_node_is_asked(rng: random.Random) -> None:
    with (
        two_pools() as (here, one),
        two_pools() as (two, three),
        NodeServer(one, ("127.0.0.1", 0), key=KEY) as first,
        NodeServer([two, three], ("127.0.0.1", 0), key=KEY) as second,
        Nodes(here, [first.address, second.address], key=KEY) as nodes,
    ):
        for pool in (three, one, two, one):
            published = publish(pool, 9, rng)
            assert_arrived(here, nodes.fetch(published.handle, timeout=LONG), published)
            published = publish(pool, 9, rng)
            local = asyncio.run(nodes.fetch_async(published.handle, timeout=LONG))
            assert_arrived(here, local, published)
        with here.reserve(9) as landing:
            published = publish(two, 9, rng)
            nodes.fetch_into(published.handle, landing.handle, timeout=LONG)
            assert bytes(landing.memory("x")) == published.content["x"]
        with pytest.raises(ForeignHandleError, match="none of the 2 nodes"):
            nodes.fetch(BlockHandle(0, 1, 1, 1, 77), timeout=LONG)
        for pool in (here, one, two, three):
            assert_nothing_held(pool)


def test_a_handle_of_the_own_pool_is_given_back_unchanged(pair: Pair, rng: random.Random) -> None:
    published = publish(pair.here, 9, rng)
    with Nodes(pair.here, [pair.server.address], key=KEY) as nodes:
        assert nodes.fetch(published.handle) == published.handle
        assert asyncio.run(nodes.fetch_async(published.handle)) == published.handle
    read(pair.here, published.handle)


def test_a_node_that_is_down_hides_no_other(rng: random.Random) -> None:
    with (
        two_pools() as (here, there),
        NodeServer(there, ("127.0.0.1", 0), key=KEY) as server,
    ):
        with NodeServer(here, ("127.0.0.1", 0), key=KEY) as gone:
            down = gone.address
        with Nodes(here, [down, server.address], key=KEY) as nodes:
            published = publish(there, 9, rng)
            assert_arrived(here, nodes.fetch(published.handle, timeout=LONG), published)
            with pytest.raises(PeerDiedError, match="1 of 2 do not answer"):
                nodes.fetch(BlockHandle(0, 1, 1, 1, 77), timeout=LONG)


# ---- closing -----------------------------------------------------------------------------------


def test_a_closed_reader_fetches_no_more(pair: Pair, rng: random.Random) -> None:
    published = publish(pair.there, 9, rng)
    pair.remote.close()
    pair.remote.close()
    with pytest.raises(PoolClosedError):
        pair.remote.fetch(published.handle)
    assert_fetchable(pair.there, published)


def test_closing_a_reader_ends_its_fetches(rng: random.Random) -> None:
    with two_nodes(LARGE) as pair, Proxy(pair.server.address) as proxy:
        published = publish(pair.there, LARGE_TOKENS, rng)
        proxy.stall_after(100_000)
        with RemotePool(pair.here, proxy.address, key=KEY) as remote:
            fetching = Fetching(remote, published.handle)
            assert proxy.has_stalled.wait(LONG)
        fetching.wait()
        assert isinstance(fetching.error, PoolClosedError)
        assert_nothing_held(pair.here)
        assert_fetchable(pair.there, published)


def test_arguments_that_make_no_sense_are_told() -> None:
    address = ("127.0.0.1", 1)
    with two_pools() as (here, _):
        with pytest.raises(ValueError, match="patience"):
            RemotePool(here, address, patience=0.0)
        with pytest.raises(ValueError, match="connections"):
            RemotePool(here, address, connections=0)
        with pytest.raises(ValueError, match="port"):
            RemotePool(here, ("127.0.0.1", 1 << 16))
        with pytest.raises(ValueError, match="key"):
            RemotePool(here, address, key=b"short")
        with pytest.raises(ValueError, match="pools"):
            NodeServer([], address)
