"""What /proc says of a process."""

from __future__ import annotations

import os
import signal

from shmblocks._os.process import is_exiting, pid_namespace, start_ticks
from tests.support.children import Channel, fork, run_in_fork, wait_until


def say_start(channel: Channel) -> None:
    channel.say(start_ticks())
    channel.receive()


def test_a_living_process_is_not_exiting_and_another_of_its_pid_is() -> None:
    assert not is_exiting(os.getpid(), start_ticks())
    assert is_exiting(os.getpid(), start_ticks() + 1)


def test_a_killed_process_is_exiting_also_before_its_parent_has_waited_for_it() -> None:
    with fork(say_start) as child:
        start = child.receive()
        assert isinstance(start, int)
        assert not is_exiting(child.pid, start)
        os.kill(child.pid, signal.SIGKILL)
        wait_until(lambda: is_exiting(child.pid, start), "the kernel ends it")
        child.kill()
        assert is_exiting(child.pid, start)


def test_a_forked_child_started_later_in_the_same_namespace() -> None:
    start, namespace = run_in_fork(lambda: (start_ticks(), pid_namespace()))
    assert start >= start_ticks()
    assert namespace == pid_namespace()
