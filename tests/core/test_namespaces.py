"""Two containers that share /dev/shm but not their pids: both participants are pid 1.

A robust pthread mutex fails here: its owner is a thread id, and when a waiter with the holder's
own thread id is killed, the kernel hands the lock on while the holder is still inside.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from shmblocks import PoolTimeoutError
from tests.core import namespaces, pools
from tests.support.children import Channel, Child, fork
from tests.support.inside import run_inside


@pytest.fixture(autouse=True)
def _pid_namespaces() -> None:
    if reason := namespaces.why_no_pids():
        pytest.skip(reason)


def container(body: Callable[[Channel], None]) -> Child:
    """A child that is only the parent of the pid 1 that runs `body`; killing it kills both."""

    def start(channel: Channel) -> None:
        namespaces.run_as_first_process(lambda: body(channel))

    return fork(start)


def test_a_killed_waiter_of_equal_pid_does_not_open_the_holders_section(pool_name: str) -> None:
    def hold(channel: Channel) -> None:
        with pools.attach(pool_name, role="holder") as pool:

            def body() -> None:
                channel.say(os.getpid())
                channel.hear("leave")

            run_inside(pool, body)
            channel.say("left")

    def wait(channel: Channel) -> None:
        pool = pools.attach(pool_name, role="waiter")
        channel.say(os.getpid())
        channel.hear("now")
        original = pool.state.mutex.wait

        def tell_and_wait(token: list[int], describe_holder: Callable[[], str]) -> None:
            channel.say("waiting")
            original(token, describe_holder)

        pool.state.mutex.wait = tell_and_wait  # type: ignore[method-assign]
        pool.alloc(1)

    with pools.create(pool_name, pools.tiny(lock_timeout=0.3)) as pool, container(wait) as waiter:
        waiter.hear(1)
        with container(hold) as holder:
            holder.hear(1)
            waiter.say("now")
            waiter.hear("waiting")
            kill_first_process(waiter)
            for _ in range(3):
                with pytest.raises(PoolTimeoutError, match=r"participant \d \(pid 1, holder\)"):
                    pool.alloc(1)
            holder.say("leave")
            holder.hear("left")
        assert pool.reap().participants == 1
        pools.take(pool)
        assert pool.check() == []


def kill_first_process(outer: Child) -> None:
    """SIGKILL to the pid 1 below a container's child, and gone when this returns."""
    with open(f"/proc/{outer.pid}/task/{outer.pid}/children") as file:
        (first,) = map(int, file.read().split())
    os.kill(first, 9)
    assert outer.wait() == 0  # it had waited for its child
    outer.kill()


def test_participants_of_equal_pid_are_told_apart_and_die_apart(pool_name: str) -> None:
    def stay(channel: Channel) -> None:
        pool = pools.attach(pool_name, role="container")
        channel.say(pool.participant)
        channel.receive()

    with pools.create(pool_name) as pool, container(stay) as first:
        one = first.receive()
        with container(stay) as second:
            two = second.receive()
            inside = [info for info in pool.participants() if info.role == "container"]
            assert [info.pid for info in inside] == [1, 1]
            assert len({info.pid_namespace for info in pool.participants()}) == 3
            assert all(info.is_alive for info in inside)
            kill_first_process(second)
            alive = {(info.slot, info.incarnation): info.is_alive for info in pool.participants()}
            assert alive == {(0, 1): True, one: True, two: False}
            assert pool.reap().participants == 1
        kill_first_process(first)
        assert pool.stats().dead_participants == 1
