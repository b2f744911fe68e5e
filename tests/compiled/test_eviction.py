"""The window that the compiled core finds is the one that Python finds."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from shmblocks import BlockPool, Lease
from shmblocks._state.eviction import Window, best_window
from tests.cache import kit
from tests.core import pools

BLOCKS = 200
# All that one pass may see: of every size of pool, some take several passes.
MOST = (1, 2, 5, 30, 384)


def of_python(pool: BlockPool, num_blocks: int, most: int, now_ns: int) -> Window | None:
    state = pool.state
    segment = state.segment
    return best_window(segment.memory, segment.words, state.layout, num_blocks, now_ns, most)


def of_core(pool: BlockPool, num_blocks: int, most: int, now_ns: int) -> Window | None:
    core = pool.state.core
    assert core is not None
    found = core.best_window(num_blocks, most, now_ns)
    assert found is not None, "left to Python"
    return Window(*found) if isinstance(found, tuple) else None


def fill(pool: BlockPool, chance: random.Random) -> list[Lease]:
    """Entries of many sizes: some read, held, reserved or gone, used in any order."""
    names = []
    leases: list[Lease] = []
    for name in range(chance.randrange(5, 120)):
        blocks = chance.choice([1, 1, 2, 3, 9])
        if pool.available_blocks() < 3 * blocks:
            break
        how = chance.random()
        if how < 0.1:
            kit.reserve(pool, blocks)
            continue
        if how < 0.15:
            pool.publish(kit.reserve(pool, blocks))
            continue
        kit.put(pool, name, blocks, hold=chance.choice([0.0, 0.0, 0.0, 900.0]))
        names.append(name)
    chance.shuffle(names)
    for name in names:
        what = chance.random()
        if what < 0.2:
            pool.drop(kit.key(name))
        elif what < 0.4:
            pool.touch(kit.key(name))
        elif what < 0.5:
            leases += pool.get(kit.key(name)) or []
    return leases


@pytest.mark.parametrize("seed", range(30))
def test_both_find_the_same_window_whatever_lies_in_the_pool(
    seed: int, new_pool_name: Callable[[], str]
) -> None:
    chance = random.Random(seed)
    with pools.create(new_pool_name(), kit.config(BLOCKS)) as pool:
        leases = fill(pool, chance)
        found = 0
        for _ in range(60):
            blocks, most = chance.choice([1, 2, 4, 8, 20, 60, BLOCKS]), chance.choice(MOST)
            # Behind the hold of all of them, too.
            now_ns = time.monotonic_ns() + chance.choice([0, 10**12])
            expected = of_python(pool, blocks, most, now_ns)
            assert of_core(pool, blocks, most, now_ns) == expected
            found += expected is not None
        assert found
        for lease in leases:
            lease.release()


def test_records_that_contradict_the_bitmap_are_left_to_python(pool_name: str) -> None:
    """It tells which block, and what to do."""
    with pools.create(pool_name, kit.config(8)) as pool:
        kit.put(pool, "one", 2)
        state, core = pool.state, pool.state.core
        assert core is not None
        first = state.layout.record_word(0)
        before = state.segment.words[first]
        state.segment.words[first] = 0
        assert core.best_window(4, 384, time.monotonic_ns()) is None
        state.segment.words[first] = before
        assert core.best_window(4, 384, time.monotonic_ns()) is not None


def test_the_core_reserves_however_long_the_machine_has_been_up(pool_name: str) -> None:
    """A moment is nanoseconds since the machine started: 2**48 of them are three days."""
    with pools.create(pool_name, kit.config(8)) as pool:
        core = pool.state.core
        assert core is not None
        handle = core.reserve(0, 8, "r", 2**62)
        assert handle is not None
        (info,) = pool.allocations()
        pool.free(handle)
        assert info.start_block == handle.start_block
