"""One conformance suite, run over every kind of queue, with the other side in a thread and in a
process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from shmblocks import BlockPool, TransferError
from shmblocks.transfer import LanguageEndpoint, Status
from tests.support import naming
from tests.support.children import Child, spawn
from tests.transfer.kinds import ALL_KINDS, PROCESS_KINDS, QueuePair
from tests.transfer.kit import (
    LANDING,
    MODES,
    PATIENCE,
    WHOLE_POOL,
    Mode,
    assert_arrived,
    assert_nothing_held,
    config,
    poll_until,
    send_the_rest,
)
from tests.transfer.partner import Partner, PartnerThread, serve_all


class FarSide(NamedTuple):
    """A process that serves the embedding end of a pair of queues of every kind, one by one."""

    child: Child
    pool: BlockPool
    pairs: dict[str, QueuePair]


@pytest.fixture(scope="module")
def far_side() -> Iterator[FarSide]:
    """One spawned process for all: starting one with torch takes seconds."""
    name = naming.new_pool_name()
    with (
        tempfile.TemporaryDirectory() as folder,
        BlockPool.create(name, config(), role="language", prefault="off") as pool,
    ):
        # The first lease maps the memory read-only; in a test, that would count as left behind.
        handle = pool.alloc(1)
        assert handle is not None
        with pool.open(pool.publish(handle)) as lease:
            assert len(lease.view.aux) == 16
        pairs = {kind: make(folder) for kind, make in PROCESS_KINDS.items()}
        ends = {kind: queues.embedding for kind, queues in pairs.items()}
        with spawn(serve_all, name, "embedding", ends) as child:
            yield FarSide(child, pool, pairs)
            child.say(None)
        for queues in pairs.values():
            queues.close()


class Near(NamedTuple):
    """A language endpoint here and the embedding side somewhere else."""

    pool: BlockPool
    language: LanguageEndpoint
    partner: Partner


@pytest.fixture(params=[f"thread: {kind}" for kind in ALL_KINDS])
def near_in_thread(request: pytest.FixtureRequest, pool: BlockPool) -> Iterator[Near]:
    with tempfile.TemporaryDirectory() as folder:
        queues = ALL_KINDS[request.param.removeprefix("thread: ")](folder)
        with (
            PartnerThread(pool, "embedding", queues.embedding) as partner,
            queues.language.opened() as (tx, rx),
            LanguageEndpoint(pool, tx, rx) as language,
        ):
            yield Near(pool, language, partner)
        queues.close()


# pytest orders tests by a module's parameter, so all tests of one kind of queue run together.
@pytest.fixture(scope="module", params=list(PROCESS_KINDS))
def near_in_process(request: pytest.FixtureRequest, far_side: FarSide) -> Iterator[Near]:
    far_side.child.say(request.param)
    partner = Partner(far_side.child)
    with (
        far_side.pairs[request.param].language.opened() as (tx, rx),
        LanguageEndpoint(far_side.pool, tx, rx) as language,
    ):
        # A connection that is made during a test would count as left behind by it.
        poll_until(lambda: language.stats().peer != "", language)
        while not partner.ask("stats").peer:
            language.poll()
        yield Near(far_side.pool, language, partner)
        partner.close()


class Conformance:
    """What holds for every queue. A subclass says where the other side is."""

    @pytest.fixture
    def near(self) -> Near:
        raise NotImplementedError

    @pytest.mark.parametrize("mode", MODES)
    def test_every_length_arrives_bit_for_bit(self, near: Near, mode: Mode) -> None:
        lengths = (1, LANDING - 1, LANDING, LANDING + 1, 125, WHOLE_POOL, 3 * WHOLE_POOL + 5)
        for room, length in enumerate(lengths):
            receiver = near.language.receive(room, mode)
            near.partner.ask("start", room, num_tokens=length, delta=-room)
            with receiver.wait(PATIENCE) as result:
                assert_arrived(result, near.pool, length, delta=-room)
                in_one_piece = WHOLE_POOL if mode == "push" else LANDING
                assert result.is_zero_copy or length > in_one_piece
            send_the_rest(near.language)
            assert near.partner.ask("until", room).status == Status.Success
            assert_nothing_held(near.pool)

    def test_many_rooms_at_once_of_both_modes_all_arrive(self, near: Near) -> None:
        lengths = [1 + 37 * room % (2 * WHOLE_POOL) for room in range(40)]
        early = range(0, 40, 2)  # here the embedding side comes first
        for room in early:
            near.partner.ask("start", room, num_tokens=lengths[room], seed=room)
        receivers = {room: near.language.receive(room, MODES[room // 2 % 2]) for room in range(40)}
        for room in sorted(set(range(40)) - set(early)):
            near.partner.ask("start", room, num_tokens=lengths[room], seed=room)
        for room, receiver in receivers.items():
            with receiver.wait(PATIENCE) as result:
                assert_arrived(result, near.pool, lengths[room], seed=room)
        send_the_rest(near.language)
        for room in receivers:
            assert near.partner.ask("until", room).status == Status.Success
        assert_nothing_held(near.pool)

    def test_an_abort_over_there_ends_the_room_here_with_its_reason(self, near: Near) -> None:
        near.partner.ask("start", 1, num_tokens=10)
        near.partner.ask("abort", 1, reason="the image cannot be decoded")
        receiver = near.language.receive(1)
        with pytest.raises(TransferError, match="the image cannot be decoded"):
            receiver.wait(PATIENCE)
        assert_nothing_held(near.pool)

    def test_an_abort_here_ends_the_room_over_there_with_its_reason(self, near: Near) -> None:
        receiver = near.language.receive(1)
        receiver.abort("the client has gone")
        send_the_rest(near.language)
        assert near.partner.ask("start", 1, num_tokens=10).status in Status.__members__
        reply = near.partner.ask("until", 1)
        assert reply.status == Status.Failed
        assert "the client has gone" in (reply.failure or "")
        assert_nothing_held(near.pool)


class TestInThreads(Conformance):
    @pytest.fixture
    def near(self, near_in_thread: Near) -> Near:
        return near_in_thread


class TestInProcesses(Conformance):
    @pytest.fixture
    def near(self, near_in_process: Near) -> Near:
        return near_in_process
