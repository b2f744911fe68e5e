"""Two nodes, as two pools of one machine: what one has encoded, the other fetches by key."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shmblocks import UNBOUNDED, BlockPool
from shmblocks.cache import _DTYPES, _ENTRY, _MARK, FIELD, TensorCache
from shmblocks.lease import Lease
from shmblocks.nodes import Nodes, NodeServer, RemotePool
from shmblocks.nodes import nodes as nodes_module
from shmblocks.nodes.address import Address, address_text
from shmblocks.vllm.config import MAX_NODES, ConnectorConfig
from shmblocks.vllm.fetching import CONNECTIONS, Fetches
from shmblocks.vllm.tally import Tally
from tests.nodes.kit import KEY, LONG, Proxy
from tests.support.children import Channel, fork, run_program, wait_until
from tests.support.naming import new_pool_name
from tests.vllm import kit
from tests.vllm.requests import BLOCK, ROWS, WIDTH, Request, content

# An item that is larger than what sockets hold in one piece: a fetch can be stopped in its middle.
MANY_ROWS = 16 * ROWS  # 32 KiB of fp32
MIDDLE = 20_000


class TwoNodes:
    """This node, and one that owns every key, since it is the only one in the list."""

    def __init__(self, here: BlockPool, there: BlockPool, key_file: Path) -> None:
        self.here = here
        self.there = there
        self.server = NodeServer(there, ("127.0.0.1", 0), key=KEY)
        self._key_file = key_file
        self._engines: list[kit.Engine] = []

    def engine(
        self, role: str = "ec_both", *nodes: Address, on: BlockPool | None = None, **more: object
    ) -> kit.Engine:
        """An engine of this node (`on`: of another one); `nodes`: others than the server's."""
        settings: dict[str, Any] = {
            "nodes": [address_text(node) for node in nodes or (self.server.address,)],
            "nodes_key_file": str(self._key_file),
            **more,
        }
        made = kit.Engine((on or self.here).name, role, **settings)
        self._engines.append(made)
        return made

    def put(self, engine: kit.Engine, name: object, rows: int = ROWS) -> None:
        """Publish an item on the other node."""
        identifier = content(name)
        cache = TensorCache(self.there)
        assert cache.put(engine.side._key(identifier), kit.encoded(identifier, rows))

    def close(self) -> None:
        for each in self._engines:
            each.close()
        self._engines.clear()
        self.server.close()


@pytest.fixture
def two(tmp_path: Path) -> Iterator[TwoNodes]:
    """Entries may stay in both pools, and nothing else."""
    key_file = tmp_path / "key"
    key_file.write_bytes(KEY)
    wanted = ConnectorConfig.of(kit.extra("any")).pool_config()
    with (
        BlockPool.create(new_pool_name(), wanted, role="keeper", prefault="off") as here,
        BlockPool.create(new_pool_name(), wanted, role="keeper", prefault="off") as there,
    ):
        nodes = TwoNodes(here, there, key_file)
        try:
            yield nodes
        finally:
            nodes.close()
        assert not [each for each in threading.enumerate() if "vllm-nodes" in each.name]
        for pool in (here, there):
            assert len(pool.participants()) == 1
            assert pool.stats().leases == 0
            assert pool.cache_stats().claims == 0
            pool.drop_all()
            assert pool.available_blocks() == pool.config.total_blocks
            assert pool.check() == []
    vars(nodes).clear()


def serve(engine: kit.Engine, *requests: Request) -> None:
    """Step until all of them have run."""
    left = {request.request_id: request for request in requests}

    def all_have_run() -> bool:
        for request_id in engine.step(*left.values()):
            del left[request_id]
        return not left

    wait_until(all_have_run, f"{sorted(left)} have run", LONG)
    settle(engine)


def settle(engine: kit.Engine) -> None:
    """Wait for fetches that go on (an entry is there before its fetch has ended)."""
    fetches = engine.side._fetches
    assert fetches is not None
    wait_until(lambda: not fetches._under_way, "no fetch is under way", LONG)
    engine.step()


# ---- fetched ------------------------------------------------------------------------------------


def test_what_another_node_has_encoded_is_fetched_and_not_encoded_again(two: TwoNodes) -> None:
    there, here = two.engine(on=two.there), two.engine()
    serve(there, Request("a", 1, 2))
    assert there.encoded == [content(1), content(2)]
    request = Request("b", 2, 1)
    assert here.step(request, Request("c", 1)) == set(), "held, as for one who encodes"
    serve(here, request)
    serve(here, Request("d", 1))
    assert here.encoded == []
    counts = here.counts()
    assert (counts["fetches"], counts["fetch_bytes"]) == (2, 2 * BLOCK)
    assert (counts["hits"], counts.get("misses", 0), counts.get("fetch_failures", 0)) == (2, 0, 0)
    assert here.side.tally.totals["fetch_seconds"] > 0
    wait_until(lambda: two.server.stats().fetched == 2, "every `Done` is there", LONG)


