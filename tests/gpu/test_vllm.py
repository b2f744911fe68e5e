"""The connector for vLLM with real tensors and streams, through its own hooks.

vLLM itself need not be installed: its base class is a stub then (`tests/vllm/stub.py`).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch

from shmblocks import BlockPool
from shmblocks.vllm.cuda import CudaCopies
from tests.gpu.kit import LATE_CYCLES, nap
from tests.support.children import Channel, spawn
from tests.vllm import kit, stub
from tests.vllm.requests import ROWS, WIDTH, Request, content

# A pool in shared memory, which each worker pins, and one in the memory of the GPU.
DEVICES = ("cpu", "cuda:0")

MakeEngine = Callable[..., kit.Engine]


def new_engine(pool: str, device: str, role: str = "ec_both", **more: object) -> kit.Engine:
    before = stub.Platform.device_type
    stub.Platform.device_type = "cuda"
    try:
        return kit.Engine(pool, role, compute="cuda", device=device, **more)  # type: ignore[arg-type]
    finally:
        stub.Platform.device_type = before


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def engine(pool_name: str, device: str) -> Iterator[MakeEngine]:
    made: list[kit.Engine] = []

    def make(role: str = "ec_both", **more: object) -> kit.Engine:
        made.append(new_engine(pool_name, device, role, **more))
        return made[-1]

    yield make
    torch.cuda.synchronize()
    for each in made:
        assert each.pool.check() == []
        each.close()


def copies_of(engine: kit.Engine) -> CudaCopies:
    copies = engine.worker_side()._copies
    assert isinstance(copies, CudaCopies)
    return copies


def settle(pool: BlockPool) -> None:
    torch.cuda.synchronize()
    pool.reap()


def test_a_second_replica_loads_what_the_first_has_encoded(engine: MakeEngine) -> None:
    first, second = engine(), engine(ranks=2)
    first.step(Request("a", 1, 2), Request("b", 3))
    torch.cuda.synchronize()
    second.step(Request("c", 3, 1), Request("d", 2))
    assert second.encoded == []
    assert {each.device.type for cache in second.caches for each in cache.values()} == {"cuda"}
    assert second.counts()["loads"] == 6
    settle(first.pool)
    assert first.pool.stats().leases == 0


def test_an_encoder_apart_serves_requests_without_media(engine: MakeEngine) -> None:
    producer, consumer = engine("ec_producer"), engine("ec_consumer")
    producer.step(Request("a", 1))
    torch.cuda.synchronize()
    assert consumer.step(Request("b", 1, media=False)) == {"b"}
    assert consumer.encoded == []


def save(engine: kit.Engine, name: object, cache: dict[str, torch.Tensor]) -> None:
    """One step of its worker in which it has encoded what is in `cache`."""
    _, _, (_, metadata) = engine.schedule([Request("a", name)])
    (worker,) = engine.workers
    worker.bind_connector_metadata(metadata)
    worker.save_caches(encoder_cache=cache, mm_hash=content(name))
    worker.get_finished(set())
    worker.clear_connector_metadata()


def load(engine: kit.Engine, name: object, cache: dict[str, torch.Tensor]) -> None:
    """One step of its worker that loads one item into `cache`."""
    _, _, (_, metadata) = engine.schedule([Request("b", name)])
    (worker,) = engine.workers
    worker.bind_connector_metadata(metadata)
    worker.start_load_caches(cache)
    worker.get_finished(set())
    worker.clear_connector_metadata()


def test_what_is_saved_is_a_hit_when_its_stream_got_there_and_not_before(
    engine: MakeEngine,
) -> None:
    first, second = engine(), engine()
    request = Request("b", 1)
    cache = {content(1): first.encode(content(1), ROWS)}
    nap(LATE_CYCLES)  # the encoder is late, and the host does not wait for it
    save(first, 1, cache)
    assert second.step(request) == set()
    assert second.counts()["waits"] == 1
    torch.cuda.synchronize()
    assert second.step(request) == {"b"}
    assert second.encoded == []


@contextlib.contextmanager
def never_waiting() -> Iterator[None]:
    """What makes the host wait for the GPU is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_saving_and_loading_never_wait_for_the_gpu(engine: MakeEngine) -> None:
    first, second = engine(), engine()
    for name in (0, 1):  # the first one warms up: allocators and streams
        cache = {content(name): first.encode(content(name), ROWS)}
        with never_waiting() if name else contextlib.nullcontext():
            save(first, name, cache)
    torch.cuda.synchronize()
    for name in (0, 1):
        loaded: dict[str, torch.Tensor] = {}
        with never_waiting() if name else contextlib.nullcontext():
            load(second, name, loaded)
        assert torch.equal(loaded[content(name)], first.encode(content(name), ROWS))


