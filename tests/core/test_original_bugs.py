"""A bug of the original allocator, shown on its own logic, and absent here.

Its free list is a deque of block numbers. After frees out of order, `popleft` n times gives n
blocks that are not consecutive, while everybody computes with `start_block + n`.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import pytest

from shmblocks import BlockPool, StaleHandleError
from tests.core import pools


class Allocation(NamedTuple):
    """What the original hands out."""

    start_block: int
    num_blocks: int


class DequeAllocator:
    """The faulty logic, faithfully: nothing else of the original bears on it."""

    def __init__(self, total_blocks: int) -> None:
        self.free_blocks = deque(range(total_blocks))

    def alloc(self, num_blocks: int) -> Allocation | None:
        if len(self.free_blocks) < num_blocks:
            return None
        blocks = [self.free_blocks.popleft() for _ in range(num_blocks)]
        return Allocation(blocks[0], num_blocks)

    def free(self, allocation: Allocation) -> None:
        start, count = allocation
        self.free_blocks.extend(range(start, start + count))


def test_the_deque_hands_out_a_block_that_does_not_exist_and_loses_one() -> None:
    original = DequeAllocator(4)
    a, b = original.alloc(2), original.alloc(2)
    assert a is not None
    assert b is not None
    original.free(b)
    original.free(a)
    wrong = original.alloc(3)
    assert wrong == (2, 3), "blocks 2, 3 and 4, of a pool that ends with 3"
    original.free(wrong)
    assert sorted(original.free_blocks) == [1, 2, 3, 4], "and block 0 is gone for ever"


def test_the_deque_gives_blocks_that_another_holds() -> None:
    original = DequeAllocator(6)
    a, b, c = original.alloc(2), original.alloc(2), original.alloc(2)
    assert a is not None
    assert b is not None
    assert c is not None
    original.free(c)
    original.free(a)
    assert original.alloc(1) == (4, 1)
    assert original.alloc(2) == (5, 2), "5 and 0 were meant, 5 and 6 are used"
    original = DequeAllocator(6)
    a, b, c = original.alloc(2), original.alloc(2), original.alloc(2)
    assert a is not None
    assert b is not None
    original.free(a)
    original.alloc(1)
    original.free(Allocation(0, 1))
    assert original.alloc(2) == (1, 2), "block 2 belongs to b"


@pytest.fixture
def four_blocks(pool_name: str) -> BlockPool:
    return pools.create(pool_name, pools.tiny(4))


def test_frees_out_of_order_give_consecutive_blocks_inside_the_pool_here(
    four_blocks: BlockPool,
) -> None:
    with four_blocks as pool:
        a, b = pools.take(pool, 8), pools.take(pool, 8)
        pool.free(b)
        pool.free(a)
        handle = pools.take(pool, 12)
        assert (handle.start_block, handle.num_blocks) == (0, 3)
        last = pools.take(pool, 4)
        assert last.start_block == 3
        pool.free(handle)
        pool.free(last)
        assert pool.available_blocks() == 4
        assert pool.check() == []


def test_freeing_twice_adds_no_block_here(four_blocks: BlockPool) -> None:
    original = DequeAllocator(4)
    twice = original.alloc(2)
    assert twice is not None
    original.free(twice)
    original.free(twice)
    assert len(original.free_blocks) == 6
    with four_blocks as pool:
        handle = pools.take(pool, 8)
        pool.free(handle)
        with pytest.raises(StaleHandleError):
            pool.free(handle)
        assert pool.available_blocks() == 4
