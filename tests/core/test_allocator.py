"""Blocks: next fit from shared state, the same from whatever process it is asked."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from shmblocks import (
    BlockHandle,
    BlockPool,
    ForeignHandleError,
    InvalidStateError,
    PoolConfig,
    StaleHandleError,
)
from shmblocks._state import blocks as blocks_module
from shmblocks._state.bitmap import find_zeros
from shmblocks._state.blocks import WINDOW
from tests.core import pools
from tests.support.children import Channel, fork, run_in_fork


def place(handle: BlockHandle | None) -> tuple[int, int, int] | None:
    """What the original calls MetadataAllocation(start_block, num_blocks, num_tokens)."""
    if handle is None:
        return None
    return handle.start_block, handle.num_blocks, handle.num_tokens


def fill(pool: BlockPool) -> list[BlockHandle]:
    """Every block, one by one."""
    return [pools.take(pool) for _ in range(pool.available_blocks())]


# --- the behaviour of the original ------------------------------------------------------------


def language_side(channel: Channel, pool: BlockPool) -> None:
    landing = pool.alloc_default("request")
    channel.say(place(landing))
    assert landing is not None
    channel.hear("free it")
    pool.free(landing)
    channel.say("freed")
    channel.hear("allocate again")
    channel.say(place(pool.alloc(2000)))


def test_the_trace_of_the_original_holds_with_its_two_sides_in_two_processes(
    pool_name: str,
) -> None:
    config = PoolConfig(total_tokens=8192, block_size=128, default_num_blocks=8)
    with pools.create(pool_name, config) as pool, fork(language_side, pool) as language:
        language.hear((0, 8, 1024))
        language.say("free it")
        language.hear("freed")
        assert place(pool.alloc(976)) == (8, 8, 976)
        language.say("allocate again")
        language.hear((16, 16, 2000))


@pytest.mark.parametrize(
    ("tokens", "expected"), [(1, (0, 1, 1)), (4, (0, 1, 4)), (5, (0, 2, 5)), (64, (0, 16, 64))]
)
def test_an_allocation_takes_the_blocks_that_its_tokens_need(
    pool: BlockPool, tokens: int, expected: tuple[int, int, int]
) -> None:
    assert place(pool.alloc(tokens)) == expected
    assert pool.available_blocks() == 16 - expected[1]


def test_the_default_allocation_is_that_of_the_config(pool: BlockPool) -> None:
    assert place(pool.alloc_default()) == (0, 2, 8)


def test_blocks_may_be_more_than_the_tokens_need_but_not_less(pool: BlockPool) -> None:
    assert place(pool.alloc_blocks(3, 2)) == (0, 3, 2)
    with pytest.raises(ValueError, match="num_tokens: expected at most 8 for 2 blocks, got 9"):
        pool.alloc_blocks(2, 9)


@pytest.mark.parametrize("number", [0, -1, 2**60])
def test_a_number_that_no_allocation_has_is_refused(pool: BlockPool, number: int) -> None:
    said = "expected a whole number from 1 to"
    with pytest.raises(ValueError, match=said):
        pool.alloc(number)
    with pytest.raises(ValueError, match=said):
        pool.alloc_blocks(number, 1)
    with pytest.raises(ValueError, match=said):
        pool.alloc_blocks(1, number)


@pytest.mark.parametrize("number", ["1", 1.5, None])
def test_what_is_no_whole_number_is_refused(pool: BlockPool, number: object) -> None:
    with pytest.raises(TypeError):
        pool.alloc(number)  # type: ignore[arg-type]


def test_what_the_pool_can_never_serve_is_an_error_and_what_it_cannot_serve_now_is_none(
    pool: BlockPool,
) -> None:
    with pytest.raises(ValueError, match="has 16 blocks, 17 can never be served"):
        pool.alloc(65)
    whole = pools.take(pool, 64)
    assert pool.alloc(1) is None
    assert pool.alloc_default() is None
    pool.free(whole)
    assert place(pool.alloc(64)) == (0, 16, 64)


def test_a_fake_allocation_touches_nothing(pool: BlockPool) -> None:
    before = pools.state_of(pool)
    fake = pool.alloc(9, "warm-up", fake=True)
    assert place(fake) == (0, 3, 9)
    assert fake is not None
    assert fake.is_fake
    assert place(pool.alloc_default(fake=True)) == (0, 2, 8)
    assert place(pool.alloc_blocks(99, 9, fake=True)) == (0, 99, 9)
    pool.free(fake)
    pool.free(fake, fake=True)
    assert pools.state_of(pool) == before


def test_freeing_with_fake_leaves_a_real_allocation_alone(pool: BlockPool) -> None:
    handle = pools.take(pool)
    pool.free(handle, fake=True)
    assert pool.available_blocks() == 15
    pool.free(handle, "request")
    assert pool.available_blocks() == 16


@pytest.mark.parametrize("operation", ["view", "open_for_write", "publish", "open"])
def test_a_fake_handle_can_only_be_freed(pool: BlockPool, operation: str) -> None:
    fake = pool.alloc(9, fake=True)
    with pytest.raises(InvalidStateError, match="a fake handle names no blocks"):
        getattr(pool, operation)(fake)


def test_a_request_is_shown_with_what_it_holds(pool: BlockPool) -> None:
    pools.take(pool, 5, "é" * 40)
    pool.alloc_default("second")
    pool.alloc_blocks(1, 1)
    first, second, third = pool.allocations()
    assert (first.req_id, second.req_id, third.req_id) == ("é" * 31, "second", "")
    assert (first.start_block, first.num_blocks, first.num_tokens) == (0, 2, 5)
    assert str(first.state) == "reserved"
    assert first.owner is not None
    assert first.owner.pid == os.getpid()
    assert first.age_seconds >= second.age_seconds >= third.age_seconds >= 0


# --- next fit ---------------------------------------------------------------------------------


def test_the_search_goes_on_where_the_last_allocation_ended(pool: BlockPool) -> None:
    first = pools.take(pool, 16)
    assert place(pool.alloc(8)) == (4, 2, 8)
    pool.free(first)
    assert place(pool.alloc(8)) == (6, 2, 8), "freed blocks rest longest"


def test_the_search_wraps_and_takes_the_lowest_then(pool: BlockPool) -> None:
    a, b, _ = pools.take(pool, 16), pools.take(pool, 16), pools.take(pool, 24)
    pool.free(a)
    pool.free(b)
    assert place(pool.alloc(16)) == (0, 4, 16), "two blocks at the end are not enough"
    assert place(pool.alloc(4)) == (4, 1, 4)


def test_what_fits_only_around_the_cursor_is_found(pool: BlockPool) -> None:
    a, b, _ = pools.take(pool, 16), pools.take(pool, 16), pools.take(pool, 32)
    pool.free(a)
    assert place(pool.alloc(8)) == (0, 2, 8)  # the cursor is at 2 now
    pool.free(b)
    assert place(pool.alloc(24)) == (2, 6, 24)
    (hole,) = [info for info in pool.allocations() if info.start_block == 0]
    pool.free(pool.handle_at(hole.start_block))
    pool.free(pool.handle_at(2))
    assert place(pool.alloc(4)) == (0, 1, 4)  # behind 8 all is taken; the cursor is at 1
    pool.free(pool.handle_at(0))
    assert place(pool.alloc(32)) == (0, 8, 32), "begins before the cursor and passes it"


def test_blocks_are_never_taken_around_the_end(pool: BlockPool) -> None:
    handles = fill(pool)
    pool.free(handles[15])
    pool.free(handles[0])
    assert pool.alloc(8) is None
    assert place(pool.alloc(4)) == (0, 1, 4)
    assert place(pool.alloc(4)) == (15, 1, 4)


def test_room_enough_but_in_pieces_is_no_room(pool: BlockPool) -> None:
    handles = fill(pool)
    for handle in handles[::2]:
        pool.free(handle)
    assert pool.available_blocks() == 8
    assert pool.alloc(5) is None
    pool.free(handles[5])
    assert place(pool.alloc(12)) == (4, 3, 12)


def test_all_processes_go_on_from_one_cursor(pool: BlockPool) -> None:
    pools.take(pool, 4)
    assert run_in_fork(lambda: place(pool.alloc(12))) == (1, 3, 12)
    assert place(pool.alloc(4)) == (4, 1, 4), "though the child has given its blocks back"


@pytest.mark.parametrize("blocks", [1, 7, 63, 64, 65, 127, 128, 129, 200])
def test_pools_of_any_size_are_filled_to_the_last_block_and_emptied(
    pool_name: str, blocks: int
) -> None:
    with pools.create(pool_name, pools.tiny(blocks)) as pool:
        for size in (1, 3, blocks):
            taken = []
            while (handle := pool.alloc_blocks(min(size, blocks), 1)) is not None:
                taken.append(handle)
            assert sum(handle.num_blocks for handle in taken) > blocks - size
            assert pool.check() == []
            for handle in taken:
                pool.free(handle)
            assert pool.available_blocks() == blocks
            assert pool.check() == []


def test_a_search_near_the_cursor_does_not_grow_with_the_pool(
    pool_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flat cost, told by what is looked at and not by the clock."""
    widths: list[int] = []

    def counting(bits: int, width: int, count: int) -> int:
        widths.append(width)
        return find_zeros(bits, width, count)

    monkeypatch.setattr(blocks_module, "find_zeros", counting)
    total = 1 << 17
    with pools.create(pool_name, PoolConfig(total_tokens=total, block_size=1)) as pool:
        pool.state.core = None  # it searches by itself, and nobody sees it
        kept = [pools.take(pool, 1 + turn % 50) for turn in range(100)]
        for handle in kept[1::2]:
            pool.free(handle)
        # To the last block, so that the search begins among the holes, with room behind them.
        pool.free(pools.take(pool, total - sum(handle.num_blocks for handle in kept)))
        for turn in range(50):
            pools.take(pool, 1 + turn * 7 % 50)
        assert widths
        assert max(widths) <= WINDOW


