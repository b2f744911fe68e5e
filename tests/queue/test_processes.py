"""Many producers and consumers in processes: nothing lost or doubled, everyone's order kept."""

from __future__ import annotations

import queue as standard
import random
import signal
from typing import cast

import pytest

from shmblocks import HandleQueue
from tests.queue.kit import PATIENCE, Numbered, asleep
from tests.support.children import Channel, Child, fork, spawn
from tests.support.inside import run_inside

EVERYONE = 4
OVER = Numbered(-1, -1)

Got = list[tuple[int, int]]


def produce(channel: Channel, queue: HandleQueue[Numbered], producer: int, count: int) -> None:
    channel.hear("go")
    for number in range(count):
        queue.put(Numbered(producer, number), timeout=PATIENCE)


def consume(channel: Channel, queue: HandleQueue[Numbered], limit: int) -> Got:
    channel.say("here")
    got: Got = []
    while True:
        for message in queue.get_many(limit, timeout=PATIENCE):
            if message == OVER:
                return got
            got.append((message.producer, message.number))


def require_order(got: Got) -> None:
    """Each consumer sees the messages of each producer in the order in which it put them."""
    for producer in {who for who, _ in got}:
        numbers = [number for who, number in got if who == producer]
        assert numbers == sorted(numbers), f"out of order, of producer {producer}: {numbers}"


def run_all(queue: HandleQueue[Numbered], count: int, limit: int) -> list[Got]:
    consumers = [fork(consume, queue, limit) for _ in range(EVERYONE)]
    producers = [fork(produce, queue, producer, count) for producer in range(EVERYONE)]
    for child in consumers:
        child.hear("here")
    for child in producers:
        child.say("go")
    for child in producers:
        child.result()
    for _ in consumers:
        queue.put(OVER, timeout=PATIENCE)
    got = [cast("Got", child.result()) for child in consumers]
    for child in (*producers, *consumers):
        child.close()
    return got


@pytest.mark.parametrize(
    ("capacity", "limit", "spin"), [(1, 1, 200e-6), (3, 1, 0.0), (64, 1, 200e-6)]
)
def test_four_producers_and_four_consumers_lose_nothing_and_double_nothing(
    pool_name: str, capacity: int, limit: int, spin: float
) -> None:
    count = 250
    with HandleQueue.create(
        pool_name, capacity, message_bytes=32, message_type=Numbered, spin=spin
    ) as queue:
        got = run_all(queue, count, limit)
        assert queue.empty()
    everything = sorted(message for part in got for message in part)
    assert everything == [(p, number) for p in range(EVERYONE) for number in range(count)]
    for part in got:
        require_order(part)


def consume_one_by_one_after_many(channel: Channel, queue: HandleQueue[Numbered]) -> Got:
    """Batches; what follows the end of a batch's `OVER` belongs to somebody else."""
    channel.say("here")
    got: Got = []
    try:
        while True:
            got += [(m.producer, m.number) for m in queue.get_many(16, timeout=PATIENCE)]
            if got[-1] == (OVER.producer, OVER.number):
                return got
    except standard.Empty:
        return got


def test_one_consumer_of_batches_sees_everyones_order(pool_name: str) -> None:
    with HandleQueue.create(pool_name, 32, message_type=Numbered) as queue:
        consumer = fork(consume_one_by_one_after_many, queue)
        consumer.hear("here")
        producers = [fork(produce, queue, producer, 250) for producer in range(EVERYONE)]
        for child in producers:
            child.say("go")
        for child in producers:
            child.result()
            child.close()
        queue.put(OVER)
        got = cast("Got", consumer.result())
        consumer.close()
    require_order(got)
    assert sorted(got[:-1]) == [(p, number) for p in range(EVERYONE) for number in range(250)]


def test_spawned_processes_take_part(pool_name: str) -> None:
    with (
        HandleQueue.create(pool_name, 4, message_type=Numbered) as queue,
        spawn(consume, queue, 1) as consumer,
        spawn(produce, queue, 7, 50) as producer,
    ):
        consumer.hear("here")
        producer.say("go")
        producer.result()
        queue.put(OVER)
        assert consumer.result() == [(7, number) for number in range(50)]


def produce_for_ever(channel: Channel, queue: HandleQueue[Numbered], producer: int) -> None:
    channel.say("here")
    number = 0
    while True:
        queue.put(Numbered(producer, number), timeout=PATIENCE)
        number += 1


def consume_for_ever(channel: Channel, queue: HandleQueue[Numbered]) -> None:
    channel.say("here")
    while True:
        queue.get(timeout=PATIENCE)


def test_killed_and_stopped_at_random_they_hold_up_nobody_and_lose_what_they_had_in_hand(
    pool_name: str, rng: random.Random
) -> None:
    """A killed producer's messages end at some number; none is missing before it."""
    with HandleQueue.create(pool_name, 8, message_type=Numbered) as queue:
        got: list[Numbered] = []

        def take(count: int) -> None:
            for _ in range(count):
                got.append(queue.get(timeout=PATIENCE))

        for producer in range(12):
            with fork(produce_for_ever, queue, producer) as child:
                child.hear("here")
                take(rng.randrange(40))
                if rng.random() < 0.5:
                    _stop_outside_the_lock(queue, child)
                    got += _whatever_is_there(queue)
                    child.resume()
                    take(3)
                child.kill()
            got += _whatever_is_there(queue)
        for producer in range(12):
            numbers = [message.number for message in got if message.producer == producer]
            assert numbers == list(range(len(numbers)))
        queue.put(OVER)
        assert queue.get() == OVER


def _stop_outside_the_lock(queue: HandleQueue[Numbered], child: Child) -> None:
    """One who is stopped inside a section keeps it, as `mutex.py` says; not what is tested here."""
    run_inside(queue, child.signal, signal.SIGSTOP)
    child.stop()


def _whatever_is_there(queue: HandleQueue[Numbered]) -> list[Numbered]:
    try:
        return queue.get_many(100, block=False)
    except standard.Empty:
        return []


def test_consumers_killed_at_random_take_at_most_one_message_each_with_them(
    pool_name: str, rng: random.Random
) -> None:
    killed = 10
    with HandleQueue.create(pool_name, 8, message_type=Numbered) as queue:
        put = 0
        for _ in range(killed):
            with fork(consume_for_ever, queue) as child:
                child.hear("here")
                for _ in range(rng.randrange(60)):
                    queue.put(Numbered(0, put), timeout=PATIENCE)
                    put += 1
                child.kill()
        with fork(consume, queue, 1) as survivor:
            survivor.hear("here")
            for _ in range(20):
                queue.put(Numbered(1, put), timeout=PATIENCE)
            queue.put(OVER, timeout=PATIENCE)
            got = cast("Got", survivor.result())
        require_order(got)
        assert sum(1 for producer, _ in got if producer == 1) == 20
        assert sum(asleep(queue)) <= killed
