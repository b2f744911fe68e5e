"""Instances that share a pool: who encodes, who loads, who waits, and what is left."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from shmblocks import UNBOUNDED, BlockPool
from shmblocks.cache import TensorCache
from shmblocks.testing import abandon
from shmblocks.vllm import scheduler as scheduler_module
from tests.support.children import fork, wait_until
from tests.vllm import kit
from tests.vllm.conftest import MakeEngine
from tests.vllm.requests import ROWS, WIDTH, Request, content


def put(pool: BlockPool, engine: kit.Engine, name: object, rows: int = ROWS) -> None:
    """Publish an item as another instance would."""
    identifier = name if isinstance(name, str) else content(name)
    cache = TensorCache(pool)
    assert cache.put(engine.side._key(identifier), kit.encoded(identifier, rows))


def is_there(pool: BlockPool, engine: kit.Engine, name: object) -> bool:
    return pool.find(engine.side._key(content(name))) is not None


# ---- sharing ------------------------------------------------------------------------------------


def test_a_second_replica_encodes_nothing_that_the_first_has(engine: MakeEngine) -> None:
    first, second = engine(), engine()
    assert first.step(Request("a", 1, 2), Request("b", 3)) == {"a", "b"}
    assert second.step(Request("c", 3), Request("d", 2, 1)) == {"c", "d"}
    assert len(first.encoded) == 3
    assert second.encoded == []
    size = ROWS * WIDTH * 4
    assert first.counts() == {"misses": 3, "saves": 3, "save_bytes": 3 * size}
    assert second.counts() == {"hits": 3, "loads": 3, "load_bytes": 3 * size}


def test_a_consumer_needs_no_media_for_what_a_producer_has_announced(engine: MakeEngine) -> None:
    producer, consumer = engine("ec_producer"), engine("ec_consumer")
    request = Request("a", 1)
    scheduled, to_encode, passed = producer.schedule([request])
    producer.work(scheduled, to_encode, passed)
    told = producer.finish(request)
    assert told is not None
    assert told[content(1)]["metadata"] == {"image_grid_thw": [1, 2, ROWS]}
    assert consumer.step(Request("b", 1, media=False)) == {"b"}
    assert consumer.encoded == []


def test_a_consumer_saves_nothing_and_claims_nothing(engine: MakeEngine, keeper: BlockPool) -> None:
    consumer = engine("ec_consumer")
    consumer.step(Request("a", 1))
    assert consumer.encoded == [content(1)]
    stats = keeper.cache_stats()
    assert (stats.entries, stats.claims, stats.puts) == (0, 0, 0)


def test_a_producer_does_not_encode_what_another_one_has(engine: MakeEngine) -> None:
    first, second = engine("ec_producer"), engine("ec_producer")
    first.step(Request("a", 1))
    request = Request("b", 1)
    second.work(*second.schedule([request]))
    assert second.encoded == []
    assert content(1) in second.caches[0], "its own cache counts it as there"
    told = second.finish(request)
    assert told is not None
    assert told[content(1)]["metadata"]


def test_each_rank_loads_and_the_first_one_saves(engine: MakeEngine, keeper: BlockPool) -> None:
    first, second = engine(ranks=2), engine(ranks=3)
    first.step(Request("a", 1, 2))
    assert first.counts()["saves"] == 2
    second.step(Request("b", 2, 1))
    assert second.counts()["loads"] == 6
    assert keeper.stats().leases == 0


def test_an_engine_whose_cache_is_too_small_finds_its_own_items_in_the_pool(
    engine: MakeEngine,
) -> None:
    one = engine(room=2)
    for _ in range(3):
        for name in range(6):
            one.step(Request("a", name))
    assert len(one.encoded) == 6
    assert one.counts()["hits"] == 12


def test_other_weights_are_unreachable_after_a_bump(engine: MakeEngine, keeper: BlockPool) -> None:
    old = engine()
    old.step(Request("a", 1))
    keeper.bump_epoch()
    new = engine(weights=1)
    new.step(Request("b", 1))
    assert new.encoded == [content(1)]


def test_instances_of_different_namespaces_share_nothing(engine: MakeEngine) -> None:
    engine().step(Request("a", 1))
    other = engine(namespace="tenant")
    other.step(Request("b", 1))
    assert other.encoded == [content(1)]


# ---- a pool that is too small -------------------------------------------------------------------


def test_an_item_that_fits_no_pool_is_encoded_each_time(engine: MakeEngine) -> None:
    rows = 17 * ROWS * 2
    one = engine(room=1)
    for name in (1, 2, 1):
        one.step(Request("a", name, rows=rows))
    assert len(one.encoded) == 3
    assert one.counts()["no_room"] == 3


def test_working_sets_larger_than_the_pool_are_served_right(engine: MakeEngine) -> None:
    one = engine(room=2)
    for _ in range(2):
        for name in range(40):
            one.step(Request("a", name))
    assert one.counts()["saves"] == 80
    assert one.pool.cache_stats().evictions >= 64


def test_what_was_promised_is_loaded_whatever_is_evicted_meanwhile(
    engine: MakeEngine, keeper: BlockPool
) -> None:
    first, second = engine(), engine()
    first.step(Request("a", 1))
    request = Request("b", 1)
    scheduled, to_encode, passed = second.schedule([request])
    assert to_encode == []
    for name in range(100, 140):
        put(keeper, first, name)
    assert is_there(keeper, first, 1), "a promise is a lease"
    gathered = second.work(scheduled, to_encode, passed)
    assert torch.equal(gathered["b"][0], kit.encoded(content(1)))
    second.finish(request)
    for name in range(200, 240):
        put(keeper, first, name)
    assert not is_there(keeper, first, 1)


def test_what_an_encoder_has_announced_is_not_evicted(
    engine: MakeEngine, keeper: BlockPool
) -> None:
    producer = engine("ec_producer", hold_seconds=60.0)
    producer.step(Request("a", 1))
    for name in range(100, 140):
        put(keeper, producer, name)
    assert is_there(keeper, producer, 1)


def test_what_is_not_in_the_pool_is_not_announced(engine: MakeEngine, keeper: BlockPool) -> None:
    both = engine()
    request = Request("a", 1)
    both.work(*both.schedule([request]))
    keeper.drop_all()
    told = both.finish(request)
    assert told is not None
    assert told[content(1)]["metadata"] == {}


def test_an_encoder_publishes_again_what_was_evicted(engine: MakeEngine, keeper: BlockPool) -> None:
    producer = engine("ec_producer")
    producer.step(Request("a", 1))
    keeper.drop_all()
    request = Request("b", 1)
    producer.work(*producer.schedule([request]))
    assert producer.encoded == [content(1)], "once"
    told = producer.finish(request)
    assert told is not None
    assert told[content(1)]["metadata"]
    assert producer.counts()["saves"] == 2


# ---- waiting for another instance ---------------------------------------------------------------


def test_a_request_waits_for_the_instance_that_encodes_its_item(
    engine: MakeEngine, keeper: BlockPool
) -> None:
    first, second = engine(), engine()
    scheduled, to_encode, passed = first.schedule([Request("a", 1)])
    assert keeper.claimant(first.side._key(content(1))) == first.pool.participant
    assert second.step(Request("b", 1), Request("c", 2)) == {"c"}
    assert second.counts()["waits"] == 1
    first.work(scheduled, to_encode, passed)
    assert second.step(Request("b", 1)) == {"b"}
    assert second.encoded == [content(2)]
    assert second.side.tally.totals["wait_seconds"] > 0


def test_when_the_instance_that_encodes_leaves_the_waiting_one_encodes(
    engine: MakeEngine,
) -> None:
    first, second = engine(), engine()
    first.schedule([Request("a", 1)])
    request = Request("b", 1)
    assert second.step(request) == set()
    first.close()
    assert second.step(request) == {"b"}
    assert second.encoded == [content(1)]


def test_an_instance_waits_no_longer_than_it_was_told(
    engine: MakeEngine, keeper: BlockPool, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = engine(), engine(wait_seconds=0.0)
    scheduled, to_encode, passed = first.schedule([Request("a", 1)])
    assert second.step(Request("b", 1)) == {"b"}
    assert "which another instance encodes" in caplog.text
    first.work(scheduled, to_encode, passed)  # the first one to publish has won
    assert (keeper.cache_stats().puts, keeper.cache_stats().duplicates) == (1, 1)
    assert keeper.cache_stats().claims == 0


def test_the_claim_of_what_was_not_saved_ends_with_the_step(
    engine: MakeEngine, keeper: BlockPool
) -> None:
    first = engine()
    scheduled, _, passed = first.schedule([Request("a", 1)])
    assert keeper.cache_stats().claims == 1
    with pytest.raises(KeyError):
        first.work(scheduled, [], passed)  # its encoder has made nothing
    assert keeper.cache_stats().claims == 0


def test_what_a_stream_is_to_complete_is_waited_for(engine: MakeEngine, keeper: BlockPool) -> None:
    one = engine()
    key = one.side._key(content(1))
    writer = BlockPool.attach(keeper.name, prefault="off")
    publish_in_flight(writer, key)
    assert one.step(Request("a", 1)) == set()
    assert one.counts()["waits"] == 1
    keeper.drop(key)  # as if its stream had failed
    assert one.step(Request("a", 1)) == {"a"}
    writer.close()


def publish_in_flight(pool: BlockPool, key: bytes) -> None:
    handle = pool.alloc(1)
    assert handle is not None
    pool.cache_state.publish(handle, 1, UNBOUNDED, key, 0.0, True)


def test_what_a_dead_stream_was_to_complete_is_encoded_here(
    engine: MakeEngine, keeper: BlockPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_module, "IN_FLIGHT_PATIENCE", 0.0)
    one = engine()
    writer = BlockPool.attach(keeper.name, prefault="off")
    publish_in_flight(writer, one.side._key(content(1)))
    abandon(writer)
    request = Request("a", 1)
    assert one.step(request) == set()
    wait_until(lambda: one.step(request) == {"a"}, "the dead writer is noticed")
    assert one.encoded == [content(1)]


# ---- requests without media ---------------------------------------------------------------------


def test_a_request_without_media_fails_when_nobody_has_its_item(engine: MakeEngine) -> None:
    consumer = engine("ec_consumer")
    request = Request("a", 1, media=False)
    assert consumer.step(request, Request("b", 2)) == {"b"}
    assert consumer.scheduler.take_unavailable_requests() == {"a"}
    assert consumer.scheduler.take_unavailable_requests() == set()
    consumer.finish(request)
    assert consumer.counts()["lost"] == 1


def test_its_item_is_kept_until_it_is_scheduled(engine: MakeEngine, keeper: BlockPool) -> None:
    consumer = engine("ec_consumer")
    put(keeper, consumer, 1)
    request = Request("a", 1, media=False)
    assert consumer.scheduler.ensure_cache_available(request, 0)  # type: ignore[arg-type]
    for name in range(100, 140):
        put(keeper, consumer, name)
    assert consumer.step(request) == {"a"}
    assert keeper.stats().leases == 0


def test_its_item_is_kept_even_when_the_cache_is_cleared(
    engine: MakeEngine, keeper: BlockPool
) -> None:
    consumer = engine("ec_consumer")
    put(keeper, consumer, 1)
    request = Request("a", 1, media=False)
    assert consumer.scheduler.ensure_cache_available(request, 0)  # type: ignore[arg-type]
    keeper.drop_all()
    assert consumer.step(request) == {"a"}
    assert keeper.stats().leases == 0
    assert keeper.available_blocks() == keeper.config.total_blocks


def test_its_leases_come_back_when_it_is_aborted(engine: MakeEngine, keeper: BlockPool) -> None:
    consumer = engine("ec_consumer", ranks=2)
    put(keeper, consumer, 1)
    request = Request("a", 1, media=False)
    assert consumer.scheduler.ensure_cache_available(request, 0)  # type: ignore[arg-type]
    assert keeper.stats().leases == 2
    consumer.finish(request)
    assert keeper.stats().leases == 0


def test_a_request_that_has_its_item_is_not_lost_when_the_pool_evicts_it(
    engine: MakeEngine, keeper: BlockPool
) -> None:
    """As in a prefill in chunks: the request is asked about again and again."""
    consumer = engine("ec_consumer")
    put(keeper, consumer, 1)
    request = Request("a", 1, media=False)
    consumer.work(*consumer.schedule([request]))
    keeper.drop_all()
    assert consumer.schedule([request])[0] == [request]
    request.num_preemptions += 1  # now the engine may have given it up
    consumer._cached.clear()
    assert consumer.schedule([request])[0] == []
    assert consumer.scheduler.take_unavailable_requests() == {"a"}


def test_without_media_an_item_of_another_size_is_none(
    engine: MakeEngine, keeper: BlockPool
) -> None:
    consumer = engine("ec_consumer")
    put(keeper, consumer, 1, rows=8)
    assert consumer.step(Request("a", 1, media=False)) == set()
    assert consumer.scheduler.take_unavailable_requests() == {"a"}
    assert keeper.stats().leases == 0


# ---- identifiers --------------------------------------------------------------------------------


def test_a_reused_uuid_of_another_size_is_noticed_and_encoded(engine: MakeEngine) -> None:
    first, second = engine(), engine()
    first.step(Request("a", "my-uuid"))
    second.step(Request("b", "my-uuid", rows=8))
    assert second.encoded == ["my-uuid"]
    assert second.counts()["mismatches"] == 1


def test_numbered_items_are_never_shared(engine: MakeEngine, keeper: BlockPool) -> None:
    first, second = engine(), engine()
    for each in (first, second):
        each.step(Request("a", "renderer0-mm-7-image-0"))
        assert each.encoded == ["renderer0-mm-7-image-0"]
    assert keeper.cache_stats().lookups == 0


def test_with_content_hashes_alone_no_uuid_is_shared(engine: MakeEngine) -> None:
    engine(only_content_hashes=True).step(Request("a", "my-uuid", 1))
    second = engine(only_content_hashes=True)
    second.step(Request("b", "my-uuid", 1))
    assert second.encoded == ["my-uuid"]


# ---- promises that are not taken ----------------------------------------------------------------


def test_a_promise_that_is_not_scheduled_ends_with_the_pass(
    engine: MakeEngine, keeper: BlockPool
) -> None:
    first, second = engine(), engine()
    first.step(Request("a", 1))
    assert second.scheduler.has_cache_item(content(1))
    assert second.scheduler.has_cache_item(content(1)), "asked again, it is one promise"
    assert keeper.stats().leases == 1
    second.schedule([])
    assert keeper.stats().leases == 0


def test_a_ticket_that_no_worker_takes_is_revoked(
    engine: MakeEngine, keeper: BlockPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = engine(), engine()
    first.step(Request("a", 1))
    second.schedule([Request("b", 1)])  # and its step never runs
    assert keeper.stats().leases == 1
    second.schedule([])
    assert keeper.stats().leases == 1
    monkeypatch.setattr(scheduler_module, "TICKET_SECONDS", -1.0)
    second.schedule([])
    assert keeper.stats().leases == 0


def test_a_broken_promise_stops_the_worker_with_an_error(engine: MakeEngine) -> None:
    first, second = engine(), engine()
    first.step(Request("a", 1))
    scheduled, to_encode, passed = second.schedule([Request("b", 1)])
    second.scheduler.shutdown()
    with pytest.raises(Exception, match="the process that gave it has died or left"):
        second.work(scheduled, to_encode, passed)


def test_what_an_engine_holds_comes_back_when_it_stops(
    engine: MakeEngine, keeper: BlockPool
) -> None:
    first, second = engine(), engine("ec_consumer")
    first.step(Request("a", 1, 2))
    waiting = Request("b", 1, media=False)
    assert second.scheduler.ensure_cache_available(waiting, 0)  # type: ignore[arg-type]
    second.schedule([Request("c", 2)])
    first.schedule([Request("d", 3)])
    assert keeper.stats().leases == 2
    assert keeper.cache_stats().claims == 1
    first.close()
    second.close()
    assert keeper.stats().leases == 0
    assert keeper.cache_stats().claims == 0
    assert [info.role for info in keeper.participants()] == ["keeper"]


def test_the_last_engine_to_stop_removes_the_pool(engine: MakeEngine, pool_name: str) -> None:
    one = engine()
    assert Path(f"/dev/shm/{pool_name}").exists()
    one.close()
    assert not Path(f"/dev/shm/{pool_name}").exists()


# ---- in place -----------------------------------------------------------------------------------


def test_in_place_the_engine_has_the_memory_of_the_pool(
    engine: MakeEngine, keeper: BlockPool
) -> None:
    first, second = engine(), engine(in_place=True, room=1)
    first.step(Request("a", 1))
    second.step(Request("b", 1))
    item = second.caches[0][content(1)]
    with TensorCache(keeper).get(first.side._key(content(1))) as lease:  # type: ignore[union-attr]
        assert torch.equal(item, lease.tensor)
    (entry,) = keeper.entries()
    assert entry.leases == 1, "for as long as the engine's cache has it"
    second.step(Request("c", 2))  # pushes it out
    second.step()
    assert content(1) not in second.caches[0]
    assert [each.leases for each in keeper.entries()] == [0, 0]


# ---- many steps ---------------------------------------------------------------------------------


def test_random_requests_of_two_engines_on_a_small_pool_are_all_served_right(
    engine: MakeEngine, keeper: BlockPool
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    engines = [engine(room=3), engine(room=4, in_place=True), engine("ec_consumer", ranks=2)]
    served = 0
    for number in range(300):
        one = rng.choice(engines)
        names = [min(30, int(rng.expovariate(0.2))) for _ in range(rng.randint(1, 3))]
        requests = [Request(f"{number}-{at}", name) for at, name in enumerate(names)]
        served += len(one.step(*requests))
        if rng.random() < 0.02:
            keeper.drop_all()
    assert served > 300
    assert keeper.check() == []
    for one in engines:
        one.close()
    assert keeper.stats().leases == 0


# ---- a lock that is held ------------------------------------------------------------------------


def test_while_another_process_has_the_lock_every_hook_answers_as_for_a_miss(
    engine: MakeEngine, keeper: BlockPool
) -> None:
    from tests.core.test_mutex import stay_inside

    first, second = engine(), engine("ec_consumer")
    first.step(Request("a", 1))
    request = Request("b", 1)
    needs = Request("c", 1, media=False)
    with fork(stay_inside, keeper.name) as child:
        child.hear("inside")
        assert second.scheduler.ensure_cache_available(request, 0)  # type: ignore[arg-type]
        assert not second.scheduler.ensure_cache_available(needs, 0)  # type: ignore[arg-type]
        assert second.scheduler.take_unavailable_requests() == set(), "it asks again"
        assert not second.scheduler.has_cache_item(content(1))
        assert first.scheduler.has_cache_item(content(1)) is False
        child.say("leave")
        child.result()
    assert second.counts()["lock_timeouts"] == 2
    assert second.step(needs) == {"c"}