def test_room_beyond_the_window_is_found(pool_name: str) -> None:
    total = 3 * WINDOW
    with pools.create(pool_name, PoolConfig(total_tokens=total, block_size=1)) as pool:
        first, _, last = pools.take(pool, WINDOW), pools.take(pool, WINDOW + 1), pools.take(pool, 9)
        pools.take(pool, total - 2 * WINDOW - 10)
        pool.free(last)
        assert place(pool.alloc(9)) == (2 * WINDOW + 1, 9, 9)
        pool.free(first)
        assert place(pool.alloc(WINDOW)) == (0, WINDOW, WINDOW)


# --- generations ------------------------------------------------------------------------------


def test_a_generation_is_handed_out_once(pool: BlockPool) -> None:
    seen = []
    for turn in range(40):
        handle = pools.take(pool, 1 + turn % 9)
        seen.append(handle.generation)
        pool.free(handle)
    seen.append(run_in_fork(lambda: pools.take(pool).generation))
    assert seen == sorted(set(seen))
    assert seen[0] > 0


# --- handles that name nothing any more -------------------------------------------------------

USES: list[Callable[[BlockPool, BlockHandle], object]] = [
    lambda pool, handle: pool.free(handle),
    lambda pool, handle: pool.view(handle),
    lambda pool, handle: pool.open_for_write(handle),
    lambda pool, handle: pool.publish(handle),
    lambda pool, handle: pool.open(handle),
    lambda pool, handle: pool.grow(handle, handle.num_tokens + 1),
]


