"""Deaths with work on the GPU, for real: SIGKILL, then what is left is looked at."""

from __future__ import annotations

import time

import pytest
import torch

from shmblocks import BlockHandle, BlockPool, PeerDiedError
from tests.gpu import kit
from tests.support.children import Channel, spawn, wait_until

FOREVER_CYCLES = 1 << 40


def publish_and_never_get_there(channel: Channel, name: str, device: str) -> None:
    with BlockPool.attach(name, prefault="off", role="producer") as pool:
        if device == "cpu":
            pool.pin()
        handle = pool.alloc(kit.TOKENS)
        assert handle is not None
        pool.view(handle)["rows"].fill_(1)
        kit.nap(FOREVER_CYCLES)
        channel.say(pool.publish(handle, stream=torch.cuda.current_stream()).encode())
        channel.receive(600)


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_no_stream_hangs_when_its_producer_is_killed(pool_name: str, device: str) -> None:
    with kit.create(pool_name, device) as pool:
        with spawn(publish_and_never_get_there, pool_name, device) as child:
            handle = BlockHandle.decode(child.receive(120))  # type: ignore[arg-type]
            lease = pool.open(handle, stream=torch.cuda.current_stream())
            assert not lease.is_ready
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
            assert not done.query()  # type: ignore[no-untyped-call]
            started = time.monotonic()
            child.kill()
            killed = time.monotonic()
            torch.cuda.synchronize()
            ended = time.monotonic()
        print(f"{device}: the reader's stream went on {ended - started:.3f} s after SIGKILL "
              f"({ended - killed:.3f} s after the end of the process)")  # fmt: skip
        assert ended - started < 10
        with pytest.raises(PeerDiedError, match="release the lease and retry the request"):
            lease["rows"]
        lease.release()
        with pytest.raises(PeerDiedError):
            pool.open(handle, stream=torch.cuda.current_stream())
        torch.cuda.synchronize()
        wait_until(
            lambda: (pool.reap(), pool.available_blocks())[1] == pool.config.total_blocks,
            "every block is back",
        )
        assert pool.check() == []


def read_without_end(channel: Channel, name: str) -> None:
    """A pinned host pool's reader with copies in flight."""
    with BlockPool.attach(name, prefault="off", role="reader") as pool:
        pool.pin()
        handle = BlockHandle.decode(channel.receive())  # type: ignore[arg-type]
        lease = pool.open(handle, stream=torch.cuda.current_stream())
        rows = lease["rows"]
        target = torch.empty_like(rows, device="cuda")
        for _ in range(200):
            target.copy_(rows, non_blocking=True)
        lease.release()
        channel.say("copies in flight")
        while True:
            for _ in range(100):
                target.copy_(rows, non_blocking=True)
            torch.cuda.synchronize()


def test_the_lease_of_a_reader_killed_with_copies_in_flight_comes_back(pool_name: str) -> None:
    with kit.create(pool_name, "cpu", allocations=512) as pool:
        handle = pool.alloc(pool.config.total_tokens)
        assert handle is not None
        pool.view(handle)["rows"].fill_(4)
        handle = pool.publish(handle)
        with spawn(read_without_end, pool_name) as child:
            child.say(handle.encode())
            child.hear("copies in flight", 120)
            started = time.monotonic()
            child.kill()
            wait_until(
                lambda: (pool.reap(), pool.available_blocks())[1] == pool.config.total_blocks,
                "every block is back",
            )
            print(f"the lease came back {time.monotonic() - started:.3f} s after SIGKILL")
        assert pool.check() == []


def write_without_end(channel: Channel, name: str) -> None:
    """Copies from the GPU into a reservation of a pinned host pool, each with other bytes."""
    with BlockPool.attach(name, prefault="off", role="writer") as pool:
        pool.pin()
        handle = pool.alloc(pool.config.total_tokens)
        assert handle is not None
        rows = pool.view(handle)["rows"]
        source = torch.zeros_like(rows, device="cuda")
        channel.say("begins")
        while True:
            for _ in range(20):
                source += 1
                rows.copy_(source, non_blocking=True)
            torch.cuda.current_stream().synchronize()


