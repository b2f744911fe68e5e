"""The side of a rank: handles become tensors, and every lease ends."""

from __future__ import annotations

import gc
from array import array
from collections.abc import Iterator

import pytest
import torch

from shmblocks import BlockHandle, InvalidStateError, StaleHandleError
from shmblocks.sglang_plugin import language
from shmblocks.sglang_plugin.encoder import Sender
from shmblocks.sglang_plugin.language import Receiver
from shmblocks.sglang_plugin.process import process
from tests.core.pools import abandon
from tests.sglang_plugin import kit

URL = "127.0.0.1:5555"


class Stage:
    """A sender, a rank whose hooks are in place, and a request that waits."""

    def __init__(self, sender: Sender, receiver: Receiver, made: dict[str, object]) -> None:
        self.sender, self.receiver = sender, receiver
        module: object = made[kit.RECEIVER]
        self.scheduler: kit.MMReceiverBase = vars(module)["MMReceiverBase"]()
        self.waiting: kit.WaitingZmqRequest = vars(module)["WaitingZmqRequest"]("r1")
        self.encoder = kit.MMEncoder()

    def send(self, seed: int = 0, rows: int = 40) -> kit.Wired:
        data = kit.EmbeddingData("r1", kit.tensor(rows, seed))
        kit.send(self.sender, self.encoder, data, URL)
        self.sender.release(data)
        return self.encoder.wire[-1]

    def receive(self, *messages: kit.Wired) -> None:
        self.scheduler.socket += messages
        self.scheduler._drain_scheduler_embeddings()

    @property
    def blocks(self) -> list[str]:
        return kit.blocks(self.receiver)


@pytest.fixture
def stage(pool_name: str, request: pytest.FixtureRequest) -> Iterator[Stage]:
    more = getattr(request, "param", {})
    with (
        kit.installed() as made,
        kit.sender(pool_name) as sender,
        kit.receiver(pool_name, URL, **more) as receiver,
    ):
        registry = made["sglang.srt.plugins.hook_registry"].HookRegistry
        for hook in (*language.HOOKS, *language.GUARD_HOOKS):
            registry.register(hook.target, hook.function, kit.HookType[hook.kind])
        registry.apply("__init__")
        Receiver.active = receiver
        staged = Stage(sender, receiver, dict(made))
        yield staged
        # Requests hold tensors of the pool.
        vars(staged).clear()


def test_a_handle_becomes_a_tensor_and_ends_when_sglang_has_its_copy(stage: Stage) -> None:
    stage.scheduler.waiting_list.append(stage.waiting)
    stage.receive(stage.send())
    assert stage.blocks == ["leased: reads"]
    parts = stage.waiting.recv_embedding_data
    assert parts is not None
    assert torch.equal(parts.embedding_list[0], kit.tensor())  # type: ignore[arg-type]
    assert stage.waiting._assemble_mm_inputs_from_embeddings()
    assert stage.blocks == []
    # Nothing of SGLang's looks at blocks that others get.
    assert (parts.embedding_list, parts.embedding) == ([None], None)
    inputs = stage.waiting.recv_req.mm_inputs
    assert inputs is not None
    assert torch.equal(inputs.embedding, kit.tensor())
    assert process.counters.opened == 1


def test_bytes_are_extracted_as_sglang_does_it(stage: Stage) -> None:
    stage.scheduler.waiting_list.append(stage.waiting)
    data = kit.EmbeddingData("r1", kit.tensor(seed=3))
    kit.send(stage.sender, stage.encoder, data, "127.0.0.1:1")
    stage.receive(stage.encoder.wire[-1])
    assert stage.waiting._assemble_mm_inputs_from_embeddings()
    inputs = stage.waiting.recv_req.mm_inputs
    assert inputs is not None
    assert torch.equal(inputs.embedding, kit.tensor(seed=3))
    assert process.counters.opened == 0


def test_a_request_of_several_parts_ends_all_its_leases(stage: Stage) -> None:
    stage.scheduler.waiting_list.append(stage.waiting)
    stage.receive(stage.send(1), stage.send(2, rows=8))
    assert stage.blocks == ["leased: reads", "leased: reads"]
    stage.waiting._assemble_mm_inputs_from_embeddings()
    assert stage.blocks == []
    inputs = stage.waiting.recv_req.mm_inputs
    assert inputs is not None
    assert torch.equal(inputs.embedding, torch.cat([kit.tensor(40, 1), kit.tensor(8, 2)]))


def test_a_message_that_sglang_drops_gives_its_claim_back(stage: Stage) -> None:
    stage.receive(stage.send())
    assert stage.blocks == []
    assert process.counters.given_back == 1


def test_a_message_for_a_request_that_has_ended_is_read_though_nothing_waits(
    stage: Stage,
) -> None:
    wired = stage.send()
    stage.scheduler.socket.append(wired)
    assert stage.scheduler._process_waiting_requests([], None) == "done"
    assert stage.blocks == ["leased: announced"], "SGLang does not read while nothing waits"
    stage.waiting.release_resources()
    stage.scheduler._process_waiting_requests([], None)
    assert stage.blocks == []


def test_an_aborted_request_ends_its_leases(stage: Stage) -> None:
    stage.scheduler.waiting_list.append(stage.waiting)
    stage.receive(stage.send())
    stage.waiting.release_resources()
    assert stage.blocks == []
    stage.waiting.release_resources()


