"""What survives what: for each death (or stop), what every survivor sees.

One row per death. `happens` brings it about, `seen` says what the survivors see; then, for every
row alike, the survivor's next operation succeeds within a second, nothing that was published is
gone, and when all have left nothing is left.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec
import pytest

from shmblocks import (
    BlockHandle,
    BlockPool,
    InvalidStateError,
    Lease,
    PoolNotFoundError,
    PoolTimeoutError,
    StaleHandleError,
    State,
    list_pools,
)
from shmblocks.testing import Remembered, assert_survives, assert_unchanged, field_bytes, remember
from tests.crash.scenes import CONFIG, fill, publish, reserve
from tests.support.children import Channel, Child, fork, wait_until
from tests.support.inside import run_inside


class Stage:
    """The survivor's pool, and the children that are to die."""

    def __init__(self, pool: BlockPool, stack: contextlib.ExitStack) -> None:
        self.pool = pool
        self.kept = remember(pool, publish(pool, 10, readers=3))
        self.handle: BlockHandle | None = None
        self.leases: list[Lease] = []
        self.published: list[Remembered] = []
        self._stack = stack

    @property
    def the_handle(self) -> BlockHandle:
        assert self.handle is not None
        return self.handle

    def child(self, life: Callable[[Channel, BlockPool], object]) -> Child:
        """A forked participant that lives `life` and then waits to be killed."""
        child = self._stack.enter_context(fork(_live, life, self.pool))
        child.hear("ready")
        return child

    def at_the_end(self, callback: Callable[[], object]) -> None:
        """Before the survivor leaves."""
        self._stack.callback(callback)

    def state(self) -> State | None:
        """Of the allocation of `handle`; None when it is there no more."""
        for info in self.pool.allocations():
            if info.generation == self.the_handle.generation:
                return info.state
        return None


def _live(channel: Channel, life: Callable[[Channel, BlockPool], object], pool: BlockPool) -> None:
    kept = life(channel, pool)
    channel.say("ready")
    threading.Event().wait()
    del kept


class Row(NamedTuple):
    """One death, and what is seen of it."""

    death: str
    happens: Callable[[Stage], object]
    seen: Callable[[Stage], object]


# ---- writers -----------------------------------------------------------------------------------


def writer_dies(stage: Stage) -> None:
    stage.child(lambda _, pool: reserve(pool, 9)).kill()


def half_written_is_never_readable(stage: Stage) -> None:
    (half,) = [info for info in stage.pool.allocations() if info.state is State.RESERVED]
    handle = stage.pool.handle_at(half.start_block)
    with pytest.raises(InvalidStateError):
        stage.pool.open(handle)
    assert stage.pool.reap().reservations == 1
    with pytest.raises(StaleHandleError):
        stage.pool.open(handle)


def publisher_dies(stage: Stage) -> None:
    stage.child(lambda _, pool: publish(pool, 9)).kill()


def published_data_is_there_to_the_last_reader(stage: Stage) -> None:
    stage.pool.reap()
    (orphan,) = [info for info in stage.pool.allocations() if info.start_block != 0]
    handle = stage.pool.handle_at(orphan.start_block)
    with stage.pool.open(handle):
        content = bytes(field_bytes(stage.pool, handle, "x"))
        assert content.startswith(f"x of {handle.generation}. ".encode())
    with pytest.raises(StaleHandleError):
        stage.pool.open(handle)


# ---- readers -----------------------------------------------------------------------------------


def one_of_two_readers_dies(stage: Stage) -> None:
    handle = stage.handle = publish(stage.pool, 9, readers=2)
    stage.child(lambda _, pool: pool.open(handle)).kill()


def the_other_reader_still_comes(stage: Stage) -> None:
    assert stage.pool.reap().leases == 1
    assert stage.state() is State.PUBLISHED
    stage.pool.open(stage.the_handle).release()
    assert stage.state() is None


def the_only_reader_dies(stage: Stage) -> None:
    handle = stage.handle = publish(stage.pool, 9)
    stage.child(lambda _, pool: pool.open(handle)).kill()


def its_blocks_come_back(stage: Stage) -> None:
    report = stage.pool.reap()
    assert (report.leases, report.blocks, report.participants) == (1, 3, 1)
    assert stage.state() is None