def test_the_blocks_of_a_killed_writer_stay_apart_until_its_last_copy_is_over(
    pool_name: str,
) -> None:
    with kit.create(pool_name, "cpu", allocations=1024) as pool:
        rows = pool.field("rows")
        for _ in range(3):
            with spawn(write_without_end, pool_name) as child:
                child.hear("begins", 120)
                wait_until(lambda: int(rows[-1, -1]) > 3, "copies arrive")
                writer = next(i for i in pool.participants() if i.role == "writer")
                started = time.monotonic()
                # Not `child.kill()`, which would wait for its end.
                import signal

                child.signal(signal.SIGKILL)
                dead = gone = changed = 0.0
                last = int(rows[-1, -1])
                while not gone and time.monotonic() - started < 60:
                    now = time.monotonic() - started
                    if int(rows[-1, -1]) != last:
                        last, changed = int(rows[-1, -1]), now
                    infos = [i for i in pool.participants() if i.role == "writer"]
                    if not dead and not any(info.is_alive for info in infos):
                        dead = now
                    pool.reap()
                    if pool.available_blocks() == pool.config.total_blocks:
                        gone = now
                print(f"after SIGKILL: last byte changed after {changed * 1e3:.1f} ms, dead after "
                      f"{dead * 1e3:.1f} ms, gone after {gone * 1e3:.1f} ms")  # fmt: skip
                child.kill()
            assert gone > 0
            assert writer.uses_gpu
            handle = pool.alloc(pool.config.total_tokens)
            assert handle is not None
            rows.fill_(-5)
            time.sleep(0.5)
            assert int((rows != -5).sum()) == 0, "a copy of the dead arrived in the next one's"
            pool.free(handle)
            rows.fill_(0)


def make_a_pool(channel: Channel, name: str, ending: str) -> None:
    pool = kit.create(name)
    handle = pool.alloc(kit.TOKENS)
    assert handle is not None
    pool.view(handle)["rows"].fill_(6)
    handle = pool.publish(handle)
    torch.cuda.synchronize()
    channel.say(handle.encode())
    channel.hear("attached", 120)
    if ending == "close":
        pool.close()
        channel.say("closed")
    channel.receive(120)


def attach_late(channel: Channel, name: str) -> str:
    with BlockPool.attach(name, prefault="off") as pool:
        handle = pool.alloc(kit.TOKENS)
        assert handle is not None
        try:
            pool.view(handle)
        except PeerDiedError as error:
            return str(error)
        finally:
            pool.free(handle)
    return ""


@pytest.mark.parametrize("ending", ["SIGKILL", "close"])
def test_those_who_are_attached_go_on_when_the_creator_has_left(
    pool_name: str, ending: str
) -> None:
    torch.zeros(1, device="cuda")
    with spawn(make_a_pool, pool_name, ending) as child:
        handle = BlockHandle.decode(child.receive(120))  # type: ignore[arg-type]
        with BlockPool.attach(pool_name, prefault="off") as pool:
            lease = pool.open(handle)
            rows = lease["rows"]
            assert int((rows != 6).sum().item()) == 0
            child.say("attached")
            if ending == "close":
                child.hear("closed", 120)
            else:
                child.kill()
                wait_until(lambda: pool.reap().participants == 1, "it was reaped")
            stats = pool.stats()
            assert stats.device_state == ("creator left" if ending == "close" else "creator dead")
            assert int((rows != 6).sum().item()) == 0, "what was there must still be readable"
            lease.release()
            # And all the rest goes on too.
            other = pool.alloc(kit.TOKENS)
            assert other is not None
            pool.view(other)["rows"].fill_(8)
            with pool.open(pool.publish(other)) as second:
                assert int((second["rows"] != 8).sum().item()) == 0
            with spawn(attach_late, pool_name) as late:
                assert "create the pool anew" in str(late.result(120))
            torch.cuda.synchronize()
            assert pool.available_blocks() == pool.config.total_blocks
            assert pool.check() == []
            del rows, second, lease
        child.kill()
