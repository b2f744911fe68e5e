"""The pool's lock: one at a time, never kept, never waited for without end or without a name."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import CodeType, FrameType

import pytest

from shmblocks import BlockPool, InvalidStateError, PoolTimeoutError
from shmblocks._os.filelock import FileLocks
from shmblocks._state.mutex import _SECTION, Mutex
from tests.core import pools
from tests.support.children import Channel, fork, wait_until
from tests.support.inside import run_inside

SPARE_WORD = 40  # of the header: nobody uses it


@pytest.fixture
def stranger(pool: BlockPool) -> Iterator[FileLocks]:
    """Locks on the pool's segment through a description of their own, as another process's."""
    locks = pools.locks_of(pool.name)
    yield locks
    locks.close()


def is_taken(stranger: FileLocks) -> bool:
    return pools.is_entered(stranger)


# --- exclusion --------------------------------------------------------------------------------


def count_up(pool: BlockPool, times: int) -> None:
    """Read, give the others every chance, write: wrong sums show two in the section."""

    def once() -> None:
        seen = pools.word(pool, SPARE_WORD)
        time.sleep(0)
        pools.set_word(pool, SPARE_WORD, seen + 1)

    for _ in range(times):
        run_inside(pool, once)


def count_up_there(channel: Channel, pool: BlockPool, times: int) -> None:
    channel.say("ready")
    channel.hear("go")
    count_up(pool, times)


def test_processes_are_inside_one_at_a_time(pool: BlockPool) -> None:
    with (
        fork(count_up_there, pool, 1000) as first,
        fork(count_up_there, pool, 1000) as second,
        fork(count_up_there, pool, 1000) as third,
    ):
        for child in (first, second, third):
            child.hear("ready")
        for child in (first, second, third):
            child.say("go")
        count_up(pool, 1000)
    assert pools.word(pool, SPARE_WORD) == 4000


def test_threads_are_inside_one_at_a_time(pool: BlockPool) -> None:
    threads = [threading.Thread(target=count_up, args=(pool, 500)) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert pools.word(pool, SPARE_WORD) == 2000


def test_threads_of_two_processes_are_inside_one_at_a_time(pool: BlockPool) -> None:
    def with_threads(channel: Channel, pool: BlockPool) -> None:
        threads = [threading.Thread(target=count_up, args=(pool, 300)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    with fork(with_threads, pool), fork(with_threads, pool):
        pass
    assert pools.word(pool, SPARE_WORD) == 1800


def test_two_attachments_of_one_process_are_inside_one_at_a_time(pool: BlockPool) -> None:
    with pools.attach(pool.name) as other:
        threads = [threading.Thread(target=count_up, args=(each, 500)) for each in (pool, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert pools.word(pool, SPARE_WORD) == 1000


# --- whoever does not go on -------------------------------------------------------------------


def stay_inside(channel: Channel, name: str) -> None:
    with pools.attach(name, role="embedding") as pool:

        def body() -> None:
            channel.say("inside")
            channel.hear("leave")

        run_inside(pool, body)


def test_a_wait_that_times_out_names_the_stopped_holder(pool_name: str) -> None:
    with (
        pools.create(pool_name, pools.tiny(lock_timeout=0.2)) as pool,
        fork(stay_inside, pool_name) as child,
    ):
        child.hear("inside")
        child.stop()
        begin = time.monotonic()
        who = rf"participant 1 \(pid {child.pid}, embedding\)"
        said = rf"{pool_name}: could not acquire the lock within 0\.2 s.*{who}.*stopped"
        with pytest.raises(PoolTimeoutError, match=said) as caught:
            pool.alloc(1)
        assert time.monotonic() - begin >= 0.2
        assert isinstance(caught.value, TimeoutError)
        child.resume()
        child.say("leave")
        child.result()
        pools.take(pool)


def test_a_wait_for_a_thread_of_the_own_process_times_out_too(pool_name: str) -> None:
    inside, leave = threading.Event(), threading.Event()

    def body() -> None:
        inside.set()
        leave.wait(60)

    with pools.create(pool_name, pools.tiny(lock_timeout=0.1), role="us") as pool:
        thread = threading.Thread(target=run_inside, args=(pool, body))
        thread.start()
        assert inside.wait(60)
        with pytest.raises(PoolTimeoutError, match=r"participant 0 \(pid \d+, us\)"):
            pool.alloc(1)
        leave.set()
        thread.join()
        pools.take(pool)


def test_a_holder_that_is_killed_is_succeeded_at_once(pool: BlockPool) -> None:
    with fork(stay_inside, pool.name) as child:
        child.hear("inside")
        child.kill()
        pools.take(pool)


def test_a_waiter_that_is_killed_takes_the_lock_from_nobody(pool: BlockPool) -> None:
    def wait_there(channel: Channel) -> None:
        wait = pool.state.mutex.wait

        def tell_and_wait(token: list[int], describe_holder: Callable[[], str]) -> None:
            channel.say("waiting")
            wait(token, describe_holder)

        pool.state.mutex.wait = tell_and_wait  # type: ignore[method-assign]
        run_inside(pool, channel.say, "inside")

    with fork(stay_inside, pool.name) as holder:
        holder.hear("inside")
        with fork(wait_there) as waiter:
            waiter.hear("waiting")
            waiter.kill()
        stranger = pools.locks_of(pool.name)
        assert not stranger.try_enter()
        stranger.close()
        holder.say("leave")


# --- whoever comes in from aside --------------------------------------------------------------


def test_a_signal_handler_inside_a_section_of_its_own_thread_is_told_so(pool: BlockPool) -> None:
    told: list[InvalidStateError] = []

    def handler(number: int, frame: FrameType | None) -> None:
        with pytest.raises(InvalidStateError, match="called from a signal handler") as caught:
            pool.alloc(1)
        told.append(caught.value)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        run_inside(pool, signal.raise_signal, signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert pool.name in str(told[0])
    assert "set a flag there" in str(told[0])
    assert pool.stats().allocations == 0


def test_a_section_within_a_section_is_refused_instead_of_waiting_for_ever(
    pool: BlockPool, stranger: FileLocks
) -> None:
    with pytest.raises(InvalidStateError, match="operation of the same thread"):
        run_inside(pool, pool.alloc, 1)
    assert not is_taken(stranger)


def test_a_section_within_a_section_is_refused_through_another_attachment_too(
    pool: BlockPool, stranger: FileLocks
) -> None:
    """Found: it waited for the lock that its own thread held, for the whole `lock_timeout`."""
    with pools.attach(pool.name) as other:
        with pytest.raises(InvalidStateError, match="operation of the same thread"):
            run_inside(pool, other.alloc, 1)
        assert not is_taken(stranger)
        pools.take(other)


def test_a_child_forked_by_a_handler_inside_a_section_cannot_go_on_there(pool: BlockPool) -> None:
    """Found: it came back from the handler into its parent's section, and wrote without a lock."""

    child = 0

    def fork_inside() -> None:
        nonlocal child
        child = os.fork()
        if not child:
            try:
                pool.state.blocks.note_unclaimed(1)  # any change
            except ValueError:
                os._exit(0 if pool.is_closed else 1)
            os._exit(2)

    run_inside(pool, fork_inside)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pool.state.blocks.unclaimed_ns == 0
    pools.take(pool)


