"""Every worker of the run on one pool: `pytest -n 8` is the stress, and `-n 0` is the same test.

Each test is a storm of random operations, alone, in threads, and in forked children of its own;
workers that run one at the same time meet in the pool and free each other's allocations.
"""

from __future__ import annotations

import random

import pytest

from tests.stress import storm
from tests.stress.arena import BLOCK_SIZE, CONFIG
from tests.stress.plugin import Arena
from tests.stress.storm import Payload, Storm, storm_in_threads
from tests.support.children import Channel, fork

STEPS = 400


@pytest.mark.parametrize("turn", range(8))
def test_a_storm_alone_meets_those_of_the_other_workers(
    arena: Arena, rng: random.Random, turn: int
) -> None:
    counts = Storm(arena.pool, arena.box, str(rng.random())).run(STEPS)
    assert counts["made"] > 0
    assert arena.pool.check() == []


@pytest.mark.parametrize("turn", range(4))
def test_a_storm_in_forked_children_and_their_parent(
    arena: Arena, rng: random.Random, turn: int
) -> None:
    def in_child(channel: Channel, seed: str) -> dict[str, int]:
        return Storm(arena.pool, arena.box, seed).run(STEPS)

    with (
        fork(in_child, f"a{rng.random()}") as first,
        fork(in_child, f"b{rng.random()}") as second,
    ):
        Storm(arena.pool, arena.box, f"c{rng.random()}").run(STEPS)
        for child in (first, second):
            counts = child.result()
            assert isinstance(counts, dict)
            assert counts["made"] > 0
    assert arena.pool.check() == []


@pytest.mark.parametrize("turn", range(2))
def test_a_storm_in_threads_of_two_processes(arena: Arena, rng: random.Random, turn: int) -> None:
    def in_child(channel: Channel, seed: str) -> None:
        storm_in_threads(arena.pool, arena.box, seed, STEPS // 2, 2)

    with fork(in_child, f"a{rng.random()}"):
        storm_in_threads(arena.pool, arena.box, f"b{rng.random()}", STEPS // 2, 2)
    assert arena.pool.check() == []


@pytest.mark.parametrize("turn", range(4))
def test_children_killed_in_the_middle_of_a_storm_leave_a_right_pool(
    arena: Arena, rng: random.Random, turn: int
) -> None:
    def in_child(channel: Channel, seed: str) -> None:
        mine = Storm(arena.pool, arena.box, seed)
        mine.make()
        channel.say(arena.pool.participant)
        # Nothing with the box: what is given away would be lost in a dead hand.
        while True:
            mine.random.choice((mine.make, mine.grow, mine.free, mine.read_own, mine.misuse))()

    with fork(in_child, f"a{rng.random()}") as first, fork(in_child, f"b{rng.random()}") as second:
        dead = [child.receive() for child in (first, second)]
        Storm(arena.pool, arena.box, f"c{rng.random()}").run(STEPS // 4)
        for child in (first, second):
            child.kill()
        Storm(arena.pool, arena.box, f"d{rng.random()}").run(STEPS // 4)
    arena.pool.reap()
    free_what_they_published(arena, dead)
    assert arena.pool.check() == []


def free_what_they_published(arena: Arena, dead: list[object]) -> None:
    """What a killed child had just published and not yet read would wait for its deadline."""
    for info in arena.pool.allocations():
        if info.owner_id in dead:
            arena.pool.free(arena.pool.handle_at(info.start_block))


def test_the_storm_notices_a_wrong_byte(arena: Arena) -> None:
    """Or none of the above would prove anything."""
    handle = arena.pool.alloc(2 * BLOCK_SIZE)
    if handle is None:
        pytest.skip(f"the other workers hold all {CONFIG.total_blocks} blocks just now")
    payload = Payload(arena.pool, handle)
    payload.write(handle.generation)
    payload.require(handle.generation)
    Payload(arena.pool, handle)._words[17] = 1
    with pytest.raises(AssertionError, match="expected only"):
        payload.require(handle.generation)
    arena.pool.free(handle)
    assert CONFIG.total_tokens > storm.KEEPS * 4 * BLOCK_SIZE
