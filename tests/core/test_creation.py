"""Creating: wholly or not at all, whoever looks, and whatever held the name before."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shmblocks import (
    BlockPool,
    IncompatiblePoolError,
    PoolExistsError,
    PoolNotFoundError,
    TooManyParticipantsError,
    list_pools,
    remove_dead_pools,
    remove_pool,
)
from shmblocks._os.segment import path_of
from shmblocks._state import lifetime
from shmblocks._state import naming as naming_module
from shmblocks._state import pool_state as pool_state_module
from shmblocks._state import shared_segment as shared_segment_module
from shmblocks._state.layout import H_VERSION
from shmblocks._state.participants import Participants
from shmblocks._state.pool_state import PoolState
from shmblocks.inspector import pool_names
from shmblocks.pool import Prefault
from tests.core import pools
from tests.core.conftest import require_right
from tests.support import procfs
from tests.support.children import Channel, fork


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def create_and_abandon(name: str, blocks: int = 16) -> None:
    """A leftover: the name is there, everybody is dead."""
    pools.abandon(pools.create(name, pools.tiny(blocks)))


# --- what an attacher sees --------------------------------------------------------------------


def create_again_and_again(channel: Channel, name: str) -> int:
    turn = 0
    while not channel.has_message(0):
        turn += 1
        try:
            pool = pools.create(name, pools.tiny(8 + turn % 5))
        except PoolExistsError:
            continue  # the attacher still lives in the last one
        time.sleep(turn % 4 * 1e-4)  # meets the attacher at one step and another
        pools.take(pool, 3)
        pool.close()
    return turn


def test_no_attacher_ever_sees_a_half_made_or_half_removed_pool(pool_name: str) -> None:
    attached = missed = 0
    with fork(create_again_and_again, pool_name) as creator:
        while attached < 150 or missed < 150:
            try:
                pool = pools.attach(pool_name)
            except PoolNotFoundError:
                missed += 1
                continue
            attached += 1
            # Whoever came in finds it whole, even when its creator is just leaving.
            assert pool.check() == []
            assert 8 <= pool.config.total_blocks == pool.stats().total_blocks <= 12
            pool.close()
        creator.say("enough")
    assert not Path(path_of(pool_name)).exists()


def test_one_of_many_creators_wins_a_name_and_the_others_are_told(pool_name: str) -> None:
    def try_to_create(channel: Channel) -> None:
        channel.say("ready")
        channel.hear("go")
        try:
            pool = pools.create(pool_name)
        except PoolExistsError:
            channel.say("exists")
        else:
            channel.say("created")
            channel.hear("leave")
            pool.close()

    for leftover in (False, True):
        if leftover:
            create_and_abandon(pool_name)
        with fork(try_to_create) as a, fork(try_to_create) as b, fork(try_to_create) as c:
            for child in (a, b, c):
                child.hear("ready")
            for child in (a, b, c):
                child.say("go")
            told = {child: child.receive() for child in (a, b, c)}
            assert sorted(map(str, told.values())) == ["created", "exists", "exists"]
            next(child for child, word in told.items() if word == "created").say("leave")
        assert not Path(path_of(pool_name)).exists()


# --- a creator that does not finish -----------------------------------------------------------

STEPS: dict[str, tuple[object, str]] = {
    "before the header": (pool_state_module, "_write_header"),
    "before the memory is mapped": (PoolState, "__init__"),
    "before it joins": (Participants, "join"),
    "before it has a name": (shared_segment_module, "claim_name"),
    "before the link": (naming_module, "link_name"),
    "after the link": (lifetime, "watch_exit"),
}


@pytest.mark.parametrize("step", [step for step in STEPS if step != "after the link"])
def test_a_creator_killed_half_way_leaves_nothing(
    pool_name: str, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    owner, function = STEPS[step]

    def create(channel: Channel) -> None:
        monkeypatch.setattr(owner, function, lambda *args, **named: die())
        pools.create(pool_name)

    with fork(create) as child:
        assert child.wait() == -signal.SIGKILL
        child.kill()
    assert not Path(path_of(pool_name)).exists()
    with pools.create(pool_name) as pool:
        require_right(pool)


def test_a_creator_killed_just_after_its_pool_got_its_name_is_no_obstacle(
    pool_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shmblocks._state.naming import claim_name

    def create(channel: Channel) -> None:
        def claim_and_die(fd: int, kind: str, name: str, timeout: float) -> None:
            claim_name(fd, kind, name, timeout)
            die()

        monkeypatch.setattr(shared_segment_module, "claim_name", claim_and_die)
        pools.create(pool_name)

    with fork(create) as child:
        assert child.wait() == -signal.SIGKILL
        child.kill()
    with pytest.raises(PoolNotFoundError, match="all its processes are dead"):
        pools.attach(pool_name)
    with pools.create(pool_name) as pool:
        require_right(pool)


class AnyError(Exception):
    """Raised at a step of creation."""


@pytest.mark.parametrize("step", [step for step in STEPS if step != "after the link"])
def test_a_creation_that_fails_at_any_step_is_undone(
    pool_name: str, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    owner, function = STEPS[step]

    def fail(*args: object, **named: object) -> None:
        raise AnyError

    before = set(procfs.descriptors())
    monkeypatch.setattr(owner, function, fail)
    with pytest.raises(AnyError):
        pools.create(pool_name)
    monkeypatch.undo()
    assert set(procfs.descriptors()) == before
    assert not Path(path_of(pool_name)).exists()


@pytest.mark.parametrize("prefault", ["now", "background"])
def test_a_creation_whose_prefault_fails_is_undone(
    pool_name: str, monkeypatch: pytest.MonkeyPatch, prefault: Prefault
) -> None:
    from shmblocks._os.segment import Segment

    def fail(*args: object, **named: object) -> None:
        raise AnyError

    monkeypatch.setattr(Segment, "prefault", fail)
    with pytest.raises(AnyError):
        BlockPool.create(pool_name, pools.tiny(), prefault=prefault)
    assert not Path(path_of(pool_name)).exists()


def test_a_failed_attach_takes_nothing_from_the_creator(
    pool: BlockPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shmblocks._os.segment import Segment

    def fail(*args: object, **named: object) -> None:
        raise AnyError

    handle = pools.take(pool)
    for owner, function in ((Segment, "prefault"), (Participants, "join"), (PoolState, "__init__")):
        monkeypatch.setattr(owner, function, fail)
        with pytest.raises(AnyError):
            BlockPool.attach(pool.name)
        monkeypatch.undo()
        assert [each.is_self for each in pool.participants() if each.is_alive] == [True]
    with pools.attach(pool.name) as other:
        assert other.handle_at(handle.start_block) == handle


# --- a name that is taken ---------------------------------------------------------------------


def test_the_name_of_a_living_pool_is_taken_and_the_pool_untouched(pool: BlockPool) -> None:
    handle = pools.take(pool)
    with pytest.raises(
        PoolExistsError, match=f"{pool.name}: a living pool or queue holds the name .*attach"
    ):
        pools.create(pool.name, pools.tiny(64))
    assert pool.handle_at(handle.start_block) == handle
    with pools.attach(pool.name) as other:
        assert other.pool_id == pool.pool_id


def test_a_leftover_is_replaced_by_a_new_pool_of_any_size(pool_name: str) -> None:
    create_and_abandon(pool_name, 16)
    with pools.create(pool_name, pools.tiny(5)) as pool, pools.attach(pool_name) as other:
        assert other.pool_id == pool.pool_id
        assert other.stats().total_blocks == other.available_blocks() == 5
        require_right(pool)


def test_a_leftover_of_which_somebody_kept_the_lock_is_waited_for(pool_name: str) -> None:
    create_and_abandon(pool_name)
    locks = pools.locks_of(pool_name)
    assert locks.try_enter()
    timer = threading.Timer(0.05, locks.close)
    timer.start()
    with pools.create(pool_name) as pool:
        require_right(pool)
    timer.join()


def test_a_leftover_that_is_locked_for_ever_is_told_after_the_lock_timeout(pool_name: str) -> None:
    create_and_abandon(pool_name)
    locks = pools.locks_of(pool_name)
    assert locks.try_enter()
    with pytest.raises(PoolExistsError, match="holds the name"):
        pools.create(pool_name, pools.tiny(lock_timeout=0.05))
    locks.close()
    remove_pool(pool_name)


def test_ensure_removes_the_dead_pools_of_a_prefix_and_no_other(pool_name: str) -> None:
    create_and_abandon(f"{pool_name}-a-1")
    create_and_abandon(f"{pool_name}-b")
    with pools.create(f"{pool_name}-a-2") as alive:
        config = pools.tiny(4)
        with BlockPool.ensure(f"{pool_name}-a-3", config, remove_dead=f"{pool_name}-a"):
            names = {name for name in pool_names() if pool_name in name}
            assert names == {alive.name, f"/{pool_name}-a-3", f"/{pool_name}-b"}
    assert remove_dead_pools(pool_name) == [f"/{pool_name}-b"]


@pytest.mark.parametrize("prefix", ["", "/"])
def test_an_empty_prefix_removes_nothing(pool_name: str, prefix: str) -> None:
    create_and_abandon(pool_name)
    with pytest.raises(ValueError, match="prefix: expected the beginning"):
        remove_dead_pools(prefix)
    remove_pool(pool_name)


@pytest.mark.parametrize("content", [b"", b"x", b"somebody's data " * 1000])
def test_a_foreign_file_of_that_name_is_left_alone(pool_name: str, content: bytes) -> None:
    path = Path(path_of(pool_name))
    path.write_bytes(content)
    with pytest.raises(
        PoolExistsError, match=f"neither a pool nor a queue holds the name.*/dev/shm/{pool_name}"
    ):
        pools.create(pool_name)
    with pytest.raises(IncompatiblePoolError, match="not a pool"):
        pools.attach(pool_name)
    with pytest.raises(IncompatiblePoolError, match="not a pool"):
        remove_pool(pool_name, force=True)
    assert path.read_bytes() == content
    path.unlink()


def make_directory(path: Path) -> None:
    path.mkdir()


def make_link(path: Path) -> None:
    path.symlink_to("/dev/null")


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("make", [make_directory, make_link, make_pipe])
def test_what_is_no_file_at_all_is_no_pool_either(
    pool_name: str, make: Callable[[Path], None]
) -> None:
    path = Path(path_of(pool_name))
    make(path)
    try:
        assert pool_name not in {summary.name[1:] for summary in list_pools()}
        with pytest.raises(PoolExistsError):
            pools.create(pool_name)
        with pytest.raises(IncompatiblePoolError):
            pools.attach(pool_name)
        with pytest.raises(IncompatiblePoolError):
            remove_pool(pool_name)
    finally:
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def test_a_dead_pool_of_another_version_is_replaced_and_a_living_one_is_not(
    pool_name: str,
) -> None:
    pool = pools.create(pool_name)
    pools.set_word(pool, H_VERSION, 99)
    with pytest.raises(PoolExistsError, match="a living pool or queue holds the name"):
        pools.create(pool_name)
    pools.abandon(pool)
    with pools.create(pool_name) as new:
        require_right(new)


def test_a_truncated_leftover_is_replaced(pool_name: str) -> None:
    create_and_abandon(pool_name)
    os.truncate(path_of(pool_name), 4096)
    with pools.create(pool_name) as pool:
        require_right(pool)


# --- slots ------------------------------------------------------------------------------------


def test_more_participants_than_slots_are_told_with_those_who_have_them(pool_name: str) -> None:
    config = pools.tiny(max_participants=2)
    with pools.create(pool_name, config, role="a"), pools.attach(pool_name, role="b") as other:
        said = rf"(?s)all 2 participant slots.*larger.*max_participants.*pid {os.getpid()}, a"
        with pytest.raises(TooManyParticipantsError, match=said):
            pools.attach(pool_name)
        other.close()
        with pools.attach(pool_name):
            pass


def test_the_slots_of_the_dead_are_taken_by_the_next(pool_name: str) -> None:
    with pools.create(pool_name, pools.tiny(max_participants=2)) as pool:
        for _ in range(3):
            dead = pools.attach(pool_name)
            pools.take(dead)
            pools.abandon(dead)
        with pools.attach(pool_name) as living:
            assert living.participant is not None
            assert living.participant.slot == 1
            living.reap()
            require_right(pool)
            assert pool.stats().reserved_blocks == 0
