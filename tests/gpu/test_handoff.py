"""Handoffs between processes with busy streams: nothing read too early, nothing overwritten."""

from __future__ import annotations

import contextlib
import os
import time

import pytest
import torch

from shmblocks import BlockHandle, BlockPool, InvalidStateError
from tests.gpu import kit
from tests.support.children import Channel, spawn

MANY = int(os.environ.get("SHMBLOCKS_TEST_HANDOFFS", "10000"))
FEW = 400


def handoffs(name: str, count: int, readers: int, device: str, how: str = "") -> tuple[int, float]:
    """Elements that readers found wrong, and seconds."""
    with kit.create(name, device) as pool, contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(spawn(kit.read_many, name, count, how, device == "cpu"))
            for _ in range(readers)
        ]
        for child in children:
            child.hear("ready", 120)
        source = torch.zeros(kit.TOKENS, kit.WIDTH, dtype=torch.int32, device="cuda")
        started = time.monotonic()
        for seed in range(1, count + 1):
            if seed % 500 == 0:
                print(f"{seed} handoffs in {time.monotonic() - started:.1f} s", flush=True)
            data = kit.write_on_stream(pool, seed, source, readers)
            for child in children:
                child.say((data, seed))
        wrong = sum(int(str(child.result(240))) for child in children)
        seconds = time.monotonic() - started
        torch.cuda.synchronize()
        assert pool.available_blocks() == pool.config.total_blocks
        assert pool.check() == []
    print(f"{count} handoffs to {readers} reader(s), {device}, {how or 'whole'}: "
          f"{wrong} wrong, {seconds:.1f} s")  # fmt: skip
    return wrong, seconds


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_ten_thousand_handoffs_between_two_processes_are_right(pool_name: str, device: str) -> None:
    assert handoffs(pool_name, MANY if device != "cpu" else MANY // 4, 1, device)[0] == 0


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_two_readers_in_two_processes_get_the_same_and_the_blocks_come_back(
    pool_name: str, device: str
) -> None:
    assert handoffs(pool_name, FEW * 2, 2, device)[0] == 0


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
@pytest.mark.parametrize("how", ["no wait", "early release"])
def test_the_same_check_fails_when_a_part_of_the_order_is_left_out(
    pool_name: str, device: str, how: str
) -> None:
    assert handoffs(pool_name, FEW, 1, device, how)[0] > 0


def echo(channel: Channel, name: str) -> None:
    with BlockPool.attach(name, prefault="off") as pool:
        channel.say("ready")
        while (data := channel.receive()) is not None:
            with pool.open(BlockHandle.decode(data)) as lease:  # type: ignore[arg-type]
                channel.say(lease["rows"].cpu().numpy().tobytes())


def test_the_bytes_in_the_other_process_are_those_that_were_written(pool_name: str) -> None:
    with kit.create(pool_name) as pool, spawn(echo, pool_name) as child:
        child.hear("ready", 120)
        for seed in range(20):
            generator = torch.Generator("cuda").manual_seed(seed)
            data = torch.randint(
                -(2**31), 2**31 - 1, (kit.TOKENS, kit.WIDTH), dtype=torch.int32, device="cuda",
                generator=generator,
            )  # fmt: skip
            handle = pool.alloc(kit.TOKENS, timeout=60)
            assert handle is not None
            pool.view(handle)["rows"].copy_(data)
            child.say(pool.publish(handle).encode())
            assert child.receive() == data.cpu().numpy().tobytes()
        child.say(None)


def test_publish_open_and_release_wait_for_no_stream(pool_name: str) -> None:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with kit.create(pool_name) as pool, torch.cuda.stream(stream):
        for _ in range(3):  # the first of everything is slower
            first = pool.alloc(kit.TOKENS)
            assert first is not None
            pool.view(first)
            pool.open(pool.publish(first)).release()
        torch.cuda.synchronize()
        handle = pool.alloc(kit.TOKENS)
        assert handle is not None
        view = pool.view(handle)
        kit.nap(2_000_000_000)
        view["rows"].fill_(1)
        blocked = torch.cuda.Event()  # type: ignore[no-untyped-call]
        blocked.record()
        started = time.monotonic()
        lease = pool.open(pool.publish(handle))
        is_ready = lease.is_ready
        lease.release()
        free = pool.available_blocks()
        seconds = time.monotonic() - started
        assert not blocked.query(), "the stream must still be blocked, or this shows nothing"  # type: ignore[no-untyped-call]
        assert not is_ready
        assert free == pool.config.total_blocks - kit.TOKENS // kit.BLOCK_SIZE
        print(f"publish + open + release + available_blocks on a blocked stream: {seconds:.6f} s")
        assert seconds < 0.1
        torch.cuda.synchronize()
        assert pool.available_blocks() == pool.config.total_blocks


def test_capturing_is_refused_and_a_graph_may_run_within_a_lease(pool_name: str) -> None:
    with kit.create(pool_name) as pool:
        handle = pool.alloc(kit.TOKENS)
        assert handle is not None
        pool.view(handle)["rows"].fill_(3)
        handle = pool.publish(handle)
        with pool.open(handle) as lease:
            rows = lease["rows"]
            total = torch.zeros((), dtype=torch.int64, device="cuda")
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            other = pool.alloc(kit.TOKENS)
            assert other is not None
            with torch.cuda.graph(graph):
                total += rows.sum()
                with pytest.raises(InvalidStateError, match="CUDA graph"):
                    pool.publish(other)
            pool.free(other)
            before = int(total.item())
            graph.replay()
            graph.replay()
            assert int(total.item()) - before == 2 * 3 * kit.TOKENS * kit.WIDTH


def test_record_stream_of_a_pools_tensor_does_no_harm(pool_name: str) -> None:
    with kit.create(pool_name) as pool:
        handle = pool.alloc(kit.TOKENS)
        assert handle is not None
        rows = pool.view(handle)["rows"]
        rows.record_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]
        del rows
        pool.free(handle)
        torch.cuda.synchronize()
        assert pool.available_blocks() == pool.config.total_blocks