def test_the_counts_are_among_the_statistics(two: TwoNodes) -> None:
    here = two.engine()
    two.put(here, 1)
    serve(here, Request("a", 1))
    stats = here.scheduler.get_ec_connector_stats()
    assert stats is not None
    assert (stats.data["fetches"], stats.data["waits"]) == (1, 1)


def test_instances_of_one_node_fetch_an_item_once(two: TwoNodes) -> None:
    first, second = two.engine(), two.engine()
    two.put(first, 1)
    with Proxy(two.server.address) as proxy:
        proxy.stall_after(0)
        slow = two.engine("ec_both", proxy.address)
        assert slow.step(Request("a", 1)) == set()
        assert proxy.has_stalled.wait(LONG)
        assert first.step(Request("b", 1)) == set()
        assert second.step(Request("c", 1)) == set()
        proxy.go_on()
        for each, request_id in ((slow, "a"), (first, "b"), (second, "c")):
            serve(each, Request(request_id, 1))
            assert each.encoded == []
        slow.close()
    assert two.server.stats().fetched == 1


def test_a_request_without_media_finds_its_item_on_the_node_of_the_encoder(two: TwoNodes) -> None:
    producer = two.engine("ec_producer", on=two.there)
    consumer = two.engine("ec_consumer", ranks=2)
    request: Any = Request("a", 1)
    ask = producer.scheduler.ensure_cache_available
    wait_until(lambda: ask(request, 0), "the producer knows that it is the owner", LONG)
    producer.work(*producer.schedule([request]))
    told = producer.finish(request)
    assert told is not None
    assert told[content(1)]["metadata"]
    serve(consumer, Request("b", 1, media=False))
    assert consumer.counts()["loads"] == 2
    assert consumer.scheduler.take_unavailable_requests() == set()


def test_the_own_node_is_recognised_in_the_list(two: TwoNodes) -> None:
    """The list is the same on all nodes."""
    with NodeServer(two.here, ("127.0.0.1", 0), key=KEY) as own:
        both = own.address, two.server.address
        here = two.engine("ec_both", *both)
        with Nodes(two.here, both, key=KEY) as nodes:
            owners = {name: nodes.owner_of(here.side._key(content(name))) for name in range(100)}
        ours, theirs = ([name for name in owners if owners[name] == node][:3] for node in both)
        for name in ours + theirs:
            two.put(here, name)
            serve(here, Request("a", name))
        assert here.encoded == [content(name) for name in ours]
        assert here.counts()["fetches"] == 3
        assert own.stats().fetched == 0
        here.close()


# ---- not fetched --------------------------------------------------------------------------------


def test_what_the_owner_has_not_got_is_encoded_here(two: TwoNodes) -> None:
    here = two.engine()
    serve(here, Request("a", 1))
    assert here.encoded == [content(1)]
    counts = here.counts()
    assert (counts["fetch_misses"], counts["misses"], counts["saves"]) == (1, 1, 1)
    assert "fetches" not in counts


def test_a_request_asks_the_owner_once(two: TwoNodes) -> None:
    """However often it is asked about before there is room for it."""
    here = two.engine()
    request: Any = Request("a", 1)
    assert here.scheduler.ensure_cache_available(request, 0) is False
    ask = here.scheduler.ensure_cache_available
    wait_until(lambda: ask(request, 0), "the owner has not got it", LONG)
    two.put(here, 1)
    assert all(ask(request, 0) for _ in range(5))
    here.finish(request)
    assert ask(request, 0) is False, "as another request"
    serve(here, request)
    assert here.counts()["fetch_misses"] == 1
    assert here.counts()["fetches"] == 1


def test_a_request_without_media_fails_when_the_owner_has_not_got_its_item(two: TwoNodes) -> None:
    consumer = two.engine("ec_consumer")
    request = Request("a", 1, media=False)
    lost = set[str]()

    def is_lost() -> bool:
        assert consumer.step(request) == set()
        lost.update(consumer.scheduler.take_unavailable_requests())
        return bool(lost)

    wait_until(is_lost, "it fails", LONG)
    consumer.finish(request)
    assert lost == {"a"}