def test_a_handle_that_is_stale_fails_its_request_alone(stage: Stage) -> None:
    stage.scheduler.waiting_list.append(stage.waiting)
    wired = stage.send()
    kit.pool_of(stage.sender).free(BlockHandle.decode(wired.message.shmblocks))  # type: ignore[attr-defined]
    stage.receive(wired)
    assert isinstance(stage.waiting.error, StaleHandleError)
    assert stage.blocks == []


def test_a_handle_that_was_announced_to_another_rank_is_refused(
    stage: Stage, pool_name: str
) -> None:
    stage.scheduler.waiting_list.append(stage.waiting)
    with kit.receiver(pool_name, "127.0.0.1:9"):
        data = kit.EmbeddingData("r1", kit.tensor())
        kit.send(stage.sender, stage.encoder, data, "127.0.0.1:9")
        stage.receive(stage.encoder.wire[-1])
        assert isinstance(stage.waiting.error, InvalidStateError)
        assert stage.blocks == ["leased: announced, reads"]


def test_a_shape_that_does_not_fit_its_blocks_fails_its_request(stage: Stage) -> None:
    """Messages come over the network."""
    stage.scheduler.waiting_list.append(stage.waiting)
    wired = stage.send()
    wired.message.shape = [1 << 20, 3584]
    stage.receive(wired)
    assert isinstance(stage.waiting.error, ValueError)
    assert stage.blocks == []


def test_without_the_pool_a_handle_fails_its_request(stage: Stage, pool_name: str) -> None:
    stage.scheduler.waiting_list.append(stage.waiting)
    wired = stage.send()
    stage.receiver.attachment.close()
    stage.receiver.attachment._next_attempt = float("inf")
    stage.receive(wired)
    assert "not attached" in str(stage.waiting.error)
    stage.receiver.attachment._next_attempt = 0.0


def test_an_exception_of_ours_after_assembling_fails_the_request_and_not_the_loop(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.scheduler.waiting_list.append(stage.waiting)
    stage.receive(stage.send())

    def fail(request: object) -> None:
        raise RuntimeError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(stage.receiver, "has_assembled", fail)
        assert stage.waiting._assemble_mm_inputs_from_embeddings()
    assert str(stage.waiting.error) == "injected"
    assert stage.blocks == []


def test_the_loop_gives_back_what_a_dead_encoder_held(stage: Stage) -> None:
    kit.pool_of(stage.sender).alloc(20)
    abandon(kit.pool_of(stage.sender))
    assert kit.pool_of(stage.receiver).stats().reserved_blocks
    stage.receiver.attachment._next_reap = 0.0
    stage.scheduler._process_waiting_requests([], None)
    assert stage.blocks == []


# --- view mode --------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [{"view": True}], indirect=True)
def test_with_view_the_model_reads_the_pool_until_its_inputs_go(stage: Stage) -> None:
    stage.scheduler.waiting_list.append(stage.waiting)
    stage.receive(stage.send())
    stage.waiting._assemble_mm_inputs_from_embeddings()
    inputs = stage.waiting.recv_req.mm_inputs
    assert inputs is not None
    assert torch.equal(inputs.embedding, kit.tensor())
    assert stage.blocks == ["leased: reads"]
    stage.scheduler.waiting_list.clear()
    stage.waiting.recv_req.mm_inputs = inputs = None
    stage.waiting = kit.WaitingZmqRequest()
    gc.collect()
    assert stage.blocks == []


@pytest.mark.parametrize("stage", [{"view": True}], indirect=True)
def test_with_view_an_abort_ends_the_leases_at_once(stage: Stage) -> None:
    stage.scheduler.waiting_list.append(stage.waiting)
    stage.receive(stage.send())
    stage.waiting._assemble_mm_inputs_from_embeddings()
    stage.waiting.release_resources()
    assert stage.blocks == []


@pytest.mark.parametrize("stage", [{"view": True}], indirect=True)
def test_with_view_several_parts_are_copied_as_before(stage: Stage) -> None:
    stage.scheduler.waiting_list.append(stage.waiting)
    stage.receive(stage.send(1), stage.send(2))
    stage.waiting._assemble_mm_inputs_from_embeddings()
    assert stage.blocks == []


# --- the guard, and processes that take no part -----------------------------------------------


def test_a_request_without_tokens_is_answered_with_none(stage: Stage) -> None:
    request = kit.RecvReq()
    assert stage.scheduler.create_req(request) == array("q")
    request.input_ids = array("q", [1, 2])
    assert stage.scheduler.create_req(request) == array("q", [1, 2])


def test_without_a_receiver_the_hooks_change_nothing(stage: Stage) -> None:
    Receiver.active = None
    stage.scheduler.waiting_list.append(stage.waiting)
    data = kit.EmbeddingData("r1", kit.tensor())
    kit.send(stage.sender, stage.encoder, data, "127.0.0.1:1")
    stage.receive(stage.encoder.wire[-1])
    stage.scheduler._process_waiting_requests([], None)
    assert stage.waiting._assemble_mm_inputs_from_embeddings()
    stage.waiting.release_resources()
    inputs = stage.waiting.recv_req.mm_inputs
    assert inputs is not None
    assert torch.equal(inputs.embedding, kit.tensor())
