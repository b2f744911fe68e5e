"""Spilling: a second pool, in host memory, takes what the first has no free blocks for.

Here both pools lie in host memory, where the choice of a pool is all there is to it; what is copied
between memories is tested in tests/cuda_logic and tests/gpu.
"""

from __future__ import annotations

import queue
import random
from collections.abc import Iterator
from typing import NamedTuple

import msgspec
import pytest

from shmblocks import BlockHandle, BlockPool, Field, PoolConfig, State
from shmblocks.transfer import EmbeddingEndpoint, LanguageEndpoint, Status, TransferResult
from shmblocks.transfer.messages import Chunk, Request
from tests.support.children import Channel, spawn
from tests.transfer.kit import (
    BLOCK,
    LANDING,
    LANDING_BLOCKS,
    MODES,
    WHOLE_POOL,
    Mode,
    assert_arrived,
    assert_nothing_held,
    config,
    intercept,
    payload,
    peek,
    poll_until,
    put,
    settle,
)
from tests.transfer.steps import ROOM, no_blocks

SPILL_BLOCKS = 40


class Spilling(NamedTuple):
    """Both sides in this process, on two pools."""

    pool: BlockPool
    spill: BlockPool
    embedding: EmbeddingEndpoint
    language: LanguageEndpoint
    to_language: queue.SimpleQueue[bytes]
    to_embedding: queue.SimpleQueue[bytes]


def create(name: str, made_for: PoolConfig) -> BlockPool:
    return BlockPool.create(name, made_for, role="tests", prefault="off")


@pytest.fixture
def spill(pool_name: str) -> Iterator[BlockPool]:
    with create(f"{pool_name}-spill", config(SPILL_BLOCKS)) as made:
        yield made
        assert_nothing_held(made)


@pytest.fixture
def both(pool: BlockPool, spill: BlockPool) -> Iterator[Spilling]:
    to_language: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    to_embedding: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with (
        EmbeddingEndpoint(pool, to_language, to_embedding, spill=spill) as embedding,
        LanguageEndpoint(pool, to_embedding, to_language, spill=spill) as language,
    ):
        yield Spilling(pool, spill, embedding, language, to_language, to_embedding)


def transfer(both: Spilling, tokens: int, mode: Mode, room: int = ROOM) -> TransferResult:
    receiver = both.language.receive(room, mode)
    sender = both.embedding.send(room, payload(both.pool.config.fields, tokens, room))
    settle(both.embedding, both.language)
    assert sender.status is Status.Success, sender.failure
    return receiver.wait(0)


def spilled(both: Spilling) -> tuple[int, int]:
    return both.embedding.stats().spilled, both.language.stats().spilled


