"""Bugs 2, 3 and 4 of the block design that this one follows, each on a small copy of its faulty
logic, and that they are not here.

The copies keep the original's structure: `transfer_infos` that messages update, a transfer queue
that only `send_embedding` fills, a worker that drains it; and on the other side one pass over the
queue of waiting requests that reacts to the polled status. Left out are the network and the bytes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import pytest

from shmblocks.transfer import Status
from shmblocks.transfer.messages import Chunk, Request, Resume, decode, encode
from tests.transfer.conftest import Pair
from tests.transfer.kit import (
    LANDING,
    LANDING_BLOCKS,
    MODES,
    Mode,
    assert_arrived,
    assert_nothing_held,
    payload,
    peek,
    put,
    settle,
)
from tests.transfer.steps import ROOM, no_blocks

TOTAL = 2000  # tokens, into landing blocks for 1024
DEFAULT = 1024


# ---- the faulty logic ------------------------------------------------------------------------


@dataclass
class FaultyTransferInfo:
    sent_tokens: int
    allocated_tokens: int


@dataclass
class FaultyEmbedding:
    """The embedding side's connection manager."""

    status: dict[int, Status] = field(default_factory=dict)
    transfer_infos: dict[int, FaultyTransferInfo] = field(default_factory=dict)
    transfer_queue: deque[int] = field(default_factory=deque)
    chunks: list[tuple[int, int]] = field(default_factory=list)  # (first token, tokens)

    def on_init_message(self, room: int, allocated_tokens: int) -> None:
        self.transfer_infos[room] = FaultyTransferInfo(0, allocated_tokens)
        self.status[room] = Status.WaitingForInput

    def on_resume_message(self, room: int, sent_tokens: int, allocated_tokens: int) -> None:
        # Updates what is known of the room, and that is all: nothing is put into the queue.
        info = self.transfer_infos[room]
        info.sent_tokens = sent_tokens
        info.allocated_tokens = allocated_tokens

    def send_embedding(self, room: int) -> None:
        # No look at whether this room is being transferred already.
        self.transfer_queue.append(room)

    def work(self) -> None:
        while self.transfer_queue:
            room = self.transfer_queue.popleft()
            info = self.transfer_infos[room]
            num_tokens = min(TOTAL - info.sent_tokens, info.allocated_tokens)
            self.chunks.append((info.sent_tokens, num_tokens))
            # By the length that this side would have allocated, not by what the other side has
            # allocated, and not by what was sent in all.
            is_last = TOTAL - info.sent_tokens <= DEFAULT
            self.status[room] = Status.Success if is_last else Status.Transferring


