"""The encoder's side: who gets a handle, who gets bytes, and what is left in the pool."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator

import pytest
import torch

from shmblocks import BlockHandle, BlockPool
from shmblocks.sglang_plugin import encoder, gpu
from shmblocks.sglang_plugin.encoder import HANDLE, Sender
from shmblocks.sglang_plugin.language import Receiver
from shmblocks.sglang_plugin.process import process
from tests.core.pools import abandon
from tests.sglang_plugin import kit

FIRST, SECOND, THIRD = (f"127.0.0.1:{port}" for port in (5001, 5002, 5003))


@pytest.fixture(autouse=True)
def sglang() -> Iterator[None]:
    with kit.installed():
        yield


@pytest.fixture
def sender(pool_name: str) -> Iterator[Sender]:
    with kit.sender(pool_name) as made:
        yield made


@pytest.fixture
def rank(pool_name: str, sender: Sender) -> Iterator[Receiver]:
    with kit.receiver(pool_name, FIRST) as made:
        yield made


def data(rows: int = 40, seed: int = 0) -> kit.EmbeddingData:
    return kit.EmbeddingData("r1", kit.tensor(rows, seed))


def handle_of(wired: kit.Wired) -> bytes:
    found = getattr(wired.message, HANDLE, b"")
    assert isinstance(found, bytes)
    return found


def test_an_attached_rank_gets_a_handle_and_everybody_else_bytes(
    sender: Sender, rank: Receiver
) -> None:
    target, sent = kit.MMEncoder(), data()
    for url in (FIRST, SECOND):
        kit.send(sender, target, sent, url)
    handle, raw = target.wire
    assert 0 < len(handle_of(handle)) <= 40
    assert len(handle.frame) == 1
    assert (handle_of(raw), len(raw.frame)) == (b"", 40 * 3584 * 2)
    # Dtype and shape stay those of the real tensor.
    assert (handle.message.dtype, handle.message.shape) == (torch.bfloat16, [40, 3584])
    assert sent.embedding is not None
    assert sent.embedding.shape == (40, 3584)
    assert kit.blocks(sender) == ["leased: announced, reads"]
    counted = process.counters
    assert (counted.handles, counted.bytes, counted.not_attached) == (1, 1, 1)


def test_an_embedding_is_copied_once_for_all_ranks(
    sender: Sender, rank: Receiver, pool_name: str
) -> None:
    with kit.receiver(pool_name, SECOND) as second:
        target, sent = kit.MMEncoder(), data()
        kit.send(sender, target, sent, FIRST)
        with kit.pool_of(rank).open(BlockHandle.decode(handle_of(target.wire[0]))):
            pass
        # The first rank is through, and the second one registers only now.
        kit.send(sender, target, sent, SECOND)
        assert handle_of(target.wire[0]) == handle_of(target.wire[1])
        sender.release(sent)
        assert kit.blocks(second) == ["leased: announced"]
        with kit.pool_of(second).open(BlockHandle.decode(handle_of(target.wire[1]))) as lease:
            assert torch.equal(lease.tensor(torch.bfloat16, (40, 3584)), kit.tensor())
        assert kit.blocks(sender) == []


def test_the_release_of_a_request_ends_what_the_encoder_holds(
    sender: Sender, rank: Receiver
) -> None:
    sent = data()
    kit.send(sender, kit.MMEncoder(), sent, FIRST)
    sender.release(sent)
    assert kit.blocks(sender) == ["leased: announced"]
    sender.release(sent)


def test_an_embedding_that_is_dropped_ends_what_the_encoder_holds(
    sender: Sender, rank: Receiver
) -> None:
    kit.send(sender, kit.MMEncoder(), data(), FIRST)
    gc.collect()
    assert kit.blocks(sender) == ["leased: announced"]


def test_a_message_that_was_not_sent_leaves_no_claim(sender: Sender, rank: Receiver) -> None:
    target, sent = kit.MMEncoder(), data()
    target.fails = True
    with pytest.raises(ConnectionError):
        kit.send(sender, target, sent, FIRST)
    assert kit.blocks(sender) == ["leased: reads"]
    sender.release(sent)
    assert kit.blocks(sender) == []


def test_the_claim_of_a_dead_rank_comes_back_and_a_new_one_gets_bytes(
    sender: Sender, pool_name: str
) -> None:
    target, sent = kit.MMEncoder(), data()
    with kit.receiver(pool_name, FIRST) as rank:
        kit.send(sender, target, sent, FIRST)
        abandon(kit.pool_of(rank))
        kit.send(sender, target, sent, FIRST)
        assert [bool(handle_of(each)) for each in target.wire] == [True, False]
        sender.release(sent)
        kit.pool_of(sender).reap()
        assert kit.blocks(sender) == []


def test_a_small_embedding_goes_as_bytes(pool_name: str) -> None:
    with kit.sender(pool_name, min_bytes=1 << 20) as sender, kit.receiver(pool_name, FIRST):
        target = kit.MMEncoder()
        kit.send(sender, target, data(), FIRST)
        assert (handle_of(target.wire[0]), process.counters.small) == (b"", 1)


@pytest.mark.parametrize("rows", [1, 40, 500])
def test_with_too_few_free_blocks_it_goes_as_bytes(
    sender: Sender, rank: Receiver, rows: int
) -> None:
    pool = kit.pool_of(sender)
    with pool.reserve(pool.config.total_tokens):
        target, sent = kit.MMEncoder(), data(rows)
        kit.send(sender, target, sent, FIRST)
        assert (handle_of(target.wire[0]), process.counters.full) == (b"", 1)
    # Once bytes, always bytes: a rank that came before has them, too.
    kit.send(sender, target, sent, FIRST)
    assert handle_of(target.wire[1]) == b""
    assert kit.blocks(sender) == []


def test_an_error_message_and_a_message_without_a_destination_pass_unchanged(
    sender: Sender, rank: Receiver
) -> None:
    target = kit.MMEncoder()
    kit.send(sender, target, kit.EmbeddingData("r1", None, "no picture"), FIRST)
    sent = data()

    async def without_url() -> None:
        await sender.send(kit.MMEncoder._send, target, sent.embedding, sent)

    asyncio.run(without_url())
    assert [handle_of(each) for each in target.wire] == [b"", b""]
    assert target.wire[0].message.error_msg == "no picture"


def test_an_exception_of_ours_is_logged_and_it_goes_as_bytes(
    sender: Sender,
    rank: Receiver,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("injected")

    monkeypatch.setattr(encoder, "fill", fail)
    target, sent = kit.MMEncoder(), data()
    kit.send(sender, target, sent, FIRST)
    assert handle_of(target.wire[0]) == b""
    assert "r1 goes as bytes" in caplog.text
    assert process.counters.failed == 1
    assert kit.blocks(sender) == []
    # A logged exception holds its frames, and those tensors of the pool.
    caplog.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_not_contiguous_arrives_as_it_is(
    sender: Sender, rank: Receiver, dtype: torch.dtype
) -> None:
    strange = kit.tensor(40, dtype=dtype)[::2, ::3]
    target = kit.MMEncoder()
    kit.send(sender, target, kit.EmbeddingData("r1", strange), FIRST)
    handle = BlockHandle.decode(handle_of(target.wire[0]))
    with kit.pool_of(rank).open(handle) as lease:
        assert torch.equal(lease.tensor(dtype, strange.shape), strange)


def test_a_large_copy_leaves_the_event_loop_free(
    sender: Sender, rank: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "COPY_IN_THREAD", 1)
    threads = []
    real = gpu.fill

    def fill(*arguments: object) -> None:
        threads.append(threading.current_thread())
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(encoder, "fill", fill)
    target = kit.MMEncoder()
    kit.send(sender, target, data(), FIRST)
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()
    assert handle_of(target.wire[0])


def test_a_request_that_is_cancelled_in_the_copy_keeps_nothing(
    sender: Sender, rank: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread goes on; what it made ends with the request."""
    monkeypatch.setattr(encoder, "COPY_IN_THREAD", 1)
    begun, go_on = threading.Event(), threading.Event()
    real = gpu.fill

    def fill(*arguments: object) -> None:
        begun.set()
        go_on.wait(10)
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(encoder, "fill", fill)
    target, sent = kit.MMEncoder(), data()

    async def cancelled() -> None:
        sending = asyncio.ensure_future(kit._send(sender, target, sent, FIRST))
        await asyncio.to_thread(begun.wait, 10)
        sending.cancel()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await sending

    asyncio.run(cancelled())
    assert target.wire == []
    assert kit.blocks(sender) == ["leased: reads"]
    sender.release(sent)
    assert kit.blocks(sender) == []


