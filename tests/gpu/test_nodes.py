"""Two processes as two nodes: rows of a host pool over there, in a CUDA pool here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import cast

import msgspec
import torch

from shmblocks import BlockHandle, BlockPool
from shmblocks.nodes import NodeServer, RemotePool
from tests.gpu import kit
from tests.support.children import Channel, spawn

KEY = b"sixteen bytes or more of a secret"
ROUNDS = 60
PATIENCE = 120.0


def serve(channel: Channel, name: str) -> None:
    """The other node: publishes what it is told to, in host memory."""
    with (
        BlockPool.create(name, kit.config(), prefault="off") as pool,
        NodeServer(pool, ("127.0.0.1", 0), key=KEY) as server,
    ):
        channel.say(server.address)
        while (seed := cast("int", channel.receive())) >= 0:
            with pool.reserve(tokens_of(seed), timeout=PATIENCE) as reservation:
                reservation["rows"].fill_(seed)
                channel.say(reservation.publish())


def new_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def tokens_of(seed: int) -> int:
    return 1 + seed * 7919 % (4 * kit.TOKENS)


@contextlib.contextmanager
def pools(name: str) -> Iterator[tuple[BlockPool, BlockPool]]:
    """The CUDA pool of this node, and its host pool."""
    with kit.create(name) as cuda:
        on_host = msgspec.structs.replace(cuda.config, device="cpu")
        with BlockPool.create(f"{name}-host", on_host, prefault="off") as host:
            yield cuda, host


def test_rows_of_another_node_are_read_on_the_gpu_in_the_order_of_streams(pool_name: str) -> None:
    with (
        pools(pool_name) as (cuda, host),
        spawn(serve, f"{pool_name}-there") as there,
        RemotePool(cuda, cast("tuple[str, int]", there.receive()), key=KEY, host=host) as remote,
    ):
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        copying, reading = new_stream(), new_stream()
        for seed in range(ROUNDS):
            there.say(seed)
            handle = cast("BlockHandle", there.receive())
            with torch.cuda.stream(copying):
                # The copies come late: a reader that does not wait for them reads what was before.
                kit.nap(kit.LATE_CYCLES if seed % kit.LATE_EVERY == 0 else 0)
                local = remote.fetch(handle, timeout=PATIENCE)
            with torch.cuda.stream(reading), cuda.open(local, stream=reading) as lease:
                wrong += (lease["rows"] != seed).sum()
        there.say(-1)
        torch.cuda.synchronize()
        assert wrong.item() == 0
        for pool in (cuda, host):
            pool.reap()
            assert pool.available_blocks() == pool.config.total_blocks
            assert pool.check() == []


def test_a_fetch_does_not_wait_for_the_gpu(pool_name: str) -> None:
    with (
        pools(pool_name) as (cuda, host),
        spawn(serve, f"{pool_name}-there") as there,
        RemotePool(cuda, cast("tuple[str, int]", there.receive()), key=KEY, host=host) as remote,
    ):
        there.say(1)
        handle = cast("BlockHandle", there.receive())
        stream = new_stream()
        with torch.cuda.stream(stream):
            kit.nap(50 * kit.LATE_CYCLES)
            local = remote.fetch(handle, timeout=PATIENCE)
            assert not cuda.state.is_ready(local), "it returned before its copies"
            assert host.available_blocks() < host.config.total_blocks
        with cuda.open(local) as lease:
            assert (lease["rows"] == 1).all().item()
        there.say(-1)
        torch.cuda.synchronize()
        host.reap()
        assert host.available_blocks() == host.config.total_blocks
