"""`doctor --sglang`: SGLang will find the plug-in, and its pool can be had."""

from __future__ import annotations

from importlib import metadata

import pytest

from shmblocks import BlockPool
from shmblocks.doctor import SGLANG_CHECKS, CheckResult, run_checks
from shmblocks.sglang_plugin.hooks import TESTED
from tests.sglang_plugin import kit


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch, pool_name: str) -> None:
    """A SGLang that was tested, with the plug-in on."""
    monkeypatch.setattr(metadata, "version", lambda _: TESTED[-1])
    monkeypatch.setenv("SHMBLOCKS_SGLANG_POOL", pool_name)
    monkeypatch.setenv("SHMBLOCKS_SGLANG_POOL_MB", "4")
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)


def found() -> dict[str, CheckResult]:
    return {each.name: each for each in run_checks(checks=SGLANG_CHECKS)}


def entry_point(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    points = [
        metadata.EntryPoint(name, "shmblocks.sglang_plugin:load", "sglang.srt.plugins")
        for name in names
    ]
    monkeypatch.setattr(metadata, "entry_points", lambda group: points)


def test_a_deployment_that_fits_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMBLOCKS_SGLANG_POOL_MB", "1024")
    entry_point(monkeypatch, "shmblocks")
    checks = found()
    # (Whether this machine has a gibibyte is not what is tested.)
    del checks["sglang-pool"]
    assert {each.status for each in checks.values()} == {"ok"}


def test_another_version_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: "0.6.0")
    assert found()["sglang-version"].status == "warn"

    def missing(_: str) -> str:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "version", missing)
    assert found()["sglang-version"].status == "fail"


def test_a_plug_in_that_sglang_cannot_see_or_leaves_out_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry_point(monkeypatch, "another")
    assert "no entry point" in found()["sglang-entry-point"].found
    entry_point(monkeypatch, "another", "shmblocks")
    monkeypatch.setenv("SGLANG_PLUGINS", "another")
    assert "leaves the plug-in out" in found()["sglang-entry-point"].found
    monkeypatch.setenv("SGLANG_PLUGINS", "another, shmblocks")
    assert found()["sglang-entry-point"].status == "ok"


def test_variables_that_say_nothing_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMBLOCKS_SGLANG_POOL_MB", "much")
    assert "SHMBLOCKS_SGLANG_POOL_MB" in found()["sglang-settings"].found
    monkeypatch.delenv("SHMBLOCKS_SGLANG_POOL")
    assert "is not set" in found()["sglang-settings"].found


def test_a_small_pool_is_told() -> None:
    assert found()["sglang-pool-size"].status == "warn"


def test_a_pool_of_another_size_is_told(pool_name: str) -> None:
    assert found()["sglang-pool"].found.endswith("can be created")
    with BlockPool.create(pool_name, kit.settings(pool_name).config()):
        assert found()["sglang-pool"].found.endswith("is in use, and fits")
    with BlockPool.create(pool_name, kit.settings(pool_name, pool_bytes=8 << 20).config()):
        assert "another config: total_tokens is 2048, not 1024" in found()["sglang-pool"].found


def test_a_name_that_no_pool_can_have_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMBLOCKS_SGLANG_POOL", "a/b")
    assert found()["sglang-pool"].status == "fail"


def test_without_shared_memory_for_it_the_pool_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for megabytes in (1 << 19, 1 << 30):
        monkeypatch.setenv("SHMBLOCKS_SGLANG_POOL_MB", str(megabytes))
        result = found()["sglang-pool"]
        assert result.status == "fail"
        assert result.advice