class FaultyAllocator:
    """Blocks of 128 tokens; frees what it is told to."""

    def __init__(self, num_blocks: int) -> None:
        self.free_blocks = deque(range(num_blocks))

    def alloc(self, num_tokens: int) -> list[int] | None:
        num_blocks = -(-num_tokens // 128)
        if len(self.free_blocks) < num_blocks:
            return None
        return [self.free_blocks.popleft() for _ in range(num_blocks)]

    def free(self, blocks: list[int]) -> None:
        self.free_blocks.extend(blocks)


@dataclass
class FaultyLanguageRequest:
    """A request in the language side's transfer queue."""

    allocator: FaultyAllocator
    blocks: list[int]
    partial: list[int] = field(default_factory=list)
    resumes: list[int] = field(default_factory=list)

    def pop_transferred(self, status: Status, sent_tokens: int) -> None:
        """One pass: what the original does when it polls `Transferring`."""
        if status is not Status.Transferring:
            return
        self.partial = list(self.blocks)  # stands for the data that is read out of the blocks
        self.allocator.free(self.blocks)
        new = self.allocator.alloc(TOTAL - sent_tokens)
        if new is None:
            return  # "not enough memory, retry later"
        self.blocks = new
        self.resumes.append(sent_tokens)


# ---- bug 2 -----------------------------------------------------------------------------------


def test_bug_2_the_originals_resume_arrives_and_triggers_nothing() -> None:
    embedding = FaultyEmbedding()
    embedding.on_init_message(ROOM, DEFAULT)
    embedding.send_embedding(ROOM)
    embedding.work()
    assert embedding.chunks == [(0, 1024)]
    embedding.on_resume_message(ROOM, 1024, 976)
    for _ in range(1000):
        embedding.work()
    assert embedding.chunks == [(0, 1024)], "it hangs for ever"
    assert embedding.status[ROOM] is Status.Transferring


def test_bug_2_every_resume_is_answered_by_a_chunk_before_the_poll_returns(pair: Pair) -> None:
    receiver = pair.language.receive(ROOM)
    with no_blocks(pair.pool, free_blocks=LANDING_BLOCKS):
        tokens = 4 * LANDING
        sender = pair.embedding.send(ROOM, payload(pair.pool.config.fields, tokens))
        for round_ in range(1, 5):
            assert (sender.rounds, sender.num_tokens) == (round_, round_ * LANDING)
            pair.language.poll()  # takes the chunk and asks for the next one
            pair.embedding.poll()  # one poll is enough
        assert sender.status is Status.Success
        with receiver.wait(0) as result:
            assert_arrived(result, pair.pool, tokens)


def test_bug_2_a_resume_that_finds_no_blocks_is_not_forgotten(pair: Pair) -> None:
    """The same for push: the chunk is due until there are blocks for it."""
    tokens = pair.pool.config.total_tokens + 1
    receiver = pair.language.receive(ROOM, "push")
    sender = pair.embedding.send(ROOM, payload(pair.pool.config.fields, tokens))
    pair.language.poll()
    with no_blocks(pair.pool):
        settle(pair.embedding, pair.language)
        assert (sender.status, sender.rounds) == (Status.Transferring, 1)
    settle(pair.embedding, pair.language)
    with receiver.wait(0) as result:
        assert_arrived(result, pair.pool, tokens)


# ---- bug 3 -----------------------------------------------------------------------------------


def test_bug_3_the_original_sends_a_first_chunk_twice() -> None:
    embedding = FaultyEmbedding()
    embedding.on_init_message(ROOM, DEFAULT)
    embedding.send_embedding(ROOM)
    embedding.send_embedding(ROOM)  # two paths lead here: the forward pass ended, the init arrived
    embedding.work()
    assert embedding.chunks == [(0, 1024), (0, 1024)]


@pytest.mark.parametrize(
    ("allocated", "resumed", "sent", "status"),
    [
        # Smaller landing blocks than this side's default: called done after 1512 of 2000 tokens.
        (512, 1000, 1512, Status.Success),
        # Larger ones: everything is sent in one round, and the room never ends.
        (4096, None, 2000, Status.Transferring),
    ],
)
def test_bug_3_the_original_judges_the_last_chunk_by_the_wrong_length(
    allocated: int, resumed: int | None, sent: int, status: Status
) -> None:
    embedding = FaultyEmbedding()
    embedding.on_init_message(ROOM, allocated)
    embedding.send_embedding(ROOM)
    embedding.work()
    if resumed is not None:
        embedding.on_resume_message(ROOM, resumed, allocated)
        embedding.send_embedding(ROOM)  # as if bug 2 were not there
        embedding.work()
    first_token, num_tokens = embedding.chunks[-1]
    assert first_token + num_tokens == sent
    assert embedding.status[ROOM] is status, f"{sent} of {TOTAL} tokens were sent"


@pytest.mark.parametrize("mode", MODES)
def test_bug_3_a_request_or_resume_that_comes_twice_is_answered_once(
    pair: Pair, mode: Mode
) -> None:
    tokens = pair.pool.config.total_tokens + 1  # several rounds in both modes
    receiver = pair.language.receive(ROOM, mode)
    request = peek(pair.to_embedding)[-1]
    put(pair.to_embedding, request)
    pair.embedding.poll()  # before anybody sends: kept once
    assert pair.embedding.stats().duplicate == 1
    sender = pair.embedding.send(ROOM, payload(pair.pool.config.fields, tokens))
    put(pair.to_embedding, request)
    chunks, duplicates = 0, 2
    while sender.status is not Status.Success:
        asked = [pair.to_embedding.get_nowait() for _ in range(pair.to_embedding.qsize())]
        for data in asked:
            again = isinstance(decode(data), Resume)
            pair.to_embedding.put(data)
            for _ in range(2 * again):
                pair.to_embedding.put(data)
                duplicates += 1
        pair.embedding.poll()
        answers = [pair.to_language.get_nowait() for _ in range(pair.to_language.qsize())]
        for data in answers:
            chunks += isinstance(decode(data), Chunk)
            pair.to_language.put(data)
        pair.language.poll()
    assert chunks == sender.rounds == receiver.rounds > 2
    assert pair.embedding.stats().duplicate == duplicates
    with receiver.wait(0) as result:
        assert_arrived(result, pair.pool, tokens)


@pytest.mark.parametrize("mode", MODES)
def test_bug_3_a_chunk_that_comes_twice_is_taken_once(pair: Pair, mode: Mode) -> None:
    tokens = pair.pool.config.total_tokens + 1
    receiver = pair.language.receive(ROOM, mode)
    sender = pair.embedding.send(ROOM, payload(pair.pool.config.fields, tokens))
    while sender.status is not Status.Success:
        chunks = [pair.to_language.get_nowait() for _ in range(pair.to_language.qsize())]
        for data in chunks + chunks:
            pair.to_language.put(data)
        pair.language.poll()
        pair.embedding.poll()
    # The copy of the last chunk comes when the room has ended: it is late.
    stats = pair.language.stats()
    assert stats.duplicate + stats.late >= sender.rounds
    with receiver.wait(0) as result:
        assert_arrived(result, pair.pool, tokens)


@pytest.mark.parametrize("blocks", [1, 3, LANDING_BLOCKS, 9])
def test_bug_3_the_last_chunk_is_the_one_that_reaches_the_total(pair: Pair, blocks: int) -> None:
    """However large the blocks are that the language side offers: here it is played by hand."""
    pair.embedding.poll()
    tokens = 7 * LANDING + 1
    sender = pair.embedding.send(ROOM, payload(pair.pool.config.fields, tokens))
    handle = pair.pool.alloc_blocks(blocks, blocks * 16)
    assert handle is not None
    sender_id = pair.language._connection.sender
    pair.to_embedding.put(encode(Request(sender_id, ROOM, 99, "landing", handle.encode())))
    sent = 0
    while sent < tokens:
        pair.embedding.poll()
        assert sender.status is Status.Transferring
        sent += min(blocks * 16, tokens - sent)
        assert sender.num_tokens == sent
        if sent < tokens:
            resume = Resume(sender_id, ROOM, 99, sender.rounds, handle.encode(), 0, sent)
            pair.to_embedding.put(encode(resume))
    sender.abort()
    pair.pool.free(handle)


# ---- bug 4 -----------------------------------------------------------------------------------


def test_bug_4_the_original_frees_its_blocks_again_and_again_when_it_gets_no_new_ones() -> None:
    allocator = FaultyAllocator(8)
    blocks = allocator.alloc(DEFAULT)
    assert blocks is not None
    request = FaultyLanguageRequest(allocator, blocks)
    taken_by_others: list[list[int] | None] = []
    for _ in range(2):
        request.pop_transferred(Status.Transferring, 1024 + 976 - 1100)  # 1100 tokens: 9 blocks
        taken_by_others.append(allocator.alloc(DEFAULT))
    assert request.resumes == [], "it never goes on"
    assert taken_by_others[0] == taken_by_others[1], "two requests were given the same blocks"


def test_bug_4_two_of_the_original_that_keep_their_blocks_wait_for_each_other() -> None:
    """The variant that keeps the first blocks while it waits for more."""
    allocator = FaultyAllocator(16)
    held = [allocator.alloc(DEFAULT), allocator.alloc(DEFAULT)]
    assert None not in held
    assert [allocator.alloc(TOTAL - DEFAULT) for _ in held] == [None, None], "and so for ever"


def test_bug_4_rooms_that_fill_the_pool_and_all_need_more_all_end(pair: Pair) -> None:
    count = pair.pool.config.total_blocks // LANDING_BLOCKS
    tokens = 3 * LANDING
    receivers = [pair.language.receive(room) for room in range(count)]
    assert pair.pool.available_blocks() == 0
    for room in range(count):
        pair.embedding.send(room, payload(pair.pool.config.fields, tokens, seed=room))
    settle(pair.embedding, pair.language)
    for room, receiver in enumerate(receivers):
        with receiver.wait(0) as result:
            assert_arrived(result, pair.pool, tokens, seed=room)
    assert_nothing_held(pair.pool)