def test_another_pool_may_be_used_inside_a_section(
    pool: BlockPool, new_pool_name: Callable[[], str]
) -> None:
    with pools.create(new_pool_name()) as other:
        assert run_inside(pool, other.alloc, 1) is not None


class AnyError(Exception):
    """Raised inside a section."""


@pytest.mark.parametrize("error", [AnyError, KeyboardInterrupt, SystemExit, MemoryError])
def test_an_exception_in_a_section_leaves_the_lock_free(
    pool: BlockPool, stranger: FileLocks, error: type[BaseException]
) -> None:
    def body() -> None:
        assert is_taken(stranger)
        raise error

    with pytest.raises(error):
        run_inside(pool, body)
    assert not is_taken(stranger)
    pools.take(pool)


def leave_token_behind(pool: BlockPool) -> None:
    """What two exceptions within the same microsecond would do: no clean-up runs."""
    mutex = pool.state.mutex
    leave = mutex.leave
    mutex.leave = lambda token: None  # type: ignore[method-assign]
    run_inside(pool, int)
    mutex.leave = leave  # type: ignore[method-assign]


@pytest.mark.parametrize("where", ["same thread", "another thread", "dead thread"])
def test_an_abandoned_token_is_given_back_by_the_next_call(
    pool: BlockPool, stranger: FileLocks, where: str
) -> None:
    if where == "dead thread":
        run_in_thread(lambda: leave_token_behind(pool))
    else:
        leave_token_behind(pool)
    assert is_taken(stranger)
    if where == "same thread":
        run_inside(pool, int)
    else:
        run_in_thread(lambda: run_inside(pool, int))
    assert not is_taken(stranger)