def test_two_ranks_at_once_copy_once(
    sender: Sender, rank: Receiver, pool_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "COPY_IN_THREAD", 1)
    with kit.receiver(pool_name, SECOND):
        target, sent = kit.MMEncoder(), data()

        async def both() -> None:
            await asyncio.gather(
                *(kit._send(sender, target, sent, url) for url in (FIRST, SECOND, THIRD))
            )

        asyncio.run(both())
        found = {each.url: handle_of(each) for each in target.wire}
        assert found[FIRST] == found[SECOND] != b""
        assert found[THIRD] == b""
        assert kit.blocks(sender) == ["leased: announced, announced, reads"]


def test_the_hooks_do_it_through_sglangs_own_methods(pool_name: str) -> None:
    with kit.installed() as made, kit.receiver(pool_name, FIRST) as rank:
        Sender.active = Sender(kit.settings(pool_name))
        registry = made["sglang.srt.plugins.hook_registry"].HookRegistry
        for hook in encoder.HOOKS:
            registry.register(hook.target, hook.function, kit.HookType[hook.kind])
        registry.apply("__init__")
        target = made[kit.SERVER].MMEncoder()
        sent = data()
        asyncio.run(target._send(sent.embedding, sent, url=FIRST))
        assert handle_of(target.wire[0])
        answer = asyncio.run(made[kit.SERVER].ZmqDelivery().release(kit.ReqState(sent)))
        assert answer == "released"
        assert kit.blocks(rank) == ["leased: announced"]
        asyncio.run(made[kit.SERVER].ZmqDelivery().release(kit.ReqState(None)))


