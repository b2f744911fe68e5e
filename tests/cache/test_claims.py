"""Claims: one process encodes a key, the others wait, and nobody waits for the dead."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from shmblocks import UNBOUNDED, BlockPool, KeyExistsError, PoolClosedError
from tests.cache import kit
from tests.support.children import Channel, run_in_child, run_in_fork, spawn, wait_until


def attach(name: str) -> BlockPool:
    return BlockPool.attach(name, prefault="off")


def state(pool: BlockPool, name: object = "a") -> str:
    return pool.claim(kit.key(name)).state


def test_the_first_gets_the_claim_and_the_second_is_told_who_has_it(pool: BlockPool) -> None:
    mine = pool.claim(kit.key("a"))
    assert (mine.state, mine.owner) == ("mine", pool.participant)
    with attach(pool.name) as other:
        busy = other.claim(kit.key("a"))
        assert (busy.state, busy.owner, busy.since_ns) == ("busy", pool.participant, mine.since_ns)
    assert pool.cache_stats().claims == 1
    assert pool.end_claim(kit.key("a"))
    assert pool.cache_stats().claims == 0


def test_a_second_thread_of_the_owner_is_told_that_it_is_busy(pool: BlockPool) -> None:
    assert state(pool) == "mine"
    assert state(pool) == "busy"
    pool.end_claim(kit.key("a"))
    assert state(pool) == "mine"
    pool.end_claim(kit.key("a"))


def test_a_key_with_an_entry_is_ready(pool: BlockPool) -> None:
    kit.put(pool, "a")
    assert pool.claim(kit.key("a")) == ("ready", None, 0, -1, 0)
    assert pool.cache_stats().claims == 0


def test_publishing_ends_the_claim_in_the_same_commit(pool: BlockPool) -> None:
    pool.claim(kit.key("a"))
    kit.put(pool, "a")
    assert pool.cache_stats().claims == 0
    assert not pool.end_claim(kit.key("a"))
    pool.drop(kit.key("a"))
    assert state(pool) == "mine"
    pool.end_claim(kit.key("a"))


def test_a_publisher_that_has_no_claim_ends_the_claim_of_another(pool: BlockPool) -> None:
    pool.claim(kit.key("a"))
    with attach(pool.name) as other:
        kit.put(other, "a")
    assert state(pool) == "ready"
    assert not pool.end_claim(kit.key("a"))


def test_a_publish_that_comes_second_ends_the_claim_too(pool: BlockPool) -> None:
    kit.put(pool, "a")
    handle = kit.reserve(pool)
    with pytest.raises(KeyExistsError):
        pool.publish(handle, readers=UNBOUNDED, key=kit.key("a"))
    assert pool.cache_stats().claims == 0


def test_only_the_owner_gives_a_claim_up(pool: BlockPool) -> None:
    pool.claim(kit.key("a"))
    with attach(pool.name) as other:
        assert not other.end_claim(kit.key("a"))
    assert not run_in_fork(lambda: pool.end_claim(kit.key("a")))
    assert pool.end_claim(kit.key("a"))
    assert not pool.end_claim(kit.key("a"))


def test_with_its_answer_a_later_claim_of_another_thread_is_left_alone(pool: BlockPool) -> None:
    first = pool.claim(kit.key("a"))
    pool.end_claim(kit.key("a"), first)
    second = pool.claim(kit.key("a"))
    assert not pool.end_claim(kit.key("a"), first)
    assert pool.end_claim(kit.key("a"), second)


def test_an_answer_that_has_travelled_ends_the_claim_of_its_owner(pool: BlockPool) -> None:
    with attach(pool.name) as scheduler:
        answer = scheduler.claim(kit.key("a"))
        assert pool.claimant(kit.key("a")) == scheduler.participant
        assert pool.end_claim(kit.key("a"), answer)
        assert pool.claimant(kit.key("a")) is None
        assert not pool.end_claim(kit.key("a"), answer)


def test_the_answer_of_one_who_was_told_to_wait_ends_nothing(pool: BlockPool) -> None:
    pool.claim(kit.key("a"))
    with attach(pool.name) as other:
        busy = other.claim(kit.key("a"))
        assert not other.end_claim(kit.key("a"), busy)
    assert pool.claimant(kit.key("a")) == pool.participant
    assert pool.end_claim(kit.key("a"))


def test_a_claim_ends_when_its_owner_leaves(pool: BlockPool) -> None:
    with attach(pool.name) as other:
        assert state(other) == "mine"
        assert state(pool) == "busy"
    assert state(pool) == "mine"
    pool.end_claim(kit.key("a"))


def test_a_claim_ends_when_its_owner_exits(pool: BlockPool) -> None:
    run_in_child(_claim, pool.name)
    assert pool.cache_stats().claims == 0


def _claim(name: str) -> None:
    pool = attach(name)  # not closed: the end of the process does it
    assert pool.claim(kit.key("a")).state == "mine"


def _claim_and_wait(channel: Channel, name: str) -> None:
    with attach(name) as pool:
        pool.claim(kit.key("a"))
        channel.say("claimed")
        channel.receive()


def test_the_claim_of_the_dead_is_taken_over_and_counted(pool: BlockPool) -> None:
    with spawn(_claim_and_wait, pool.name) as child:
        child.hear("claimed")
        assert state(pool) == "busy"
        child.kill()
    assert state(pool) == "mine"
    assert pool.cache_stats().takeovers == 1
    assert pool.end_claim(kit.key("a"))


def test_who_waits_for_one_that_is_killed_goes_on(pool: BlockPool) -> None:
    with spawn(_claim_and_wait, pool.name) as child:
        child.hear("claimed")
        busy = pool.claim(kit.key("a"))
        waiter = threading.Thread(target=pool.wait_for_claim, args=(busy, 60.0))
        waiter.start()
        child.kill()
        waiter.join(30.0)
        assert not waiter.is_alive()
    assert state(pool) == "mine"
    pool.end_claim(kit.key("a"))


def test_a_reap_ends_the_claims_of_the_dead(pool: BlockPool) -> None:
    with spawn(_claim_and_wait, pool.name) as child:
        child.hear("claimed")
        child.kill()
    pool.reap()
    assert pool.cache_stats().claims == 0


def test_when_all_claims_are_taken_a_key_is_encoded_without_one(pool: BlockPool) -> None:
    for name in range(8):
        assert state(pool, name) == "mine"
    more = pool.claim(kit.key("more"))
    assert (more.state, more.slot) == ("mine", -1)
    assert state(pool, "more") == "mine"
    assert not pool.end_claim(kit.key("more"))
    assert state(pool, 3) == "busy"
    for name in range(8):
        pool.end_claim(kit.key(name))


def test_the_claims_of_the_dead_make_room(pool: BlockPool) -> None:
    with spawn(_claim_and_wait, pool.name) as child:
        child.hear("claimed")
        for name in range(7):
            assert state(pool, name) == "mine"
        child.kill()
    assert pool.claim(kit.key("more")).slot >= 0
    for name in [*range(7), "more"]:
        assert pool.end_claim(kit.key(name))


# ---- waiting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["publish", "give up", "leave"])
def test_who_waits_is_woken_when_the_claim_ends(pool: BlockPool, how: str) -> None:
    other = attach(pool.name)
    other.claim(kit.key("a"))
    busy = pool.claim(kit.key("a"))
    waiters = [threading.Thread(target=pool.wait_for_claim, args=(busy, 60.0)) for _ in range(3)]
    for waiter in waiters:
        waiter.start()
    wait_until(lambda: pool.cache_stats().waits == 3, "three wait")
    if how == "publish":
        kit.put(other, "a")
    elif how == "give up":
        other.end_claim(kit.key("a"))
    other.close()
    for waiter in waiters:
        waiter.join(30.0)
        assert not waiter.is_alive()


def test_a_wait_lasts_no_longer_than_its_timeout(pool: BlockPool) -> None:
    pool.claim(kit.key("a"))
    busy = pool.claim(kit.key("a"))
    started = time.monotonic()
    pool.wait_for_claim(busy, 0.08)
    assert time.monotonic() - started >= 0.08
    pool.wait_for_claim(busy, 0.0)
    pool.end_claim(kit.key("a"))


def test_a_wait_counts_once_however_long_it_is(pool: BlockPool) -> None:
    pool.claim(kit.key("a"))
    pool.wait_for_claim(pool.claim(kit.key("a")), 0.2)
    assert pool.cache_stats().waits == 1
    pool.end_claim(kit.key("a"))


def test_nothing_is_waited_for_when_the_claim_is_not_somebodys(pool: BlockPool) -> None:
    mine = pool.claim(kit.key("a"))
    pool.wait_for_claim(mine, 60.0)
    pool.end_claim(kit.key("a"))
    kit.put(pool, "a")
    pool.wait_for_claim(pool.claim(kit.key("a")), 60.0)
    assert pool.cache_stats().waits == 0


def test_a_claim_that_ended_before_the_wait_is_not_slept_through(pool: BlockPool) -> None:
    pool.claim(kit.key("a"))
    busy = pool.claim(kit.key("a"))
    pool.end_claim(kit.key("a"))
    pool.wait_for_claim(busy, 60.0)


def test_closing_the_pool_ends_the_waits_of_this_process(pool: BlockPool) -> None:
    with attach(pool.name) as other:
        other.claim(kit.key("a"))
        busy = pool.claim(kit.key("a"))
        ended: list[object] = []

        def wait() -> None:
            try:
                pool.wait_for_claim(busy, 60.0)
            except PoolClosedError as error:
                ended.append(error)

        waiter = threading.Thread(target=wait)
        waiter.start()
        wait_until(lambda: other.cache_stats().waits == 1, "one waits")
        pool.close()
        waiter.join(30.0)
        assert not waiter.is_alive()
        assert len(ended) == 1


def test_many_coroutines_wait_and_are_woken_together(pool: BlockPool) -> None:
    async def main() -> None:
        with attach(pool.name) as other:
            other.claim(kit.key("a"))
            busy = pool.claim(kit.key("a"))
            tasks = [asyncio.create_task(pool.wait_for_claim_async(busy, 60.0)) for _ in range(20)]
            await asyncio.sleep(0)
            kit.put(other, "a")
            await asyncio.gather(*tasks)

    asyncio.run(main())


def test_a_coroutine_goes_on_when_the_owner_is_killed(pool: BlockPool) -> None:
    async def main() -> None:
        with spawn(_claim_and_wait, pool.name) as child:
            child.hear("claimed")
            busy = pool.claim(kit.key("a"))
            task = asyncio.create_task(pool.wait_for_claim_async(busy, 60.0))
            await asyncio.sleep(0)
            child.kill()
            await asyncio.wait_for(task, 30.0)

    asyncio.run(main())
    assert state(pool) == "mine"
    pool.end_claim(kit.key("a"))


def test_a_cancelled_wait_leaves_nothing_behind(pool: BlockPool) -> None:
    async def main() -> None:
        pool.claim(kit.key("a"))
        busy = pool.claim(kit.key("a"))
        task = asyncio.create_task(pool.wait_for_claim_async(busy, 60.0))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        pool.end_claim(kit.key("a"))

    asyncio.run(main())
