"""At start: what the environment says, whether this SGLang fits, and whom a process finds."""

from __future__ import annotations

import importlib.metadata
import logging
import sys
import types
from collections.abc import Iterator

import pytest

from shmblocks import BlockPool
from shmblocks.sglang_plugin import encoder, language, load
from shmblocks.sglang_plugin.attachment import Attachment, role_of
from shmblocks.sglang_plugin.encoder import Sender
from shmblocks.sglang_plugin.hooks import TESTED, are_in_place, what_is_missing
from shmblocks.sglang_plugin.language import Receiver
from shmblocks.sglang_plugin.process import Counters, process
from shmblocks.sglang_plugin.settings import Settings, read_settings
from tests.sglang_plugin import kit
from tests.support.children import run_program


@pytest.fixture
def sglang(
    pool_name: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, types.ModuleType]]:
    monkeypatch.setenv("SHMBLOCKS_SGLANG_POOL", pool_name)
    monkeypatch.setenv("SHMBLOCKS_SGLANG_POOL_MB", "4")
    monkeypatch.setattr(importlib.metadata, "version", lambda _: TESTED[-1])
    with kit.installed() as made:
        yield made


def registry(made: dict[str, types.ModuleType]) -> kit.HookRegistry:
    found = made["sglang.srt.plugins.hook_registry"].HookRegistry
    assert isinstance(found, kit.HookRegistry)
    return found


# --- settings ---------------------------------------------------------------------------------


def test_without_a_pool_the_plug_in_is_not_active() -> None:
    assert read_settings({}) is None
    assert read_settings({"SHMBLOCKS_SGLANG_POOL": ""}) is None


def test_the_environment_says_everything() -> None:
    assert read_settings({"SHMBLOCKS_SGLANG_POOL": "p"}) == Settings("p")
    found = read_settings(
        {
            "SHMBLOCKS_SGLANG_POOL": "p",
            "SHMBLOCKS_SGLANG_POOL_MB": "64",
            "SHMBLOCKS_SGLANG_MIN_BYTES": "0",
            "SGLANG_ENCODER_RECV_TIMEOUT": "30",
            "SHMBLOCKS_SGLANG_GUARD": "0",
            "SHMBLOCKS_SGLANG_VIEW": "1",
            "SHMBLOCKS_SGLANG_PIN": "1",
            "SHMBLOCKS_SGLANG_PIXELS": "1",
            "SHMBLOCKS_SGLANG_STORE": "1",
        }
    )
    assert found == Settings("p", 64 << 20, 0, 30.0, False, True, True, True, True)
    assert found.config().unclaimed_timeout == 30.0


@pytest.mark.parametrize(
    ("name", "value"),
    [("POOL_MB", "much"), ("POOL_MB", "0"), ("MIN_BYTES", "-1"), ("VIEW", "yes"),
     ("UNCLAIMED_TIMEOUT", "nan")],
)  # fmt: skip
def test_what_the_environment_cannot_mean_is_told_by_name(name: str, value: str) -> None:
    variable = f"SHMBLOCKS_SGLANG_{name}"
    with pytest.raises(ValueError, match=f"environment variable {variable}: expected"):
        read_settings({"SHMBLOCKS_SGLANG_POOL": "p", variable: value})


# --- loading ----------------------------------------------------------------------------------


def test_the_entry_point_imports_neither_torch_nor_sglang() -> None:
    program = (
        "import sys; from shmblocks.sglang_plugin import load; load(); "
        "print('torch' in sys.modules, 'sglang' in sys.modules)"
    )
    assert run_program([sys.executable, "-c", program]).stdout.split() == ["False", "False"]


def test_every_hook_is_registered_once(sglang: dict[str, types.ModuleType]) -> None:
    load()
    hooks = (*encoder.HOOKS, *language.HOOKS, *language.GUARD_HOOKS)
    assert [(each.target, each.hook, each.kind.name) for each in registry(sglang).hooks] == [
        (hook.target, hook.function, hook.kind) for hook in hooks
    ]


