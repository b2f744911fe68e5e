"""First come, first served: many blocks are not starved by few, in threads and in processes."""

from __future__ import annotations

import random
import threading

import pytest

from shmblocks import BlockPool
from tests.queue.kit import PATIENCE, SOON, Waiting
from tests.support.children import Channel, fork
from tests.wait_queue.kit import (
    TOTAL,
    all_but,
    child_waiter,
    in_queue,
    reserve,
    wait_for,
    waiter,
    waiting,
)


def test_threads_are_served_in_the_order_in_which_they_came(
    no_net: None, pool: BlockPool, rng: random.Random
) -> None:
    served: list[int] = []

    def wait_and_note(number: int, blocks: int) -> None:
        handle = wait_for(pool, blocks)
        served.append(number)
        pool.free(handle)

    with all_but(pool, 0):
        threads = []
        for number in range(12):
            # More than half of the pool each: no two are served at once, so that the order in which
            # they note it is the order in which they were served.
            blocks = rng.randrange(TOTAL // 2 + 1, TOTAL + 1)
            threads.append(Waiting(lambda n=number, b=blocks: wait_and_note(n, b)))  # type: ignore[misc]
            in_queue(pool, number + 1)
    for thread in threads:
        thread.result()
    assert served == list(range(12))


def wait_and_say(channel: Channel, pool: BlockPool, blocks: int) -> None:
    channel.say("here")
    handle = wait_for(pool, blocks, 3 * PATIENCE)
    channel.say("served")
    channel.hear("give back")
    pool.free(handle)


def test_processes_are_served_in_the_order_in_which_they_came(
    no_net: None, pool: BlockPool
) -> None:
    children = []
    held = reserve(pool, TOTAL)
    for position, blocks in enumerate([TOTAL, 1, TOTAL, 9, 9], 1):
        children.append(child_waiter(pool, blocks, position))
    pool.free(held)
    for number, child in enumerate(children):
        child.hear("served", SOON)
        in_queue(pool, len(children) - number - 1)
        child.say("give back")
        child.result()
        child.close()


def test_an_allocation_does_not_grow_past_those_who_wait(no_net: None, pool: BlockPool) -> None:
    """Found: `grow` took blocks that the first in the queue waited for."""
    held, small = reserve(pool, TOTAL - 3), reserve(pool, 1)
    pool.free(small)
    with waiter(pool, 4, 1) as first:
        assert pool.grow(held, held.num_tokens + 1) is None, "it took what another waits for"
        within = pool.grow(held, held.num_tokens)
        assert within == held, "what needs no block more is nobody else's business"
        pool.free(held)
        pool.free(first.result(SOON))
    last = reserve(pool, 1)
    grown = pool.grow(last, last.num_tokens + 1)
    assert grown is not None, "nobody waits any more"
    pool.free(grown)


def test_many_blocks_are_not_starved_by_few_that_come_later(no_net: None, pool: BlockPool) -> None:
    small = [reserve(pool, 1) for _ in range(TOTAL)]
    with waiter(pool, TOTAL, 1) as big:
        later = [waiter(pool, 1, position + 2) for position in range(3)]
        for handle in small[:-1]:
            pool.free(handle)
            assert pool.alloc(1) is None, "one who does not wait was served before one who does"
            assert waiting(pool) == 4
        pool.free(small[-1])
        pool.free(big.result(SOON))
    for thread in later:
        pool.free(thread.result(SOON))


def use_small_ones_for_ever(channel: Channel, pool: BlockPool) -> None:
    channel.say("here")
    while not channel.has_message(0):
        pool.free(wait_for(pool, 1, 3 * PATIENCE))


def test_many_blocks_are_not_starved_by_processes_that_always_want_few(pool: BlockPool) -> None:
    children = [fork(use_small_ones_for_ever, pool) for _ in range(3)]
    for child in children:
        child.hear("here")
    for _ in range(10):
        pool.free(wait_for(pool, TOTAL, SOON))
    for child in children:
        child.say("enough")
        child.result()
        child.close()


def take_turns(channel: Channel, pool: BlockPool, seed: int) -> int:
    rng = random.Random(seed)
    channel.say("here")
    channel.hear("go")
    served = 0
    for _ in range(60):
        handle = wait_for(pool, rng.choice([1, 2, 5, 9, TOTAL]), 3 * PATIENCE)
        served += 1
        pool.free(handle)
    return served


def test_everyone_is_served_and_everything_comes_back(pool: BlockPool, rng: random.Random) -> None:
    children = [fork(take_turns, pool, rng.random()) for _ in range(4)]  # type: ignore[arg-type]
    for child in children:
        child.hear("here")
    for child in children:
        child.say("go")
    for child in children:
        assert child.result() == 60
        child.close()


def test_one_who_does_not_wait_is_served_when_nobody_waits_any_more(pool: BlockPool) -> None:
    with all_but(pool, 4):
        with Waiting(lambda: pool.alloc(4 * 10, timeout=0.2)) as thread:
            in_queue(pool, 1)
            assert pool.alloc(1) is None
            thread.error()
        handle = pool.alloc(1)
        assert handle is not None
        pool.free(handle)


def test_the_bell_of_one_process_is_not_rung_for_another(no_net: None, pool: BlockPool) -> None:
    """Two of one process and one of another: each change wakes those whose turn it may be."""
    held = [reserve(pool, 8), reserve(pool, 8)]
    with waiter(pool, 8, 1) as first, child_waiter(pool, 8, 2) as second:
        third = waiter(pool, TOTAL, 3)
        pool.free(held[0])
        mine = first.result(SOON)
        pool.free(held[1])
        second.hear("served", SOON)
        pool.free(mine)
        second.say("give back")
        pool.free(third.result(SOON))


@pytest.mark.parametrize("threads", [4])
def test_threads_that_come_and_go_leave_the_queue_empty(
    pool: BlockPool, rng: random.Random, threads: int
) -> None:
    seeds = [rng.random() for _ in range(threads)]
    lock = threading.Lock()
    held = 0
    most = 0

    def use(seed: float) -> None:
        nonlocal held, most
        mine = random.Random(seed)
        for _ in range(40):
            handle = wait_for(pool, mine.randrange(1, TOTAL + 1))
            with lock:
                held += handle.num_blocks
                most = max(most, held)
                held -= handle.num_blocks
            pool.free(handle)

    for each in [Waiting(lambda s=seed: use(s)) for seed in seeds]:  # type: ignore[misc]
        each.result()
    assert most <= TOTAL