def test_without_a_sender_the_hooks_change_nothing() -> None:
    target, sent = kit.MMEncoder(), data()

    async def run() -> None:
        await encoder.around_send(kit.MMEncoder._send, target, sent.embedding, sent, url=FIRST)

    asyncio.run(run())
    assert handle_of(target.wire[0]) == b""


@pytest.mark.parametrize(
    ("modality", "pin", "is_health_check", "expected"),
    [
        ("IMAGE", True, False, True),
        ("IMAGE", False, False, False),
        ("IMAGE", True, True, False),
        ("VIDEO", True, False, False),
    ],
)
def test_with_pin_pictures_stay_on_the_gpu(
    pool_name: str, modality: str, pin: bool, is_health_check: bool, expected: bool
) -> None:
    class Context:
        pass

    context = Context()
    its_modality = Context()
    vars(its_modality).update(name=modality)
    vars(context).update(is_health_check=is_health_check, modality=its_modality)
    Sender.active = Sender(kit.settings(pool_name, pin=pin))
    target = kit.MMEncoder()
    found = asyncio.run(
        encoder.around_compute(
            kit.MMEncoder._compute_direct_embedding,
            target,
            context,
            keep_on_gpu=False,
        )
    )
    assert found is expected


def test_an_encoder_that_is_not_the_first_rank_attaches_nothing(
    pool_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHMBLOCKS_SGLANG_POOL", pool_name)
    other = kit.MMEncoder()
    other.rank = 1
    encoder.after_init(None, other)
    assert Sender.active is None
    with BlockPool.ensure(pool_name, kit.settings(pool_name).config()):
        pass