def test_an_item_of_another_size_is_encoded_here(two: TwoNodes) -> None:
    here = two.engine()
    two.put(here, 1, rows=8)
    serve(here, Request("a", 1))
    assert here.encoded == [content(1)]
    assert (here.counts()["fetches"], here.counts()["mismatches"]) == (1, 1)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("fp32", (2 * MANY_ROWS, WIDTH)), ("fp64", (MANY_ROWS, WIDTH)), ("fp32", (MANY_ROWS, 0))],
)
def test_an_entry_that_contradicts_itself_is_no_item(
    two: TwoNodes, dtype: str, shape: tuple[int, int]
) -> None:
    here = two.engine()
    key = here.side._key(content(1))
    with two.there.reserve(MANY_ROWS * WIDTH * 4 // BLOCK) as reservation:
        reservation.memory(FIELD)[:4] = b"junk"
        entry = _ENTRY.pack(_MARK, _DTYPES.index(dtype), 2, *shape, *[0] * 6)
        reservation.memory("aux")[: len(entry)] = entry
        reservation.publish(readers=UNBOUNDED, key=key)
    serve(here, Request("a", 1, rows=MANY_ROWS))
    assert here.encoded == [content(1)]
    assert here.counts()["fetch_failures"] == 1
    # The right one is there now; or none, if this came between its publish and its drop.
    found = TensorCache(two.here).get(key)
    if found is not None:
        with found:
            assert torch.equal(found.tensor, kit.encoded(content(1), MANY_ROWS))


def test_a_pool_without_room_is_a_miss(two: TwoNodes) -> None:
    here = two.engine()
    two.put(here, 1)
    with two.here.reserve(two.here.config.total_tokens):
        serve(here, Request("a", 1))
    assert here.encoded == [content(1)]


# ---- owners that fail ---------------------------------------------------------------------------


def serve_until_killed(channel: Channel, pool: str) -> None:
    with (
        BlockPool.attach(pool, prefault="off") as there,
        NodeServer(there, ("127.0.0.1", 0), key=KEY) as server,
    ):
        channel.say(server.address)
        channel.hear("never", LONG)


def test_an_owner_that_is_killed_during_the_fetch_makes_a_miss(two: TwoNodes) -> None:
    with fork(serve_until_killed, two.there.name) as child:
        address: Any = child.receive()
        with Proxy(address) as proxy:
            proxy.stall_after(MIDDLE)
            here = two.engine("ec_both", proxy.address)
            two.put(here, 1, rows=MANY_ROWS)
            request = Request("a", 1, rows=MANY_ROWS)
            assert here.step(request) == set()
            assert proxy.has_stalled.wait(LONG)
            child.kill()
            proxy.close()  # what was on its way is lost with the node
            serve(here, request)
            assert here.encoded == [content(1)]
            assert here.counts()["fetch_failures"] == 1
            here.close()
    two.there.reap()


def test_an_owner_that_stands_still_costs_its_deadline_once(two: TwoNodes) -> None:
    with Proxy(two.server.address) as proxy:
        proxy.stall_after(0)
        here = two.engine("ec_both", proxy.address, wait_seconds=0.3)
        two.put(here, 1)
        serve(here, Request("a", 1), Request("b", 2))
        assert set(here.encoded) == {content(1), content(2)}
        assert here.step(Request("c", 3)) == {"c"}, "the owner is not asked for a while"
        here.close()


def test_a_node_that_comes_back_is_asked_again(
    two: TwoNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = two.engine()
    address = two.server.address
    two.server.close()
    serve(here, Request("a", 1))
    two.put(here, 2)
    two.server = NodeServer(two.there, address, key=KEY)
    assert here.step(Request("b", 3)) == {"b"}
    monkeypatch.setattr(nodes_module, "PAUSE", 0.0)
    serve(here, Request("c", 2))
    assert here.encoded == [content(1), content(3)]


def test_what_stands_in_line_for_an_owner_ends_when_that_fails(two: TwoNodes) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as mute,
        closing_fetches(two.here, mute.getsockname(), timeout=LONG) as fetches,
    ):
        keys = [bytes([number] * 16) for number in range(CONNECTIONS + 3)]
        for key in keys:
            fetches.begin(key)
        asked = [mute.accept()[0] for _ in range(CONNECTIONS)]
        assert all(map(fetches.is_under_way, keys))
        for each in asked:
            each.close()
        wait_until(lambda: not any(map(fetches.is_under_way, keys)), "all of them end", LONG)
        tally = Tally()
        fetches.count_in(tally)
        assert tally.totals == {"fetch_failures": len(keys)}
        assert two.here.stats().counters.node_failures == CONNECTIONS, "the others have not asked"
        fetches.begin(keys[0])
        assert not fetches.is_under_way(keys[0]), "it is not asked for a while"


@contextlib.contextmanager
def closing_fetches(pool: BlockPool, address: Address, timeout: float) -> Iterator[Fetches]:
    nodes = Nodes(pool, [address], key=KEY, connections=CONNECTIONS)
    fetches = Fetches(TensorCache(pool), nodes, timeout=timeout)
    try:
        yield fetches
    finally:
        fetches.close()
        fetches.close()


def test_what_is_being_fetched_is_given_back_when_the_engine_stops(two: TwoNodes) -> None:
    with Proxy(two.server.address) as proxy:
        proxy.stall_after(MIDDLE)
        here = two.engine("ec_both", proxy.address)
        two.put(here, 1, rows=MANY_ROWS)
        assert here.step(Request("a", 1, rows=MANY_ROWS)) == set()
        assert proxy.has_stalled.wait(LONG)
        assert two.here.cache_stats().claims == 1
        here.close()
        assert two.here.cache_stats().claims == 0
        assert two.here.available_blocks() == two.here.config.total_blocks
    wait_until(lambda: not two.there.stats().leases, "the server has given its lease back", LONG)


# ---- hooks --------------------------------------------------------------------------------------


def test_no_hook_fetches(two: TwoNodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node is asked on another thread; the hooks answer while it stands still there."""
    fetch: Callable[..., Lease | None] = RemotePool.fetch_key
    asked_on, may_ask = list[threading.Thread](), threading.Event()

    def late(remote: RemotePool, key: bytes, **how: object) -> Lease | None:
        asked_on.append(threading.current_thread())
        may_ask.wait(LONG)
        return fetch(remote, key, **how)

    monkeypatch.setattr(RemotePool, "fetch_key", late)
    here = two.engine()
    two.put(here, 1)
    request = Request("a", 1)
    assert here.step(request) == set()
    wait_until(lambda: asked_on, "the node is asked", LONG)
    assert here.step(request) == set()
    may_ask.set()
    serve(here, request)
    assert here.encoded == []
    assert threading.current_thread() not in asked_on


def test_an_error_in_the_thread_is_told_and_ends_the_wait(
    two: TwoNodes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise LookupError("of a test")

    monkeypatch.setattr(RemotePool, "fetch_key", fails)
    here = two.engine()
    serve(here, Request("a", 1))
    assert here.encoded == [content(1)]
    assert "LookupError: of a test" in caplog.text


# ---- settings -----------------------------------------------------------------------------------

NODE = "127.0.0.1:7400"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"nodes": NODE}, r"Expected `array`, got `str` - at `\$.nodes`"),
        ({"nodes": ["10.0.0.1"]}, "nodes: address: expected HOST:PORT, got '10.0.0.1'"),
        ({"nodes": ["10.0.0.1:99999"]}, "nodes: address: expected .* a port of 0 to 65535"),
        ({"nodes": ["10.0.0.1:0"]}, "nodes: expected the port that the node listens at"),
        ({"nodes": [NODE] * (MAX_NODES + 1)}, f"nodes: expected at most {MAX_NODES}, got"),
        ({"nodes": [NODE], "device": "cuda:0"}, "nodes: expected device 'cpu' with it"),
        ({"nodes": [NODE], "wait_seconds": 0}, "nodes: expected wait_seconds above 0"),
        ({"nodes_key_file": "/key"}, "nodes_key_file: expected `nodes` with it"),
        ({"node": [NODE]}, "unknown node; expected pool, .*, nodes, nodes_key_file"),
    ],
)
def test_wrong_settings_of_nodes_are_errors(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=f"ec_connector_extra_config: .*{said}"):
        ConnectorConfig.of(settings)


def test_a_key_that_is_missing_or_too_short_is_an_error_at_start(
    pool_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SHMBLOCKS_KEY_FILE", raising=False)

    def start(**settings: object) -> None:
        extra = kit.extra(pool_name) | {"nodes": ["10.0.0.1:7400"]} | settings
        kit.new_scheduler(kit.vllm_config("ec_both", extra)).shutdown()

    with pytest.raises(ValueError, match=r"nodes_key_file: .*No such file.*nowhere"):
        start(nodes_key_file=str(tmp_path / "nowhere"))
    short = tmp_path / "short"
    short.write_bytes(b"short")
    with pytest.raises(ValueError, match="nodes_key_file: key: expected at least 16 random bytes"):
        start(nodes_key_file=str(short))
    with pytest.raises(ValueError, match="nodes_key_file: expected the file of a key"):
        start()
    start(nodes=[NODE, "[::1]:7400", "localhost:7400"])
    (tmp_path / "key").write_bytes(KEY)
    start(nodes_key_file=str(tmp_path / "key"))
    monkeypatch.setenv("SHMBLOCKS_KEY_FILE", str(tmp_path / "key"))
    start()
    assert not Path(f"/dev/shm/{pool_name}").exists()


def test_who_has_one_node_imports_no_network() -> None:
    program = (
        "import sys; from shmblocks.vllm import ConnectorConfig; ConnectorConfig.of({})\n"
        "print(*sorted(sys.modules))"
    )
    imported = run_program([sys.executable, "-c", program]).stdout.split()
    assert "shmblocks.nodes" not in imported
