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
from tests.transfer.lines import ALL_KINDS, PROCESS_KINDS, Line
from tests.transfer.partner import Partner, PartnerThread, serve_lines


class FarSide(NamedTuple):
    """A process that serves the embedding end of one line of every kind, one after the other."""

    child: Child
    pool: BlockPool
    lines: dict[str, Line]


@pytest.fixture(scope="module")
def far_side() -> Iterator[FarSide]:
    """One spawned process for all: starting one with torch takes seconds."""
    name = naming.new_pool_name()
    with (
        tempfile.TemporaryDirectory() as folder,
        BlockPool.create(name, config(), role="language", prefault="off") as pool,
    ):
        lines = {kind: make(folder) for kind, make in PROCESS_KINDS.items()}
        ends = {kind: line.embedding for kind, line in lines.items()}
        with spawn(serve_lines, name, "embedding", ends) as child:
            yield FarSide(child, pool, lines)
            child.say(None)
        for line in lines.values():
            line.close()


class Near(NamedTuple):
    """A language endpoint here and the embedding side somewhere else."""

    pool: BlockPool
    language: LanguageEndpoint
    partner: Partner


@pytest.fixture(params=[f"thread: {kind}" for kind in ALL_KINDS])
def thread_line(request: pytest.FixtureRequest, pool: BlockPool) -> Iterator[Near]:
    with tempfile.TemporaryDirectory() as folder:
        line = ALL_KINDS[request.param.removeprefix("thread: ")](folder)
        with (
            PartnerThread(pool, "embedding", line.embedding) as partner,
            line.language.opened() as (tx, rx),
            LanguageEndpoint(pool, tx, rx) as language,
        ):
            yield Near(pool, language, partner)
        line.close()


# Each kind's line is used by the tests of that kind in turn: pytest orders by a module's parameter.
@pytest.fixture(scope="module", params=list(PROCESS_KINDS))
def process_line(request: pytest.FixtureRequest, far_side: FarSide) -> Iterator[Near]:
    far_side.child.say(request.param)
    partner = Partner(far_side.child)
    with (
        far_side.lines[request.param].language.opened() as (tx, rx),
        LanguageEndpoint(far_side.pool, tx, rx) as language,
    ):
        # A connection that is made during a test would count as left behind by it.
        poll_until(lambda: language.stats.peer != "", language)
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
    def near(self, thread_line: Near) -> Near:
        return thread_line


class TestInProcesses(Conformance):
    @pytest.fixture
    def near(self, process_line: Near) -> Near:
        return process_line
