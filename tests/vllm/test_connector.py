"""The connector as vLLM finds, makes and asks it: settings, errors at start, statistics."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole

import shmblocks.vllm
from shmblocks import BlockPool, IncompatibleConfigError, SharedMemoryFullError
from shmblocks.vllm import signatures
from shmblocks.vllm.config import ConnectorConfig
from shmblocks.vllm.connector import ShmBlocksECConnector
from shmblocks.vllm.identity import Identity, namespace_of
from shmblocks.vllm.tally import COUNTS
from tests.support.children import run_program
from tests.vllm import kit, stub
from tests.vllm.conftest import MakeEngine
from tests.vllm.requests import Request, content


def make(pool_name: str, role: str = "ec_both", **more: object) -> ShmBlocksECConnector:
    config = kit.vllm_config(role, kit.extra(pool_name), **more)  # type: ignore[arg-type]
    return ShmBlocksECConnector(config, ECConnectorRole.SCHEDULER)


# ---- found by vLLM ------------------------------------------------------------------------------


def test_importing_it_imports_neither_vllm_nor_torch() -> None:
    program = "import sys, shmblocks.vllm; print(*sorted(sys.modules))"
    imported = run_program([sys.executable, "-c", program]).stdout.split()
    assert "shmblocks.vllm.config" in imported
    assert not {"vllm", "torch", "numpy", "prometheus_client"} & set(imported)


def test_the_plugin_makes_it_known_by_its_name_and_may_run_twice() -> None:
    from vllm.distributed.ec_transfer.ec_connector.factory import ECConnectorFactory

    shmblocks.vllm.register()
    shmblocks.vllm.register()
    assert ECConnectorFactory._registry["ShmBlocksECConnector"]() is ShmBlocksECConnector


def test_its_module_path_finds_it_too() -> None:
    assert vars(shmblocks.vllm).get("ShmBlocksECConnector") is None
    assert shmblocks.vllm.__getattr__("ShmBlocksECConnector") is ShmBlocksECConnector
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        shmblocks.vllm.__getattr__("Other")


def test_the_hooks_of_the_base_class_are_those_that_were_tested() -> None:
    from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase

    assert signatures.differences(ECConnectorBase) == []


def test_the_connector_takes_the_arguments_of_the_hooks() -> None:
    for name, expected in signatures.HOOKS.items():
        assert signatures.arguments_of(getattr(ShmBlocksECConnector, name)) == expected, name


def test_what_a_new_vllm_has_changed_is_told_in_a_sentence() -> None:
    class Changed(stub.ECConnectorBase):
        has_cache_item: Any = lambda self, identifier, request: None
        update_state_after_free: Any = None

    Changed.__abstractmethods__ = frozenset({"has_cache_item", "prepare"})
    assert signatures.differences(Changed) == [
        "Changed.has_cache_item takes (identifier, request), expected (identifier)",
        "Changed has no hook update_state_after_free any more",
        "Changed requires a hook prepare, which ShmBlocksECConnector has not",
    ]


# ---- settings -----------------------------------------------------------------------------------


def test_an_unknown_setting_is_an_error_that_names_what_is_known() -> None:
    with pytest.raises(ValueError, match=r"unknown pool_size; expected pool, pool_bytes, .*in_pl"):
        ConnectorConfig.of({"pool": "a", "pool_size": 1})


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("pool_bytes", "8G", r"Expected `int`, got `str` - at `\$.pool_bytes`"),
        ("pool_bytes", 100, "size_bytes: expected at least"),
        ("block_bytes", 1000, "block_bytes: expected a multiple of 4096"),
        ("wait_seconds", -1, "wait_seconds: expected seconds from 0"),
        ("device", "gpu", "device: expected 'cpu' or 'cuda:N'"),
    ],
)
def test_a_wrong_setting_is_an_error(setting: str, value: object, said: str) -> None:
    with pytest.raises(ValueError, match=f"ec_connector_extra_config: .*{said}"):
        ConnectorConfig.of({setting: value})


def test_numbered_items_are_refused_at_start(pool_name: str) -> None:
    with pytest.raises(ValueError, match=r"needs content hashes.*--mm-processor-cache-gb"):
        make(pool_name, processor_cache_gb=0, prefix_caching=False)
    make(pool_name, processor_cache_gb=0).shutdown()
    make(pool_name, prefix_caching=False).shutdown()


def test_an_instance_on_several_nodes_is_refused_at_start(pool_name: str) -> None:
    with pytest.raises(ValueError, match="nnodes=2"):
        make(pool_name, nnodes=2)


def test_a_pool_that_the_machine_cannot_hold_is_refused_at_start(pool_name: str) -> None:
    extra = {"pool": pool_name, "pool_bytes": 1 << 46, "block_bytes": 1 << 26}
    with pytest.raises(SharedMemoryFullError, match="--shm-size"):
        ShmBlocksECConnector(kit.vllm_config("ec_both", extra), ECConnectorRole.SCHEDULER)


def test_a_pool_of_another_size_is_refused_at_start(pool_name: str, keeper: BlockPool) -> None:
    config = kit.vllm_config("ec_both", kit.extra(pool_name, blocks=32))
    for role in ECConnectorRole:
        with pytest.raises(IncompatibleConfigError, match="total_tokens is 16, not 32"):
            ShmBlocksECConnector(config, role)
    assert len(keeper.participants()) == 1


def test_in_place_is_refused_on_a_gpu_and_gpu_memory_without_one(
    pool_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu = kit.vllm_config("ec_both", kit.extra(pool_name, device="cuda:0"))
    with pytest.raises(ValueError, match="device: expected 'cpu' on cpu"):
        ShmBlocksECConnector(on_gpu, ECConnectorRole.WORKER)
    monkeypatch.setattr(stub.Platform, "device_type", "cuda")
    in_place = kit.vllm_config("ec_both", kit.extra(pool_name, in_place=True))
    with pytest.raises(ValueError, match="in_place: expected false on a GPU"):
        ShmBlocksECConnector(in_place, ECConnectorRole.WORKER)


# ---- keys ---------------------------------------------------------------------------------------


def test_whatever_shapes_an_encoding_is_part_of_its_namespace() -> None:
    config = kit.vllm_config("ec_both", {})
    seen = {namespace_of(config, "0.32.0", "").digest()}

    def is_new(version: str = "0.32.0", salt: str = "") -> bool:
        digest = namespace_of(config, version, salt).digest()
        is_known = digest in seen
        seen.add(digest)
        return not is_known

    assert not is_new()
    assert is_new(version="0.33.0")
    assert is_new(salt="tenant")
    model = config.model_config
    for name, value in (
        ("model", "other"),
        ("revision", "main"),
        ("dtype", "bf16"),
        ("quantization", "fp8"),
        ("get_inputs_embeds_size", lambda: 8),
    ):
        setattr(model, name, value)
        assert is_new(), name
    for name in ("vision_config", "audio_config"):
        setattr(model.hf_config, name, SimpleNamespace(to_dict=lambda: {"depth": 3}))
        assert is_new(), name


@pytest.mark.parametrize(
    ("identifier", "is_hash", "is_number"),
    [
        ("ab" * 32, True, False),
        ("ab" * 64, True, False),
        ("lora-1:" + "ab" * 32, True, False),
        ("ab" * 33, False, False),
        ("my-uuid", False, False),
        ("renderer0-mm-7-image-0", False, True),
        ("lora-1:renderer12-mm-7-image-0", False, True),
    ],
)
def test_which_identifiers_may_be_shared(identifier: str, is_hash: bool, is_number: bool) -> None:
    namespace = namespace_of(kit.vllm_config("ec_both", {}), "", "")
    assert Identity(namespace, only_content_hashes=True).may_share(identifier) == is_hash
    identity = Identity(namespace, only_content_hashes=False)
    assert identity.may_share(identifier) != is_number
    assert identity.key(identifier, 1) == namespace.key(identifier, epoch=1)


# ---- what goes wrong ----------------------------------------------------------------------------


def test_an_exception_in_a_hook_of_the_scheduler_stops_no_engine(
    engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = engine()

    def fails(*_: object) -> None:
        raise LookupError("of a test")

    for name in ("is_available", "take_lost", "has", "after_alloc", "after_free", "finished"):
        monkeypatch.setattr(one.side, name, fails)
    request: Any = Request("a", 1)
    hooks = one.scheduler
    assert hooks.ensure_cache_available(request, 0) is True
    assert hooks.take_unavailable_requests() == set()
    assert hooks.has_cache_item(content(1)) is False
    hooks.update_state_after_alloc(request, 0)
    hooks.update_state_after_free(request, 0)
    assert hooks.request_finished(request) == (False, None)
    assert caplog.text.count("LookupError: of a test") == 6


def test_a_save_that_fails_is_a_log_line(
    engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = engine()

    def fails(*_: object) -> None:
        raise RuntimeError("of a test")

    monkeypatch.setattr(one.worker_side()._copies, "save", fails)
    assert one.step(Request("a", 1)) == {"a"}
    assert "stays in this instance: of a test" in caplog.text
    assert one.pool.cache_stats().claims == 0


def test_a_hook_of_the_other_side_says_so(engine: MakeEngine) -> None:
    one = engine()
    output: Any = SimpleNamespace(free_encoder_mm_hashes=[])
    one.scheduler.bind_connector_metadata(one.scheduler.build_connector_meta(output))
    with pytest.raises(RuntimeError, match="expected a worker's connector"):
        one.scheduler.start_load_caches({})


# ---- statistics ---------------------------------------------------------------------------------


def test_statistics_are_drained_added_up_and_survive_a_process_border(
    engine: MakeEngine,
) -> None:
    one, two = engine(), engine()
    one.step(Request("a", 1, 2))
    two.step(Request("b", 1), Request("c", 3))
    stats = two.scheduler.get_ec_connector_stats()
    assert stats is not None
    assert (stats.data["hits"], stats.data["misses"]) == (1, 1)
    assert (stats.data["loads"], stats.data["saves"]) == (1, 1), "the worker's are among them"
    assert two.scheduler.get_ec_connector_stats() is None
    again = ShmBlocksECConnector.build_ec_connector_stats(stats.data)
    both = again.aggregate(one.scheduler.get_ec_connector_stats() or again)
    assert (both.data["hits"], both.data["misses"]) == (1, 3)
    assert both.reduce()["hit_rate"] == 0.25
    assert not both.is_empty()
    both.reset()
    assert both.is_empty()


def test_a_worker_of_the_v2_runner_tells_its_counts_once(engine: MakeEngine) -> None:
    one = engine()
    one.worker_side().tally.add("loads")
    (worker,) = one.workers
    stats = worker.get_ec_connector_stats()
    assert stats is not None
    assert stats.data == {"loads": 1}
    assert worker.build_connector_worker_meta() is None


class FakeCounter:
    """As much of prometheus_client's Counter as is used."""

    made: dict[str, FakeCounter] = {}  # noqa: RUF012  a test clears it

    def __init__(self, name: str, documentation: str, labelnames: list[str]) -> None:
        assert documentation
        self.labelnames = labelnames
        self.values: dict[tuple[object, ...], float] = {}
        FakeCounter.made[name] = self

    def labels(self, *values: object) -> Any:  # noqa: ANN401
        self.values[values] = 0.0

        def inc(amount: float) -> None:
            self.values[values] += amount

        return SimpleNamespace(inc=inc)


def test_every_count_is_a_prometheus_counter_of_its_engine() -> None:
    metrics = ShmBlocksECConnector.build_prom_metrics(
        kit.vllm_config("ec_both", {}),
        {FakeCounter: FakeCounter},
        ["model_name", "engine"],
        {0: ["tiny", "0"], 1: ["tiny", "1"]},
    )
    metrics.observe({"hits": 2, "load_bytes": 10.0, "unknown": 1}, 1)
    assert set(FakeCounter.made) == {f"vllm:ec_shmblocks_{name}" for name in COUNTS}
    hits = FakeCounter.made["vllm:ec_shmblocks_hits"]
    assert hits.values == {("tiny", "0"): 0.0, ("tiny", "1"): 2.0}