def refused(pool: BlockPool, handle: BlockHandle, error: type[Exception], said: str) -> None:
    """Every use is refused, and changes nothing."""
    before = pools.state_of(pool)
    for use in USES:
        with pytest.raises(error, match=said):
            use(pool, handle)
    assert pools.state_of(pool) == before


@pytest.mark.parametrize("wrong", [None, 7, "handle", b"bytes", (0, 1, 4)])
def test_what_is_no_handle_is_told_by_its_type(pool: BlockPool, wrong: object) -> None:
    """Found: `free`, `publish` and `grow` failed at the first attribute that it lacks."""
    before = pools.state_of(pool)
    for use in (pool.free, pool.view, pool.open_for_write, pool.publish, pool.open):
        with pytest.raises(TypeError, match="handle: expected BlockHandle, got"):
            use(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="handle: expected BlockHandle, got"):
        pool.grow(wrong, 5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="req_id: expected str or None, got int"):
        pool.alloc(4, req_id=5)  # type: ignore[arg-type]
    assert pools.state_of(pool) == before


def test_a_freed_handle_cannot_be_used(pool: BlockPool) -> None:
    handle = pools.take(pool)
    pool.free(handle)
    refused(pool, handle, StaleHandleError, "its blocks were freed")


def test_a_handle_whose_blocks_were_allocated_again_cannot_be_used(pool: BlockPool) -> None:
    handle = pools.take(pool, 64)
    pool.free(handle)
    again = pools.take(pool, 64)
    assert place(again) == place(handle)
    refused(pool, handle, StaleHandleError, f"now starts .* generation {again.generation}")
    pool.free(again)