def a_reader_dies_when_its_blocks_were_freed(stage: Stage) -> None:
    handle = stage.handle = publish(stage.pool, 9)
    child = stage.child(lambda _, pool: pool.open(handle))
    stage.pool.free(handle)
    assert stage.state() is State.DRAINING
    child.kill()


def a_reader_is_stopped(stage: Stage) -> None:
    handle = stage.handle = publish(stage.pool, 9)
    child = stage.child(lambda _, pool: pool.open(handle))
    child.stop()
    stage.at_the_end(child.kill)


def nothing_is_taken_from_it(stage: Stage) -> None:
    assert stage.pool.reap().leases == 0
    assert stage.state() is State.LEASED


# ---- landing -----------------------------------------------------------------------------------


def one_who_writes_into_a_landing_dies(stage: Stage) -> None:
    handle = stage.handle = reserve(stage.pool, 9)
    stage.child(lambda _, pool: pool.open_for_write(handle)).kill()


def its_owner_goes_on(stage: Stage) -> None:
    with pytest.raises(InvalidStateError):
        stage.pool.publish(stage.the_handle)
    assert stage.pool.reap().leases == 1
    stage.pool.free(stage.pool.publish(stage.the_handle))


def a_landings_owner_dies(stage: Stage) -> None:
    child = stage.child(lambda _, pool: reserve(pool, 9))
    (theirs,) = [info for info in stage.pool.allocations() if info.state is State.RESERVED]
    stage.handle = stage.pool.handle_at(theirs.start_block)
    stage.leases.append(stage.pool.open_for_write(stage.handle))
    child.kill()


def its_blocks_rest_for_the_writer(stage: Stage) -> None:
    stage.pool.reap()
    assert stage.state() is State.DRAINING
    stage.leases.pop().release()
    assert stage.state() is None


# ---- the lock ----------------------------------------------------------------------------------


def _hold_the_lock(channel: Channel, pool: BlockPool) -> None:
    def hold() -> None:
        channel.say("ready")
        threading.Event().wait()

    pool.available_blocks()
    run_inside(pool, hold)


def the_holder_of_the_lock_dies(stage: Stage) -> None:
    stage.child(_hold_the_lock).kill()


def the_next_one_gets_it(stage: Stage) -> None:
    assert stage.pool.check() == []


def the_holder_of_the_lock_is_stopped(stage: Stage) -> None:
    child = stage.child(_hold_the_lock)
    child.stop()
    with pytest.raises(PoolTimeoutError, match=rf"pid {child.pid}.*stopped"):
        stage.pool.available_blocks()
    child.kill()


def one_who_waits_for_the_lock_dies(stage: Stage) -> None:
    def wait() -> Child:
        child = fork(_wait_for_the_lock, stage.pool)
        child.hear("ready")
        return child

    # Inside the lock: the child can only wait.
    child = run_inside(stage.pool, wait)
    child.kill()
    child.close()


def _wait_for_the_lock(channel: Channel, pool: BlockPool) -> None:
    channel.say("ready")
    pool.available_blocks()
    channel.say("it never had to wait")


# ---- creators, parents, programs ---------------------------------------------------------------


def the_creator_dies(stage: Stage) -> None:
    """Of another pool; the survivor is attached to it."""

    def life(channel: Channel, _: BlockPool) -> BlockPool:
        created = BlockPool.create(f"{stage.pool.name}-2", CONFIG, prefault="off")
        publish(created, 5)
        return created

    child = stage.child(life)
    stage._stack.enter_context(BlockPool.attach(f"{stage.pool.name}-2", prefault="off"))
    child.kill()


def its_pool_goes_on_and_is_joined(stage: Stage) -> None:
    with BlockPool.attach(f"{stage.pool.name}-2", prefault="off") as another:
        assert another.reap().participants == 1
        (info,) = another.allocations()
        with another.open(another.handle_at(info.start_block)):
            assert another.stats().participants == 2


def everyone_of_a_pool_dies(stage: Stage) -> None:
    stage.child(
        lambda _, __: BlockPool.create(f"{stage.pool.name}-2", CONFIG, prefault="off")
    ).kill()


def it_is_shown_as_dead_and_replaced(stage: Stage) -> None:
    name = f"{stage.pool.name}-2"
    (summary,) = [summary for summary in list_pools() if summary.name == name]
    assert summary.state == "dead"
    with pytest.raises(PoolNotFoundError, match="all its processes are dead"):
        BlockPool.attach(name)
    with BlockPool.create(name, CONFIG, prefault="off") as anew:
        assert anew.available_blocks() == CONFIG.total_blocks