def test_an_engine_may_use_the_memory_again_as_soon_as_it_was_saved(engine: MakeEngine) -> None:
    first, second = engine(), engine()
    cache = {content(1): first.encode(content(1), ROWS)}
    with torch.cuda.stream(copies_of(first)._saving):
        nap(LATE_CYCLES)  # the copy is late
    save(first, 1, cache)
    cache.clear()
    for _ in range(8):
        torch.full((ROWS, WIDTH), -1.0, device="cuda")  # would be given the same memory
    torch.cuda.synchronize()
    second.step(Request("b", 1))  # compares
    assert second.encoded == []


def test_an_engine_waits_on_its_stream_for_what_is_loaded_late(engine: MakeEngine) -> None:
    first, second = engine(), engine()
    first.step(Request("a", 1))
    torch.cuda.synchronize()
    with torch.cuda.stream(copies_of(second)._loading):
        nap(LATE_CYCLES)
    loaded: dict[str, torch.Tensor] = {}
    load(second, 1, loaded)
    assert torch.equal(loaded[content(1)], first.encode(content(1), ROWS))
    settle(first.pool)
    assert first.pool.stats().leases == 0


def test_items_are_evicted_and_served_right_in_many_steps(engine: MakeEngine) -> None:
    first, second = engine(room=2), engine(room=3)
    for number in range(60):
        for one in (first, second):
            one.step(Request("a", number % 25), Request("b", (number * 7) % 25))
    torch.cuda.synchronize()
    assert first.pool.cache_stats().evictions > 0


def promise(channel: Channel, pool: str) -> bool:
    """A scheduler in a process that never begins to use CUDA."""
    config = kit.vllm_config("ec_consumer", kit.extra(pool, device="cuda:0"))
    scheduler = kit.new_scheduler(config)
    request = Request("b", 1)
    assert scheduler.ensure_cache_available(request, 0)  # type: ignore[arg-type]
    assert scheduler.has_cache_item(content(1))
    scheduler.update_state_after_alloc(request, 0)  # type: ignore[arg-type]
    assert scheduler.scheduler is not None
    channel.say(scheduler.scheduler.take_plan([]).loads[content(1)][0])
    channel.hear("loaded", 120)
    scheduler.shutdown()
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def test_a_scheduler_promises_what_lies_in_gpu_memory_without_cuda(pool_name: str) -> None:
    one = new_engine(pool_name, "cuda:0")
    try:
        one.step(Request("a", 1))
        torch.cuda.synchronize()
        with spawn(promise, pool_name) as child:
            copies = copies_of(one)
            ticket = child.receive(120)
            assert isinstance(ticket, bytes)
            loaded = copies.load(copies.adopt(ticket))
            copies.join()
            assert torch.equal(loaded, one.encode(content(1), ROWS))
            child.say("loaded")
            assert child.result() is False
    finally:
        torch.cuda.synchronize()
        one.close()


def load_and_compare(channel: Channel, pool: str, device: str) -> int:
    other = new_engine(pool, device)
    channel.say("ready")
    for number in range(20):
        channel.hear(f"saved {number}", 120)
        other.step(Request("b", number))
        channel.say(f"loaded {number}")
    hits = other.counts()["hits"]
    torch.cuda.synchronize()
    other.close()
    return hits


def test_an_instance_in_another_process_finds_it_all(pool_name: str, device: str) -> None:
    one = new_engine(pool_name, device)
    try:
        with spawn(load_and_compare, pool_name, device) as child:
            child.hear("ready", 120)
            for number in range(20):
                one.step(Request("a", number))
                torch.cuda.synchronize()
                child.say(f"saved {number}")
                child.hear(f"loaded {number}", 120)
            assert child.result() == 20
    finally:
        torch.cuda.synchronize()
        one.close()
