"""The plug-in for SGLang on a GPU, through its hooks' own functions and without SGLang.

What a fake cannot show: that an embedding which the GPU is still computing arrives whole, that the
copy runs beside the encoder's own stream, and that staging reads the pinned pool.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import torch

from shmblocks.sglang_plugin.encoder import HANDLE, Sender
from shmblocks.sglang_plugin.gpu import fill, mark_ready
from shmblocks.sglang_plugin.language import Receiver
from shmblocks.sglang_plugin.process import process
from tests.gpu.kit import LATE_CYCLES, nap
from tests.sglang_plugin import kit

pytestmark = pytest.mark.gpu

URL = "127.0.0.1:5555"
ROWS = 400


@pytest.fixture
def pair(pool_name: str) -> Iterator[tuple[Sender, Receiver]]:
    """An encoder and a rank, each with the pool pinned."""
    with (
        kit.installed(),
        kit.sender(pool_name, pin=True) as sender,
        kit.receiver(pool_name, URL, pin=True) as receiver,
    ):
        assert kit.pool_of(sender).is_pinned
        assert kit.pool_of(receiver).is_pinned
        yield sender, receiver
        torch.cuda.synchronize()


def computed_late(seed: int) -> torch.Tensor:
    """An embedding that the current stream is still about to write."""
    source = kit.tensor(ROWS, seed).to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    made = torch.zeros_like(source)
    nap(LATE_CYCLES)
    made.copy_(source)
    return made


def extracted(receiver: Receiver, wired: kit.Wired) -> tuple[kit.WaitingZmqRequest, torch.Tensor]:
    """What a rank makes of a message, in the pool; the request holds its lease."""
    request = kit.WaitingZmqRequest()
    receiver.extract(_no_bytes, request, wired.message, [])  # type: ignore[arg-type]
    assert wired.message.embedding is not None
    return request, wired.message.embedding


def _no_bytes(*_: object) -> None:
    raise AssertionError("this message has a handle")


def test_an_embedding_goes_from_the_gpu_into_the_pool_when_it_is_there(
    pair: tuple[Sender, Receiver],
) -> None:
    sender, receiver = pair
    target = kit.MMEncoder()
    for seed in range(8):
        data = kit.EmbeddingData("r1", computed_late(seed))
        kit.send(sender, target, data, URL)
        sender.release(data)
        wired = target.wire.pop()
        assert getattr(wired.message, HANDLE)
        request, part = extracted(receiver, wired)
        assert torch.equal(part, kit.tensor(ROWS, seed))
        receiver.release(request)  # type: ignore[arg-type]
    assert kit.blocks(sender) == []
    assert process.counters.handles == 8


def test_the_event_loop_goes_on_while_the_gpu_works(pair: tuple[Sender, Receiver]) -> None:
    sender, _ = pair
    target = kit.MMEncoder()
    turns = 0

    async def run() -> None:
        nonlocal turns
        data = kit.EmbeddingData("r1", computed_late(1))
        sending = asyncio.ensure_future(kit._send(sender, target, data, URL))
        while not sending.done():
            turns += 1
            await asyncio.sleep(0)
        await sending
        sender.release(data)

    asyncio.run(run())
    # Some 20 ms of naps are thousands of turns; one that stood still has two or three.
    assert turns > 20


def test_the_copy_waits_for_the_stream_that_computes_and_for_nothing_else() -> None:
    target = torch.zeros(ROWS, 3584, dtype=torch.bfloat16).pin_memory()
    embedding = computed_late(5)
    ready = mark_ready(embedding)
    assert ready is not None
    # What is enqueued behind the embedding is not waited for.
    for _ in range(8):
        nap(LATE_CYCLES)
    fill(target, embedding, ready)
    assert not torch.cuda.current_stream().query(), "it waited for the whole stream"
    assert torch.equal(target, kit.tensor(ROWS, 5))
    torch.cuda.synchronize()


def test_staging_reads_the_pinned_pool(pair: tuple[Sender, Receiver]) -> None:
    """As SGLang's `EmbeddingPool.try_stage` does it, with SGLANG_EMBEDDING_POOL_SIZE_MB."""
    sender, receiver = pair
    target = kit.MMEncoder()
    data = kit.EmbeddingData("r1", computed_late(3))
    kit.send(sender, target, data, URL)
    sender.release(data)
    request, part = extracted(receiver, target.wire.pop())
    assert part.is_pinned()
    slot = torch.empty(part.nbytes, dtype=torch.uint8, device="cuda")
    slot.copy_(part.flatten().view(torch.uint8))
    receiver.release(request)  # type: ignore[arg-type]
    staged = slot.view(torch.bfloat16).view(ROWS, 3584).cpu()
    assert torch.equal(staged, kit.tensor(ROWS, 3))
    assert kit.blocks(receiver) == []


def test_a_destination_that_is_not_attached_gets_the_bytes_of_the_gpu(
    pair: tuple[Sender, Receiver],
) -> None:
    sender, _ = pair
    target = kit.MMEncoder()
    data = kit.EmbeddingData("r1", computed_late(4))
    kit.send(sender, target, data, "127.0.0.1:1")
    raw = torch.frombuffer(bytearray(target.wire[0].frame), dtype=torch.bfloat16)
    assert torch.equal(raw.view(ROWS, 3584), kit.tensor(ROWS, 4))