def a_parent_dies_and_its_child_lives(stage: Stage) -> None:
    """The grandchild inherits everything of its parent: mapping, descriptors, pool object."""
    read, write = os.pipe()

    def life(_: Channel, pool: BlockPool) -> None:
        os.close(write)
        reserve(pool, 9)
        if os.fork() == 0:
            os.read(read, 1)  # until the test lets go of the other end
            os._exit(0)

    stage.at_the_end(lambda: os.close(write))
    stage.child(life).kill()
    os.close(read)


def its_reservation_comes_back(stage: Stage) -> None:
    assert stage.pool.reap().reservations == 1


def a_participant_execs(stage: Stage) -> None:
    def life(channel: Channel, pool: BlockPool) -> None:
        reserve(pool, 9)
        channel.say("ready")
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(60)"])

    child = stage.child(life)
    wait_until(lambda: stage.pool.stats().dead_participants, "the program is another")
    stage.at_the_end(child.kill)


def a_thread_ends(stage: Stage) -> None:
    def life() -> None:
        stage.handle = reserve(stage.pool, 9)

    thread = threading.Thread(target=life)
    thread.start()
    thread.join(10)


def it_is_its_processes_still(stage: Stage) -> None:
    assert stage.pool.reap().reservations == 0
    stage.pool.free(stage.the_handle)


def the_name_is_removed(stage: Stage) -> None:
    os.unlink(f"/dev/shm{stage.pool.name}")


def its_users_go_on_and_nobody_joins(stage: Stage) -> None:
    with pytest.raises(PoolNotFoundError):
        BlockPool.attach(stage.pool.name)
    handle = publish(stage.pool, 9)
    with stage.pool.open(handle):
        fill(stage.pool, handle)


def nothing_more(_: Stage) -> None:
    """What every row sees is enough."""


TABLE = [
    Row("a writer, before it published", writer_dies, half_written_is_never_readable),
    Row("a writer, after it published", publisher_dies, published_data_is_there_to_the_last_reader),
    Row("one of two readers", one_of_two_readers_dies, the_other_reader_still_comes),
    Row("the only reader", the_only_reader_dies, its_blocks_come_back),
    Row("a reader of freed blocks", a_reader_dies_when_its_blocks_were_freed, its_blocks_come_back),
    Row("a stopped reader", a_reader_is_stopped, nothing_is_taken_from_it),
    Row("a writer into a landing", one_who_writes_into_a_landing_dies, its_owner_goes_on),
    Row(
        "the owner of a landing",
        a_landings_owner_dies,
        its_blocks_rest_for_the_writer,
    ),
    Row("the holder of the lock", the_holder_of_the_lock_dies, the_next_one_gets_it),
    Row("a stopped holder of the lock", the_holder_of_the_lock_is_stopped, the_next_one_gets_it),
    Row("one who waits for the lock", one_who_waits_for_the_lock_dies, the_next_one_gets_it),
    Row("the creator", the_creator_dies, its_pool_goes_on_and_is_joined),
    Row("everyone", everyone_of_a_pool_dies, it_is_shown_as_dead_and_replaced),
    Row(
        "a parent, not its child",
        a_parent_dies_and_its_child_lives,
        its_reservation_comes_back,
    ),
    Row(
        "a participant that calls exec",
        a_participant_execs,
        its_reservation_comes_back,
    ),
    Row("a thread", a_thread_ends, it_is_its_processes_still),
    Row(
        "the segment's name",
        the_name_is_removed,
        its_users_go_on_and_nobody_joins,
    ),
]


@pytest.fixture
def stage(pool_name: str) -> Iterator[Stage]:
    config = msgspec.structs.replace(CONFIG, lock_timeout=0.5)
    with (
        BlockPool.create(pool_name, config, role="survivor", prefault="off") as pool,
        contextlib.ExitStack() as stack,
    ):
        yield Stage(pool, stack)
    assert not os.path.exists(f"/dev/shm/{pool_name}")


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.death)
def test_what_survives_the_death_of(row: Row, stage: Stage) -> None:
    row.happens(stage)
    row.seen(stage)
    assert_survives(stage.pool, stage.kept)
    assert_unchanged(stage.pool, stage.kept)