def test_a_handle_whose_blocks_are_inside_of_another_allocation_cannot_be_used(
    pool: BlockPool,
) -> None:
    pools.take(pool)
    handle = pools.take(pool)
    pool.free(pool.handle_at(0))
    pool.free(handle)
    assert place(pool.alloc_blocks(14, 1)) == (2, 14, 1)
    assert place(pool.alloc_blocks(2, 1)) == (0, 2, 1)
    refused(pool, handle, StaleHandleError, "its blocks were freed")


def test_a_handle_of_another_pool_cannot_be_used(
    pool: BlockPool, new_pool_name: Callable[[], str]
) -> None:
    with pools.create(new_pool_name()) as other:
        mine, theirs = pools.take(pool), pools.take(other)
        assert place(mine) == place(theirs)
        refused(pool, theirs, ForeignHandleError, f"it is of pool {other.pool_id:#x}, this is")
        pool.free(mine)


@pytest.mark.parametrize(
    "change",
    [
        {"start_block": 16},
        {"start_block": 2**32 - 1},
        {"start_block": 1},
        {"generation": 2},
        {"generation": 2**64 - 1},
    ],
)
def test_a_forged_handle_cannot_be_used(pool: BlockPool, change: dict[str, int]) -> None:
    handle = pools.take(pool, 9)
    fields = {name: getattr(handle, name) for name in handle.__struct_fields__}
    refused(pool, BlockHandle(**{**fields, **change}), StaleHandleError, "damaged|freed")


@pytest.mark.parametrize("change", [{"num_blocks": 4}, {"num_tokens": 12}, {"num_tokens": 0}])
def test_a_handle_that_claims_another_size_gives_no_view(
    pool: BlockPool, change: dict[str, int]
) -> None:
    handle = pools.take(pool, 9)
    fields = {name: getattr(handle, name) for name in handle.__struct_fields__}
    forged = BlockHandle(**{**fields, **change})
    for use in USES[1:5]:
        with pytest.raises(StaleHandleError, match="the allocation has 3 blocks and 9 tokens"):
            use(pool, forged)


@pytest.mark.parametrize("thing", [None, 3, (0, 1, 1), b"\x95\0\0\0\0\0"])
def test_what_is_no_handle_is_a_type_error(pool: BlockPool, thing: object) -> None:
    for use in USES[:5]:
        with pytest.raises((TypeError, AttributeError)):
            use(pool, thing)  # type: ignore[arg-type]


def test_a_handle_made_in_one_process_is_freed_in_another(pool: BlockPool) -> None:
    handle = pools.take(pool, 30)
    run_in_fork(pool.free, BlockHandle.decode(handle.encode()))
    assert pool.available_blocks() == 16
    refused(pool, handle, StaleHandleError, "its blocks were freed")


# --- growing ----------------------------------------------------------------------------------