@pytest.mark.parametrize("mode", MODES)
def test_what_finds_room_does_not_spill(both: Spilling, mode: Mode) -> None:
    with transfer(both, LANDING, mode) as result:
        assert_arrived(result, both.pool, LANDING, ROOM)
        assert both.spill.allocations() == []
    assert spilled(both) == (0, 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens", [1, LANDING])
def test_a_full_pool_spills_and_the_result_is_the_same(
    both: Spilling, mode: Mode, tokens: int
) -> None:
    with no_blocks(both.pool), transfer(both, tokens, mode) as result:
        assert result.is_zero_copy
        assert_arrived(result, both.pool, tokens, ROOM)
        (held,) = both.spill.allocations()
        assert held.req_id == f"room {ROOM}"
    assert_nothing_held(both.spill)
    assert spilled(both) == (1, 1)


def test_the_handle_says_that_its_blocks_are_in_the_spill_pool(both: Spilling) -> None:
    with no_blocks(both.pool):
        both.language.receive(ROOM, "landing")
        both.language.receive(ROOM + 1, "push")
        landing, push = (m for m in peek(both.to_embedding) if isinstance(m, Request))
        assert landing.handle is not None
        assert BlockHandle.decode(landing.handle).pool_id == both.spill.pool_id
        assert push.handle is None
        both.embedding.send(ROOM + 1, payload(both.pool.config.fields, 10))
        (chunk,) = (m for m in peek(both.to_language) if isinstance(m, Chunk))
        assert BlockHandle.decode(chunk.handle).pool_id == both.spill.pool_id


def test_the_rest_of_a_landing_spills_when_its_pool_has_no_more(both: Spilling) -> None:
    with no_blocks(both.pool, free_blocks=LANDING_BLOCKS):
        with transfer(both, LANDING + 200, "landing") as result:
            parts = result.parts("input_embeddings")
            assert [len(part) for part in parts] == [LANDING, 200]
            (held,) = both.spill.allocations()
            assert (held.state, held.num_tokens) == (State.RESERVED, 200)
            assert_arrived(result, both.pool, LANDING + 200, ROOM)
        assert_nothing_held(both.spill)
    assert spilled(both) == (1, 1)


def test_a_landing_that_spilled_grows_in_the_spill_pool(both: Spilling) -> None:
    with no_blocks(both.pool), transfer(both, LANDING + 200, "landing") as result:
        assert (result.rounds, result.is_zero_copy) == (2, True)
        assert_arrived(result, both.pool, LANDING + 200, ROOM)
    assert spilled(both) == (2, 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens", [SPILL_BLOCKS * BLOCK + 1, 3 * WHOLE_POOL + 7])
def test_what_is_longer_than_both_pools_goes_through_the_spill_pool_in_pieces(
    both: Spilling, mode: Mode, tokens: int
) -> None:
    with no_blocks(both.pool), transfer(both, tokens, mode) as result:
        assert result.rounds > 1
        assert_arrived(result, both.pool, tokens, ROOM)
        assert_nothing_held(both.spill)


def test_a_push_goes_on_in_its_own_pool_when_that_has_room_again(both: Spilling) -> None:
    tokens = SPILL_BLOCKS * BLOCK + 50
    with no_blocks(both.pool):
        receiver = both.language.receive(ROOM, "push")
        both.embedding.send(ROOM, payload(both.pool.config.fields, tokens))
        both.embedding.poll()
    settle(both.embedding, both.language)
    with receiver.wait(0) as result:
        assert_arrived(result, both.pool, tokens)
    assert result.rounds == 2
    assert spilled(both) == (1, 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", ["pool", "spill"])
def test_what_finds_no_room_in_either_waits_holding_nothing_for_the_first_that_has_some(
    both: Spilling, mode: Mode, which: str
) -> None:
    freed, kept = (both.pool, both.spill) if which == "pool" else (both.spill, both.pool)
    with no_blocks(kept):
        with no_blocks(freed):
            receiver = both.language.receive(ROOM, mode)
            both.embedding.send(ROOM, payload(both.pool.config.fields, LANDING))
            settle(both.embedding, both.language)
            assert not receiver.status.is_final
            assert len(both.pool.allocations()) == len(both.spill.allocations()) == 1
        settle(both.embedding, both.language)
        with receiver.wait(0) as result:
            assert_arrived(result, both.pool, LANDING)


@pytest.mark.parametrize("mode", MODES)
def test_blocks_of_the_spill_pool_that_the_caller_wrote_can_be_sent(
    both: Spilling, mode: Mode
) -> None:
    handle = both.spill.alloc(50)
    assert handle is not None
    view = both.spill.view(handle)
    for name, tensor in payload(both.pool.config.fields, 50).items():
        view[name].copy_(tensor)
    view.aux.zero_()
    receiver = both.language.receive(ROOM, mode)
    both.embedding.send_handle(ROOM, handle)
    settle(both.embedding, both.language)
    with receiver.wait(0) as result:
        assert_arrived(result, both.pool, 50)


@pytest.mark.parametrize("mode", MODES)
def test_an_aborted_room_gives_back_what_had_spilled(both: Spilling, mode: Mode) -> None:
    with no_blocks(both.pool):
        receiver = both.language.receive(ROOM, mode)
        both.embedding.send(ROOM, payload(both.pool.config.fields, 20))
        both.embedding.poll()
        assert both.spill.allocations() != []
        receiver.abort()
        settle(both.embedding, both.language)
    assert_nothing_held(both.spill)


def test_results_that_nobody_takes_are_moved_out_of_the_spill_pool_too(both: Spilling) -> None:
    with no_blocks(both.pool):
        rooms = range(2 * SPILL_BLOCKS // LANDING_BLOCKS)
        receivers = [both.language.receive(room, "push") for room in rooms]
        for room in rooms:
            both.embedding.send(room, payload(both.pool.config.fields, LANDING, room))
        poll_until(lambda: receivers[-1].status is Status.Success, both.embedding, both.language)
        for room, receiver in zip(rooms, receivers, strict=True):
            with receiver.wait(0) as result:
                assert_arrived(result, both.pool, LANDING, room)


def test_transfers_of_any_size_and_mode_arrive_while_both_pools_are_short(both: Spilling) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    held: list[TransferResult] = []
    with no_blocks(both.pool, free_blocks=2 * LANDING_BLOCKS):
        for room in range(120):
            tokens = dice.choice([1, BLOCK, dice.randrange(1, 2 * LANDING), SPILL_BLOCKS * BLOCK])
            while len(held) > dice.randrange(4):
                held.pop(dice.randrange(len(held))).release()
            receiver = both.language.receive(room, dice.choice(MODES))
            both.embedding.send(room, payload(both.pool.config.fields, tokens, room))
            settle(both.embedding, both.language)
            while receiver.status is not Status.Success and held:
                held.pop().release()
                settle(both.embedding, both.language)
            result = receiver.wait(0)
            assert_arrived(result, both.pool, tokens, room)
            held.append(result)
        for result in held:
            result.release()
    assert spilled(both)[0] > 0


# ---- what cannot be ------------------------------------------------------------------------------


def test_both_sides_must_spill_to_the_same_pool(pool: BlockPool, spill: BlockPool) -> None:
    there: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    back: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with (
        EmbeddingEndpoint(pool, there, back, spill=spill) as embedding,
        LanguageEndpoint(pool, back, there) as language,
    ):
        receiver = language.receive(ROOM)
        sender = embedding.send(ROOM, payload(pool.config.fields, 10))
        settle(embedding, language)
        for room in (receiver, sender):
            assert "give both sides the same `spill`" in str(room.failure)


def test_a_chunk_of_a_pool_that_is_neither_fails_its_room(both: Spilling) -> None:
    receiver = both.language.receive(ROOM, "push")
    both.embedding.send(ROOM, payload(both.pool.config.fields, 10))
    (chunk,) = (m for m in intercept(both.to_language) if isinstance(m, Chunk))
    handle = BlockHandle.decode(chunk.handle)
    foreign = msgspec.structs.replace(handle, pool_id=handle.pool_id ^ 2).encode()
    put(both.to_language, msgspec.structs.replace(chunk, handle=foreign))
    settle(both.embedding, both.language)
    assert "ForeignHandleError" in str(receiver.failure)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (config(fields=(Field("x", (2,), "int32"),)), "expected the fields and the block_size"),
        (msgspec.structs.replace(config(), block_size=2 * BLOCK), "the block_size"),
    ],
)
def test_a_pool_of_another_kind_is_no_spill_pool(
    pool: BlockPool, pool_name: str, other: PoolConfig, says: str
) -> None:
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with (
        create(f"{pool_name}-other", other) as wrong,
        pytest.raises(ValueError, match=says),
    ):
        EmbeddingEndpoint(pool, messages, messages, spill=wrong)


def test_a_pool_does_not_spill_to_itself(pool: BlockPool) -> None:
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with pytest.raises(ValueError, match="another pool"):
        LanguageEndpoint(pool, messages, messages, spill=pool)


# ---- death ---------------------------------------------------------------------------------------


def receive_and_hold(channel: Channel, names: tuple[str, str]) -> None:
    """Hands its messages on through the channel, until it has a result; then holds it."""
    tx: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    rx: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with (
        BlockPool.attach(names[0], prefault="off") as pool,
        BlockPool.attach(names[1], prefault="off") as spill,
        LanguageEndpoint(pool, tx, rx, spill=spill) as language,
    ):
        receiver = language.receive(ROOM, "push")
        channel.say([tx.get() for _ in range(tx.qsize())])
        while receiver.status is not Status.Success:
            rx.put(channel.receive())  # type: ignore[arg-type]
            language.poll()
        channel.say("held")
        channel.receive(600)


def test_what_a_dead_peer_held_in_the_spill_pool_comes_back(
    pool: BlockPool, spill: BlockPool
) -> None:
    tx: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    rx: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with (
        EmbeddingEndpoint(pool, tx, rx, spill=spill) as embedding,
        spawn(receive_and_hold, (pool.name, spill.name)) as child,
        no_blocks(pool),
    ):
        for message in child.receive():  # type: ignore[attr-defined]
            rx.put(message)
        sender = embedding.send(ROOM, payload(pool.config.fields, 30))
        while tx.qsize():
            child.say(tx.get())
        child.hear("held")
        assert spill.available_blocks() < spill.config.total_blocks
        child.kill()
        poll_until(lambda: sender.status is Status.Failed, embedding)
        assert spill.available_blocks() == spill.config.total_blocks
