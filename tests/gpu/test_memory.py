"""What it costs: one opening per process, and no GPU memory beyond the pool and one context."""

from __future__ import annotations

import time

import pytest
import torch

from shmblocks import BlockHandle, BlockPool
from tests.gpu import kit
from tests.support.children import Channel, spawn

MIB = 1 << 20


def used_bytes(device: int = 0) -> int:
    """Of the whole device, as NVML counts it."""
    pynvml = pytest.importorskip("pynvml")
    pynvml.nvmlInit()
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(device))
        return int(memory.used)
    finally:
        pynvml.nvmlShutdown()


def settled(device: int = 0) -> int:
    """Used memory once it stops changing: the driver takes back what the dead had with a delay."""
    last, same = used_bytes(device), 0
    end = time.monotonic() + 20
    while same < 5 and time.monotonic() < end:
        time.sleep(0.1)
        now = used_bytes(device)
        same = same + 1 if now == last else 0
        last = now
    return last


def open_often(channel: Channel, name: str) -> int:
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    channel.say("context")
    channel.hear("go on")
    with (
        BlockPool.attach(name, prefault="off") as pool,
        BlockPool.attach(name, prefault="off") as second,
    ):
        handle = BlockHandle.decode(channel.receive())  # type: ignore[arg-type]
        for each in (pool, second):
            lease = each.open(handle)
            assert int(lease["rows"][0, 0].item()) == 7
            lease.release()
        infos = [info for info in pool.participants() if info.has_device_memory]
        assert len(infos) == 3, "the creator and both of ours"
        torch.cuda.synchronize()
        channel.say("opened")
        channel.hear("end")
        return kit.ipc_opens(pool)


def test_attaching_takes_one_ipc_open_and_no_memory(pool_name: str) -> None:
    torch.zeros(1, device="cuda")
    before = settled()
    with kit.create(pool_name, allocations=1024) as pool:
        size = pool.stats().device_bytes
        with_pool = settled()
        assert size <= with_pool - before <= size + 4 * MIB
        handle = pool.alloc(kit.TOKENS)
        assert handle is not None
        pool.view(handle)["rows"].fill_(7)
        handle = pool.publish(handle, readers=2)
        with spawn(open_often, pool_name) as child:
            child.hear("context", 120)
            with_context = settled()
            child.say("go on")
            child.say(handle.encode())
            child.hear("opened", 120)
            with_both = settled()
            child.say("end")
            assert child.result() == 1
        print(
            f"NVML: before {before / MIB:.0f} MiB, + pool of {size / MIB:.0f} MiB: "
            f"{with_pool / MIB:.0f}, + a context: {with_context / MIB:.0f}, + attached, viewed and "
            f"read: {with_both / MIB:.0f}"
        )
        assert with_both - with_context <= 8 * MIB
    torch.cuda.synchronize()
    assert settled() - before <= 4 * MIB


def read_on_second(channel: Channel, name: str) -> str:
    torch.cuda.set_device(1)
    with BlockPool.attach(name, prefault="off") as pool:
        channel.say("attached")
        handle = BlockHandle.decode(channel.receive())  # type: ignore[arg-type]
        with pool.open(handle) as lease:
            rows = lease["rows"]
            assert int((rows != 9).sum().item()) == 0
            device = str(rows.device)
        torch.cuda.synchronize()
        channel.say("read")
        channel.hear("end")
    return device


def test_a_reader_on_another_gpu_makes_no_context_on_the_producers(pool_name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs; this machine has one")
    if not torch.cuda.can_device_access_peer(1, 0):
        pytest.skip("needs peer access between GPU 0 and 1")
    with kit.create(pool_name) as pool:
        handle = pool.alloc(kit.TOKENS)
        assert handle is not None
        pool.view(handle)["rows"].fill_(9)
        before = settled(0)
        with spawn(read_on_second, pool_name) as child:
            child.hear("attached", 120)
            child.say(pool.publish(handle).encode())
            child.hear("read", 120)
            after = settled(0)
            print(f"GPU 0 during a read from GPU 1: {(after - before) / MIB:+.0f} MiB")
            child.say("end")
            assert child.result() == "cuda:1"
        assert after - before < 64 * MIB
        torch.cuda.synchronize()
        assert pool.available_blocks() == pool.config.total_blocks