def run_in_thread(body: Callable[[], object]) -> None:
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()


# --- an interrupt at every line ---------------------------------------------------------------


class Interrupter:
    """Raises KeyboardInterrupt at the n-th line executed in the given functions, once."""

    def __init__(self, codes: set[CodeType], at: int) -> None:
        self.codes = codes
        self.left = at
        self.did = False

    def call(self, frame: FrameType, event: str, argument: object) -> TraceFunction | None:
        return self.line if frame.f_code in self.codes else None

    def line(self, frame: FrameType, event: str, argument: object) -> TraceFunction | None:
        if event == "line" and not self.did:
            self.left -= 1
            if self.left < 0:
                self.did = True
                raise KeyboardInterrupt
        return self.line

    def run(self, body: Callable[[], object]) -> bool:
        """Whether `body` was interrupted; False: it has no such line."""
        before = sys.gettrace()
        sys.settrace(self.call)
        try:
            body()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        assert not self.did, "an interrupt was swallowed"
        return False


TraceFunction = Callable[[FrameType, str, object], "TraceFunction | None"]

LINES_OF_MUTEX = {_SECTION} | {
    function.__code__
    for function in (
        Mutex.try_file,
        Mutex.leave,
        Mutex.wait,
        Mutex._refuse_nesting,
        Mutex._give_back_abandoned,
    )
}


def interrupted_lines(
    pool: BlockPool, before: Callable[[], None], after: Callable[[], None]
) -> int:
    """At how many lines a section was interrupted; each time the lock was free after it."""
    stranger = pools.locks_of(pool.name)
    at = 0
    before()
    while Interrupter(LINES_OF_MUTEX, at).run(lambda: run_inside(pool, int)):
        after()
        assert not is_taken(stranger), f"kept after the interrupt at line {at}"
        assert pool.state.mutex.inside == {}
        at += 1
        before()
    assert not is_taken(stranger)
    stranger.close()
    return at


def nothing() -> None:
    pass


def test_an_interrupt_at_any_line_of_an_uncontended_section_leaves_the_lock_free(
    pool: BlockPool,
) -> None:
    assert interrupted_lines(pool, nothing, nothing) >= 10


def test_an_interrupt_at_any_line_of_a_wait_leaves_the_lock_free(
    pool: BlockPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = pools.locks_of(pool.name)

    def taken_by_another() -> None:
        assert holder.try_enter()

    def left_by_the_other(seconds: float = 0.0) -> None:
        holder.leave()

    # The first sleep of the waiter is when the holder leaves.
    monkeypatch.setattr(time, "sleep", left_by_the_other)
    assert interrupted_lines(pool, taken_by_another, left_by_the_other) >= 40
    holder.close()


def test_threads_waiting_for_a_thread_go_on_when_it_is_interrupted(pool: BlockPool) -> None:
    inside, leave = threading.Event(), threading.Event()
    waited: list[int] = []

    def body() -> None:
        inside.set()
        leave.wait(60)
        raise AnyError

    def interrupted() -> None:
        with pytest.raises(AnyError):
            run_inside(pool, body)

    holder = threading.Thread(target=interrupted)
    holder.start()
    assert inside.wait(60)
    waiters = [threading.Thread(target=run_inside, args=(pool, waited.append, n)) for n in range(3)]
    for thread in waiters:
        thread.start()
    wait_until(lambda: len(threading.enumerate()) >= 4, "all threads run")
    leave.set()
    for thread in (holder, *waiters):
        thread.join()
    assert sorted(waited) == [0, 1, 2]