def test_an_allocation_grows_into_the_free_blocks_behind_it(pool: BlockPool) -> None:
    handle = pools.take(pool, 5)
    grown = pool.grow(handle, 20)
    assert grown is not None
    assert place(grown) == (0, 5, 20)
    assert grown.generation == handle.generation
    assert pool.available_blocks() == 11
    assert place(pool.alloc(4)) == (5, 1, 4), "the search goes on behind what was grown"
    for use in USES[1:5]:
        with pytest.raises(StaleHandleError, match="it was grown or published"):
            use(pool, handle)
    pool.free(grown)
    assert pool.available_blocks() == 15


def test_growing_within_the_last_block_takes_none(pool: BlockPool) -> None:
    handle = pools.take(pool, 5)
    grown = pool.grow(handle, 8)
    assert place(grown) == (0, 2, 8)
    assert pool.available_blocks() == 14


def test_growing_keeps_blocks_that_were_more_than_the_tokens_need(pool: BlockPool) -> None:
    handle = pool.alloc_blocks(6, 3)
    assert handle is not None
    assert place(pool.grow(handle, 9)) == (0, 6, 9)


def test_growing_by_nothing_changes_nothing(pool: BlockPool) -> None:
    handle = pools.take(pool, 5)
    assert pool.grow(handle, 5) == handle
    with pytest.raises(ValueError, match="expected at least the 5 that the handle has, got 4"):
        pool.grow(handle, 4)


def test_growing_into_taken_blocks_or_past_the_end_is_none_and_changes_nothing(
    pool: BlockPool,
) -> None:
    first, second = pools.take(pool, 4), pools.take(pool, 4)
    before = pools.state_of(pool)
    assert pool.grow(first, 5) is None
    assert pool.grow(second, 64) is None
    assert pool.grow(second, 10_000) is None
    assert pools.state_of(pool) == before
    assert place(pool.grow(second, 60)) == (1, 15, 60)


def test_growing_does_not_move_the_search_that_is_elsewhere(pool: BlockPool) -> None:
    first, second = pools.take(pool, 4), pools.take(pool, 12)
    third = pools.take(pool, 4)
    pool.free(second)
    assert place(pool.grow(first, 8)) == (0, 2, 8)
    assert place(pool.alloc(4)) == (5, 1, 4)
    pool.free(third)


def test_growing_past_the_cursor_takes_it_along(pool: BlockPool) -> None:
    handle = pools.take(pool, 4)
    assert place(pool.grow(handle, 64)) == (0, 16, 64)
    pool.free(pool.handle_at(0))
    assert place(pool.alloc(4)) == (0, 1, 4), "behind the last block comes the first"


def test_what_is_published_does_not_grow(pool: BlockPool) -> None:
    handle = pool.publish(pools.take(pool))
    with pytest.raises(
        InvalidStateError, match=r"grow: expected .* reserved, this one is published"
    ):
        pool.grow(handle, 2)


# --- room that the dead hold ------------------------------------------------------------------


def test_an_allocation_that_would_fail_takes_what_the_dead_held(pool: BlockPool) -> None:
    dead = pools.attach(pool.name)
    pools.take(dead, 40)
    pools.abandon(dead)
    assert pool.available_blocks() == 6
    assert place(pool.alloc(24)) == (10, 6, 24), "no need yet"
    assert place(pool.alloc(40)) == (0, 10, 40)
    assert pool.stats().dead_participants == 0


def test_an_allocation_takes_nothing_from_the_living(pool: BlockPool) -> None:
    with pools.attach(pool.name) as other:
        pools.take(other, 40)
        assert pool.alloc(40) is None
        assert other.stats().reserved_blocks == 10


def test_several_allocations_that_streams_gave_back_are_all_taken_out_of_the_list(
    pool: BlockPool,
) -> None:
    """Found on a GPU: the second one was taken out at an index that the first had changed."""
    handles = [pools.take(pool) for _ in range(6)]
    given_back = [handles[0], handles[1], handles[5]]
    for handle in given_back:
        assert pool.state.free_behind(handle)
    for handle in given_back:
        pools.set_word(pool, pool.state.layout.ready_word(handle.start_block), handle.generation)
    assert pool.stats().settling_blocks == 0
    assert pool.check() == []
    for handle in handles[2:5]:
        pool.free(handle)
    assert pool.available_blocks() == pool.config.total_blocks
