"""What the command line shows of a GPU: before the start, and of a pool in use."""

from __future__ import annotations

import contextlib
import io
import re

import msgspec
import torch

from shmblocks import BlockHandle, BlockPool
from shmblocks.cli.commands import DoctorReport
from shmblocks.cli.main import main
from shmblocks.cli.stat import PoolReport
from tests.gpu import kit
from tests.support.children import Channel, spawn

CUDA_CHECKS = ("cuda-devices", "cuda-bindings", "cuda-pinning", "cuda-stream-words", "cuda-ipc")


def said(*arguments: str) -> str:
    """What a command prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main(arguments)
    return out.getvalue()


def test_doctor_finds_driver_pinning_stream_words_and_ipc_in_order() -> None:
    report = msgspec.json.decode(said("doctor", "--json"), type=DoctorReport)
    checks = {check.name: check for check in report.checks if check.name in CUDA_CHECKS}
    for check in checks.values():
        print(f"{check.status} {check.name}: {check.found}")
    assert {name: check.status for name, check in checks.items()} == dict.fromkeys(
        CUDA_CHECKS, "ok"
    )
    # (Not compared with torch's name, which would start CUDA here: the probe has its own process.)
    assert re.match(r"\d+ x \S", checks["cuda-devices"].found)
    assert "unknown" not in checks["cuda-bindings"].found


def read_and_stay(channel: Channel, name: str) -> None:
    with BlockPool.attach(name, prefault="off", role="reader") as pool:
        lease = pool.open(BlockHandle.decode(channel.receive()))  # type: ignore[arg-type]
        _ = lease["rows"]
        channel.say("reading")
        channel.hear("end", 120)
        lease.release()


def attach_only(channel: Channel, name: str) -> None:
    with BlockPool.attach(name, prefault="off", role="carrier"):
        channel.say("attached")
        channel.hear("end", 120)


def test_stat_says_who_has_the_memory_open_and_what_is_pinned(pool_name: str) -> None:
    with (
        kit.create(pool_name) as pool,
        spawn(read_and_stay, pool_name) as reader,
        spawn(attach_only, pool_name) as carrier,
    ):
        handle = pool.alloc(kit.TOKENS)
        assert handle is not None
        pool.view(handle)["rows"].fill_(1)
        reader.say(pool.publish(handle).encode())
        reader.hear("reading", 120)
        carrier.hear("attached", 120)
        report = msgspec.json.decode(said("stat", pool_name, "--json"), type=PoolReport)
        text = said("stat", pool_name)
        for child in (reader, carrier):
            child.say("end")
            child.result(120)
        torch.cuda.synchronize()
    print(text)
    stats = report.stats
    assert (stats.device, stats.device_state) == ("cuda:0", "exported")
    assert (stats.device_openers, stats.gpu_users) == (2, 2)
    assert stats.device_bytes == pool.config.total_tokens * pool.config.token_bytes
    assert stats.pinned_bytes == 2 * stats.size_bytes
    open_in = {row.role: row.has_device_memory for row in report.participants}
    assert open_in == {"": True, "reader": True, "carrier": False}
    assert text.count("CUDA memory open") == 2