def test_the_gpu_and_the_guard_are_switches(
    sglang: dict[str, types.ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHMBLOCKS_SGLANG_GUARD", "0")
    monkeypatch.setenv("SHMBLOCKS_SGLANG_PIN", "1")
    load()
    functions = [each.hook for each in registry(sglang).hooks]
    assert encoder.around_compute in functions
    assert language.before_create_req not in functions


def test_without_the_variable_nothing_is_registered(
    sglang: dict[str, types.ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SHMBLOCKS_SGLANG_POOL")
    load()
    assert registry(sglang).hooks == []


def test_a_wrong_variable_is_one_warning_and_no_exception(
    sglang: dict[str, types.ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("SHMBLOCKS_SGLANG_POOL_MB", "much")
    load()
    assert registry(sglang).hooks == []
    assert "not used, embeddings go as bytes: environment variable" in caplog.text


def test_a_method_that_only_a_base_class_has_is_missing(
    sglang: dict[str, types.ModuleType], caplog: pytest.LogCaptureFixture
) -> None:
    """`getattr` would find it there, and SGLang would wrap that one."""
    del sglang[kit.RECEIVER].WaitingZmqRequest._extract_embedding_from_buffer
    load()
    assert registry(sglang).hooks == []
    assert "WaitingZmqRequest._extract_embedding_from_buffer is not defined there" in caplog.text
    assert len([each for each in caplog.records if each.levelno >= logging.WARNING]) == 1


def test_other_parameters_are_another_sglang(
    sglang: dict[str, types.ModuleType], caplog: pytest.LogCaptureFixture
) -> None:
    async def _send(self: object, mm_data: object, embedding: object) -> None:
        """With its arguments the other way round."""

    sglang[kit.SERVER].MMEncoder._send = _send
    load()
    assert registry(sglang).hooks == []
    assert "MMEncoder._send: expected the parameters self, embedding" in caplog.text


def test_a_module_that_is_gone_is_another_sglang(
    sglang: dict[str, types.ModuleType], caplog: pytest.LogCaptureFixture
) -> None:
    del sglang["sglang.srt.utils.network"].NetworkAddress
    assert what_is_missing(encoder.HOOKS)
    load()
    assert registry(sglang).hooks == []
    assert "NetworkAddress" in caplog.text


def test_without_the_guards_target_the_rest_goes_on(
    sglang: dict[str, types.ModuleType], caplog: pytest.LogCaptureFixture
) -> None:
    del sglang[kit.RECEIVER].MMReceiverBase.create_req
    load()
    assert len(registry(sglang).hooks) == len(encoder.HOOKS) + len(language.HOOKS)
    assert "no guard" in caplog.text


def test_a_version_that_was_not_tested_is_told_and_goes_on(
    sglang: dict[str, types.ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.9.0")
    load()
    assert registry(sglang).hooks
    assert "SGLang 0.9.0 was not tested" in caplog.text


def test_a_hook_that_sglang_did_not_apply_is_found(
    sglang: dict[str, types.ModuleType], caplog: pytest.LogCaptureFixture
) -> None:
    load()
    registry(sglang).apply("release")
    assert are_in_place(language.HOOKS)
    assert not are_in_place(encoder.HOOKS)
    assert "SGLang has not applied the hooks on" in caplog.text
    assert "ZmqDelivery.release" in caplog.text


# --- attaching --------------------------------------------------------------------------------


def test_encoder_and_rank_find_each_other(
    sglang: dict[str, types.ModuleType], pool_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    load()
    registry(sglang).apply()
    with caplog.at_level(logging.WARNING):
        sglang[kit.SERVER].MMEncoder(None)
        sglang[kit.RECEIVER].MMReceiverBase(None, scheduler=object())
    assert Sender.active is not None
    assert Receiver.active is not None
    role = role_of("127.0.0.1:5555")
    assert f"{role} attached to pool /{pool_name} of 4 MiB (not pinned)" in caplog.text
    assert kit.pool_of(Sender.active).find_participant(role) is not None


@pytest.mark.parametrize("backend", ["zmq_to_tokenizer", "mooncake"])
def test_with_another_transfer_backend_nobody_attaches(
    sglang: dict[str, types.ModuleType], backend: str
) -> None:
    load()
    registry(sglang).apply()
    sglang[kit.SERVER].MMEncoder.transfer_backend = backend
    sglang[kit.RECEIVER].MMReceiverBase.encoder_transfer_backend = backend
    sglang[kit.SERVER].MMEncoder(None)
    sglang[kit.RECEIVER].MMReceiverBase(None)
    assert (Sender.active, Receiver.active) == (None, None)


def test_a_process_whose_hooks_are_not_in_place_does_not_attach(
    sglang: dict[str, types.ModuleType],
) -> None:
    """So that the encoder sends it bytes."""
    load()
    registry(sglang).apply("_drain_scheduler_embeddings")
    sglang[kit.RECEIVER].MMReceiverBase(None)
    assert Receiver.active is None


def test_a_pool_of_another_size_is_told_and_tried_again(
    pool_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    attachment = Attachment(kit.settings(pool_name), "one")
    with BlockPool.create(pool_name, kit.settings(pool_name, pool_bytes=8 << 20).config()):
        assert attachment.pool() is None
        assert "it exists with another config: total_tokens is 2048, not 1024" in caplog.text
        assert attachment.pool() is None, "not again at once"
    attachment._next_attempt = 0.0
    assert attachment.pool() is not None
    attachment.close()


def test_a_role_is_an_address_of_this_network_namespace() -> None:
    role = role_of("127.0.0.1:5555")
    assert role.startswith("sgl1 127.0.0.1:5555 4026")
    longest = "[" + ":".join(["ffff"] * 8) + "]:65535"
    assert len(role_of(longest).encode()) <= 63
    assert role_of(longest + "0" * 20) != role_of(longest + "0" * 21)
    assert len(role_of(longest + "0" * 20)) <= 63


def test_what_was_counted_is_one_line() -> None:
    assert str(Counters()) == "nothing"
    assert str(Counters(handles=3, full=1)) == "handles 3, full 1"


def test_now_and_then_it_says_what_was_counted(
    pool_name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "counters", Counters(handles=3))
    attachment = Attachment(kit.settings(pool_name), "one")
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            attachment._next_reap = attachment._next_report = 0.0
            attachment.look_after()
            attachment.look_after()
    assert caplog.text.count("shmblocks: one: handles 3") == 1
    attachment.close()
