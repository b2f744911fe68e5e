"""What changes under a process: no descriptors are left, it is another user, its clock differs."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest

from shmblocks import (
    BlockPool,
    DamagedPoolError,
    HandleQueue,
    IncompatiblePoolError,
    PoolClosedError,
    PoolNotFoundError,
    remove_pool,
)
from shmblocks._state import shared_segment
from tests.core import pools
from tests.core.conftest import require_right
from tests.support import procfs
from tests.support.children import Channel, fork, run_in_fork

NOBODY = 65534

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="needs root: a child changes to another user"
)


# --- no descriptor ----------------------------------------------------------------------------


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Not one descriptor more than there are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(map(int, os.listdir("/proc/self/fd")))
    fillers: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit + 1, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            fillers.extend(iter(lambda: os.dup(0), -1))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for filler in fillers:
            os.close(filler)


def test_closing_needs_no_descriptor(pool: BlockPool) -> None:
    """Found: it failed half way, and others took what a living process still used."""
    other = pools.attach(pool.name)
    pools.take(other, 9)
    with no_descriptors():
        other.close()
    assert other.is_closed
    assert [each.is_self for each in pool.participants()] == [True]
    assert pool.available_blocks() == 16


def test_the_last_one_out_needs_no_descriptor(pool_name: str) -> None:
    pool = pools.create(pool_name)
    with no_descriptors():
        pool.close()
    with pytest.raises(PoolNotFoundError):
        pools.attach(pool_name)


def test_a_pool_that_is_damaged_lets_go_of_its_memory_too(pool_name: str) -> None:
    """Found: a `close` that raised kept the mapping for as long as the object lived."""
    before = set(procfs.mapped_segments())
    pool = pools.create(pool_name)
    pools.set_word(pool, pool.state.journal.head, 1 << 40)
    with pytest.raises(DamagedPoolError):
        pool.close()
    assert pool.is_closed
    assert set(procfs.mapped_segments()) == before
    remove_pool(pool_name, force=True)


def test_a_first_lease_that_finds_no_descriptor_takes_nothing(pool: BlockPool) -> None:
    handle = pool.publish(pools.take(pool, 9))
    with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
        pool.open(handle)
    assert pool.stats().leases == 0
    pool.open(handle).release()


def test_using_a_pool_needs_no_descriptor(pool: BlockPool) -> None:
    pool.open(pool.publish(pools.take(pool))).release()  # the first maps the memory to read
    with no_descriptors():
        handle = pool.publish(pools.take(pool, 9), readers=2)
        with pool.open(handle):
            assert pool.stats().leases == 1
        pool.free(handle)
        assert pool.reap().blocks == 0
        require_right(pool)


def in_grandchild(
    body: Callable[[], str], around: Callable[[], AbstractContextManager[None]]
) -> str:
    """What `body` says in a child that is forked `around` something."""
    told, tell = os.pipe()
    with around():
        child = os.fork()
        if not child:
            try:
                os.write(tell, body().encode())
            finally:
                os._exit(0)
    os.waitpid(child, 0)
    os.close(tell)
    with os.fdopen(told) as file:
        return file.read()


def alloc_or_why_not(pool: BlockPool) -> str:
    try:
        return str(pool.alloc(1))
    except PoolClosedError as error:
        return str(error)


def test_a_child_forked_without_descriptors_uses_the_pool_or_is_told_why_not(
    pool: BlockPool,
) -> None:
    told = run_in_fork(in_grandchild, lambda: alloc_or_why_not(pool), no_descriptors)
    assert told.startswith("BlockHandle") or "raise `ulimit -n`" in told, told
    pool.reap()
    assert pool.stats().participants == 1
    assert pool.available_blocks() == 16


# --- another user -----------------------------------------------------------------------------


def become_nobody() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


@needs_root
def test_after_setuid_each_segment_is_reset_or_closed_by_itself(
    new_pool_name: Callable[[], str],
) -> None:
    """Found: the first that could not be opened again left all later ones shared with the parent,
    locks and slots included, and messages were lost."""
    with (
        pools.create(new_pool_name()) as first,
        pools.create(new_pool_name()) as second,
        HandleQueue.create(new_pool_name(), 4) as queue,
    ):

        def in_child(channel: Channel) -> list[str]:
            become_nobody()
            channel.say("another user")
            # Descriptors that were opened as root go on working here; a fork must open them again.
            told = [
                in_grandchild(lambda: alloc_or_why_not(first), nullcontext),
                in_grandchild(lambda: alloc_or_why_not(second), nullcontext),
                in_grandchild(lambda: put_or_why_not(queue), nullcontext),
            ]
            for each in (first, second, queue):
                each.close()
            return told

        with fork(in_child) as child:
            child.hear("another user")
            for told in child.result():  # type: ignore[attr-defined]
                assert "it now runs as another user; use PoolConfig(group=...)" in told
        assert first.stats().participants == second.stats().participants == 1
        assert len(queue.participants()) == 1
        # And what is the parent's works on.
        for pool in (first, second):
            pool.free(pools.take(pool))
            require_right(pool)
        queue.put(b"m")
        assert queue.get() == b"m"


def put_or_why_not(queue: HandleQueue[bytes]) -> str:
    try:
        queue.put(b"lost")
    except PoolClosedError as error:
        return str(error)
    return "put"


# --- another clock ----------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [86_400 * 10**9, -5 * 10**9])
def test_a_process_of_another_time_namespace_is_refused_before_it_reaps(
    pool: BlockPool, monkeypatch: pytest.MonkeyPatch, offset: int
) -> None:
    """Found: a restored container reaped what was published a moment ago."""
    handle = pool.publish(pools.take(pool, 5))
    monkeypatch.setattr(shared_segment, "clock_offset_ns", lambda: offset)
    seconds = abs(offset) / 1e9
    with pytest.raises(IncompatiblePoolError, match=rf"by {seconds:.1f} s.*one time namespace"):
        pools.attach(pool.name)
    monkeypatch.undo()
    assert [each.is_self for each in pool.participants()] == [True]
    pool.open(handle).release()


def test_a_queue_refuses_a_process_of_another_time_namespace_too(
    pool_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HandleQueue.create(pool_name, 4) as queue:
        monkeypatch.setattr(shared_segment, "clock_offset_ns", lambda: 10**9)
        with pytest.raises(IncompatiblePoolError, match=f"queue /{pool_name}.*time namespace"):
            HandleQueue.attach(pool_name)
        monkeypatch.undo()
        assert len(queue.participants()) == 1


def test_processes_of_one_time_namespace_meet_whatever_its_offset_is(
    pool_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_segment, "clock_offset_ns", lambda: -7 * 10**9)
    with pools.create(pool_name) as pool, pools.attach(pool_name):
        assert pool.stats().participants == 2
