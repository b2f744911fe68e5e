"""Making segments where the file system has no O_TMPFILE: as atomic, and the dead leave nothing."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from shmblocks import BlockPool, HandleQueue, PoolExistsError, list_pools
from shmblocks._os import segment as segment_module
from shmblocks._os.filelock import NEW_BYTE, FileLocks, lock_byte
from shmblocks._os.segment import (
    HIDDEN,
    SHM_DIRECTORY,
    create_unnamed,
    link_name,
    normal_name,
    path_of,
    remove_abandoned,
)
from tests.core import pools
from tests.support.children import Channel, fork, run_in_fork


def hidden_files() -> set[str]:
    return {entry for entry in os.listdir(SHM_DIRECTORY) if entry.startswith(HIDDEN)}


@pytest.fixture(autouse=True)
def _no_unnamed_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse() -> int:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(segment_module, "_open_unnamed", refuse)
    yield
    remove_abandoned()


def test_a_hidden_name_is_the_name_of_no_segment() -> None:
    with pytest.raises(ValueError, match="pool name"):
        normal_name(HIDDEN + "0")


def test_pools_and_queues_work_and_leave_nothing(pool_name: str) -> None:
    before = hidden_files()
    with pools.create(pool_name) as pool, pools.attach(pool_name) as other:
        assert hidden_files() == before
        other.free(pools.take(other))
        assert pool.check() == []
        assert Path(path_of(pool_name)).stat().st_nlink == 1
    with HandleQueue.create(pool_name, 4) as queue, HandleQueue.attach(pool_name) as getter:
        queue.put(b"x")
        assert getter.get() == b"x"
    assert hidden_files() == before
    assert not Path(path_of(pool_name)).exists()


def test_the_mode_is_that_of_its_user_alone_from_the_start(pool_name: str) -> None:
    mask = os.umask(0)
    try:
        with create_unnamed(4096, "/any", None) as file:
            assert os.fstat(file.fileno()).st_mode & 0o777 == 0o600
    finally:
        os.umask(mask)


def test_nobody_sees_a_pool_before_it_is_whole(
    pool_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def look(*_: object) -> None:
        seen.append((Path(path_of(pool_name)).exists(), [each.name for each in list_pools()]))

    monkeypatch.setattr(segment_module, "_allow", look)
    with pools.create(pool_name):
        pass
    assert seen == [(False, seen[0][1])]
    assert f"/{pool_name}" not in seen[0][1]


def test_a_taken_name_is_told_and_the_hidden_file_goes(pool_name: str) -> None:
    before = hidden_files()
    with pools.create(pool_name) as pool:
        with pytest.raises(PoolExistsError):
            pools.create(pool_name)
        assert pool.check() == []
    assert hidden_files() == before


def test_a_creation_that_fails_leaves_no_hidden_file(
    pool_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = hidden_files()

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(KeyboardInterrupt):
        pools.create(pool_name)
    assert hidden_files() == before


def create_half(channel: Channel) -> None:
    file = create_unnamed(4096, "/any", None)
    channel.say(hidden_files())
    channel.receive()
    file.close()


def test_what_a_killed_creator_left_is_removed_by_the_next_one_and_a_living_ones_is_not(
    pool_name: str,
) -> None:
    before = hidden_files()
    with fork(create_half) as dying, fork(create_half) as living:
        first = dying.receive()
        second = living.receive()
        assert isinstance(first, set)
        assert isinstance(second, set)
        dying.kill()
        left = (first | second) - before
        assert len(left) == 2
        with pools.create(pool_name):
            assert len(hidden_files() & left) == 1
        living.say("end")
    assert not hidden_files() & left


def test_a_forked_child_does_not_remove_what_its_parent_makes() -> None:
    with create_unnamed(4096, "/any", None) as file:
        before = hidden_files()
        run_in_fork(file.close)
        assert hidden_files() == before
    assert len(hidden_files()) == len(before) - 1


def link_and_die(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "unlink", lambda _: os._exit(0))
    pools.create(name)


def test_a_creator_that_dies_between_its_two_names_leaves_a_pool_that_the_next_replaces(
    pool_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = hidden_files()

    def die(_: Channel) -> None:
        link_and_die(f"/{pool_name}", monkeypatch)

    child = fork(die)
    child.wait()
    child.close()
    assert Path(path_of(pool_name)).stat().st_nlink == 2
    with pools.create(pool_name) as pool:
        assert hidden_files() == before
        assert pool.check() == []


def test_of_two_creators_of_a_name_one_has_it(pool_name: str) -> None:
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(create_unnamed(4096, "/any", None)) for _ in range(2)]
        assert [link_name(file.fileno(), pool_name) for file in files] == [True, False]
    os.unlink(path_of(pool_name))


def test_a_file_that_was_taken_for_abandoned_before_it_was_locked_is_made_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stolen: list[str | None] = []

    def after_another_creator(fd: int, byte: int) -> bool:
        if not stolen:
            stolen.append(segment_module._hidden_path(fd))
            os.unlink(stolen[0] or "")  # as one does who finds its byte free
        return lock_byte(fd, byte)

    monkeypatch.setattr(segment_module, "lock_byte", after_another_creator)
    with create_unnamed(4096, "/any", None) as file:
        path = segment_module._hidden_path(file.fileno())
        assert path is not None
        assert stolen != [path]
        with contextlib.closing(FileLocks(file.fileno())) as locks:
            assert locks.is_locked_by_others(NEW_BYTE)


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL])
def test_each_way_to_say_that_there_are_no_unnamed_files_is_understood(
    pool_name: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse() -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(segment_module, "_open_unnamed", refuse)
    with BlockPool.create(pool_name, pools.tiny(), prefault="off") as pool:
        assert pool.check() == []
