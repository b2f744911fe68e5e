"""The thread that maps pages ahead: stopped for a fork, done without where none can be had."""

from __future__ import annotations

import gc
import mmap
import os
import sys
import threading
import weakref

import pytest

from shmblocks import BlockPool
from shmblocks._os import prefault as prefault_module
from shmblocks._os.prefault import Prefault, populate, populate_all
from tests.core import pools
from tests.support.children import run_in_fork, run_program, wait_until

STEPS = 8


@pytest.fixture
def mapping(monkeypatch: pytest.MonkeyPatch) -> mmap.mmap:
    """Memory of a few steps of one page each."""
    monkeypatch.setattr(prefault_module, "STEP", mmap.PAGESIZE)
    return mmap.mmap(-1, STEPS * mmap.PAGESIZE)


class Gate:
    """Lets the thread do a step when it is told to, and counts steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = 0
        self.allowed = threading.Semaphore(0)

        def one_step(mapping: mmap.mmap, advice: int, start: int) -> int:
            self.begun += 1
            self.allowed.acquire()
            return populate(mapping, advice, start)

        monkeypatch.setattr(prefault_module, "populate", one_step)

    def open(self) -> None:
        self.allowed.release(1000)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "shmblocks-prefault"]


def test_it_maps_every_page_changes_none_and_ends(mapping: mmap.mmap) -> None:
    mapping[5] = 7
    prefault = Prefault(mapping)
    wait_until(lambda: prefault.is_over, "all pages are mapped")
    assert mapping[:] == bytes(5) + b"\7" + bytes(len(mapping) - 6)
    wait_until(lambda: threads() == [], "the thread has ended")
    prefault.stop()


def test_what_is_mapped_ahead_is_let_go_afterwards(mapping: mmap.mmap) -> None:
    prefault = Prefault(mapping)
    wait_until(lambda: prefault.is_over and threads() == [], "all pages are mapped")
    mapping.close()


def test_stopping_it_ends_the_thread_after_the_step_that_runs(
    mapping: mmap.mmap, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    prefault = Prefault(mapping)
    wait_until(lambda: gate.begun == 1, "it is at its first step")
    prefault._is_stopping = True
    gate.open()
    prefault.stop()
    assert gate.begun == 1
    assert prefault.is_over
    assert threads() == []
    prefault.stop()


def test_a_fork_stops_it_and_it_goes_on_in_the_parent_only(
    mapping: mmap.mmap, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    prefault = Prefault(mapping)
    wait_until(lambda: gate.begun == 1, "it is at its first step")
    gate.allowed.release()
    seen: list[tuple[int, int]] = []
    before = prefault.pause

    def pause() -> None:
        gate.allowed.release()  # for a second step that may have begun
        before()
        seen.append((len(threads()), len(os.listdir("/proc/self/task"))))

    monkeypatch.setattr(prefault, "pause", pause)
    others = len(os.listdir("/proc/self/task")) - 1
    assert run_in_fork(lambda: (len(threads()), prefault.is_over)) == (0, True)
    assert seen == [(0, others)]
    gate.open()
    wait_until(lambda: prefault.is_over, "all pages are mapped")
    assert gate.begun >= STEPS  # from where it was, not from the start
    assert gate.begun <= STEPS + 1


def test_of_two_forks_at_once_the_last_one_starts_it_again(
    mapping: mmap.mmap, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    gate.open()
    prefault = Prefault(mapping)
    prefault.pause()
    monkeypatch.setattr(prefault, "_mapping", mapping)  # as if it had not been done yet
    prefault._position = 0
    prefault.pause()
    prefault.resume()
    assert threads() == []
    prefault.resume()
    wait_until(lambda: prefault.is_over, "all pages are mapped")
    prefault.resume()  # of a fork that began before it was made
    assert threads() == []


def test_without_a_thread_nothing_is_mapped_ahead_and_nothing_fails(
    pool_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found: neither create nor attach worked where only this thread was missing."""

    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    with BlockPool.create(pool_name, pools.tiny()) as pool, BlockPool.attach(pool_name) as other:
        other.free(pools.take(other))
        assert pool.check() == []


def test_a_kernel_that_does_not_know_the_advice_ends_it_at_once(mapping: mmap.mmap) -> None:
    assert populate(mapping, 12345, 0) == len(mapping)
    populate_all(mapping, 12345)


def test_one_that_nobody_holds_any_more_still_ends(mapping: mmap.mmap) -> None:
    prefault = weakref.ref(Prefault(mapping))
    wait_until(lambda: threads() == [], "the thread has ended")
    gc.collect()
    assert prefault() is None


FORKING = """
import os, sys, threading, warnings
from shmblocks import BlockPool, PoolConfig
from shmblocks._os import prefault

prefault.populate = lambda mapping, advice, start: start  # never done
config = PoolConfig(total_tokens=64, block_size=4)
with BlockPool.create(sys.argv[1], config) as pool:
    for _ in range(20):
        assert any(thread.name == "shmblocks-prefault" for thread in threading.enumerate())
        with warnings.catch_warnings(record=True) as warned:  # as errors they would be lost
            warnings.simplefilter("always")
            child = os.fork()
            if child == 0:
                os._exit(0)
            os.waitpid(child, 0)
        assert not warned, warned
print("forked")
"""


def test_a_fork_while_pages_are_mapped_ahead_is_no_fork_with_threads(pool_name: str) -> None:
    """Found: a DeprecationWarning of each fork, from Python 3.12 on."""
    ended = run_program([sys.executable, "-W", "error", "-c", FORKING, pool_name])
    assert (ended.stdout, ended.stderr) == ("forked\n", "")
