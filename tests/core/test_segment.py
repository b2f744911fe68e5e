"""The segment: its name, its memory, and who may open it."""

from __future__ import annotations

import grp
import os
import pwd
import re
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from shmblocks import (
    BlockPool,
    Field,
    HandleQueue,
    PoolConfig,
    PoolNotFoundError,
    PoolPermissionError,
    SharedMemoryFullError,
    remove_pool,
)
from shmblocks._os.segment import create_unnamed, normal_name, path_of
from tests.core import namespaces, pools
from tests.support import procfs
from tests.support.children import PATIENCE, Channel, fork, run_in_fork

MIB = 1 << 20


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "A.b_c-9", "..a", "x" * 200])
def test_a_name_may_have_a_leading_slash(name: str) -> None:
    assert normal_name(name) == normal_name(f"/{name}") == f"/{name}"
    assert path_of(name) == f"/dev/shm/{name}"


@pytest.mark.parametrize(
    "name", ["", "/", ".", "..", "/..", "a/b", "//a", "x" * 201, "a b", "é", "a\n", "a\0", "../a"]
)
def test_a_name_that_could_lead_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"pool name: expected 1 to 200 .*got") as caught:
        normal_name(name)
    assert repr(name) in str(caught.value)


def test_every_door_looks_at_the_name_first() -> None:
    with pytest.raises(ValueError, match="pool name"):
        BlockPool.create("../etc/passwd", pools.tiny())
    with pytest.raises(ValueError, match="pool name"):
        BlockPool.attach("../etc/passwd")


# --- who may ----------------------------------------------------------------------------------

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def mode_of(name: str) -> int:
    return stat.S_IMODE(Path(path_of(name)).stat().st_mode)


def become_nobody(group: int) -> None:
    """What a process of another user is, with one group."""
    user = pwd.getpwnam("nobody").pw_uid
    os.setgroups([])
    os.setresgid(group, group, group)
    os.setresuid(user, user, user)


def attach_as_nobody(name: str, group: int) -> str:
    become_nobody(group)
    try:
        with pools.attach(name) as pool:
            pool.free(pools.take(pool))
            return f"{pool.check()}"
    except PoolPermissionError as error:
        return str(error)


def test_a_pool_is_its_users_alone(pool: BlockPool) -> None:
    assert mode_of(pool.name) == 0o600


@pytest.mark.parametrize("mask", [0o000, 0o077, 0o777])
def test_the_mode_does_not_depend_on_the_umask(pool_name: str, mask: int) -> None:
    before = os.umask(mask)
    try:
        with pools.create(pool_name):
            assert mode_of(pool_name) == 0o600
    finally:
        os.umask(before)


@needs_root
def test_another_user_cannot_attach_and_is_told_why(pool: BlockPool) -> None:
    nogroup = pwd.getpwnam("nobody").pw_gid
    told = run_in_fork(attach_as_nobody, pool.name, nogroup)
    assert re.search(f"{pool.name}: it belongs to another user.*PoolConfig", told)


@needs_root
def test_a_pool_of_a_group_is_used_by_another_user_of_the_group_and_by_nobody_else(
    pool_name: str,
) -> None:
    group = next(each for each in grp.getgrall() if each.gr_gid not in (0, 65534))
    with pools.create(pool_name, pools.tiny(group=group.gr_name)):
        assert mode_of(pool_name) == 0o660
        assert Path(path_of(pool_name)).stat().st_gid == group.gr_gid
        assert run_in_fork(attach_as_nobody, pool_name, group.gr_gid) == "[]"
        told = run_in_fork(attach_as_nobody, pool_name, pwd.getpwnam("nobody").pw_gid)
        assert "it belongs to another user" in told


def outlive_the_creator(channel: Channel, name: str, group: int) -> bool:
    """Whether the last one out has left, who may not unlink in a sticky directory."""
    become_nobody(group)
    pool = pools.attach(name, timeout=PATIENCE)
    queue = HandleQueue.attach(f"{name}.queue", timeout=PATIENCE)
    channel.say("attached")
    channel.hear("alone")
    pool.close()
    queue.close()
    return pool.is_closed and queue.is_closed


@needs_root
def test_what_the_last_one_out_may_not_remove_is_a_leftover_that_its_owner_replaces(
    pool_name: str,
) -> None:
    """Found: `close` failed with the error of unlink, and left it attached for good."""
    group = next(each for each in grp.getgrall() if each.gr_gid not in (0, 65534))
    config = pools.tiny(group=group.gr_name)
    with fork(outlive_the_creator, pool_name, group.gr_gid) as other:
        pool = pools.create(pool_name, config)
        queue = HandleQueue.create(f"{pool_name}.queue", 4, group=group.gr_name)
        other.hear("attached")
        pool.close()
        queue.close()
        other.say("alone")
        assert other.result() is True
    assert Path(path_of(pool_name)).exists()
    with pools.create(pool_name, config), HandleQueue.create(f"{pool_name}.queue", 4):
        pass
    assert not Path(path_of(pool_name)).exists()


@needs_root
def test_a_leftover_of_another_user_is_told_to_one_who_would_replace_it(pool_name: str) -> None:
    group = next(each for each in grp.getgrall() if each.gr_gid not in (0, 65534))
    pools.abandon(pool := pools.create(pool_name, pools.tiny(group=group.gr_name)))

    def replace() -> str:
        become_nobody(group.gr_gid)
        with pytest.raises(PoolPermissionError) as caught:
            pools.create(pool_name)
        return str(caught.value)

    assert "only the user who created it can remove it" in run_in_fork(replace)
    pool.close()
    remove_pool(pool_name)


@needs_root
def test_a_group_that_the_user_is_not_in_is_told(pool_name: str) -> None:
    def create() -> str:
        become_nobody(pwd.getpwnam("nobody").pw_gid)
        with pytest.raises(PoolPermissionError) as caught:
            pools.create(pool_name, pools.tiny(group="root"))
        return str(caught.value)

    assert "this user is not in the group 'root'" in run_in_fork(create)
    assert not Path(path_of(pool_name)).exists()


def test_a_group_that_is_not_there_is_told_and_nothing_is_left(pool_name: str) -> None:
    with pytest.raises(ValueError, match=r"group: expected the name of a Unix group, got 'nöne'"):
        pools.create(pool_name, pools.tiny(group="nöne"))
    with pytest.raises(PoolNotFoundError):
        pools.attach(pool_name)


def test_a_size_that_no_file_can_have_does_not_fit_an_unlimited_file_system_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Found: an OverflowError, where /dev/shm is mounted with `size=0`, which is no limit."""
    unlimited = SimpleNamespace(f_blocks=0, f_bavail=0, f_frsize=4096, f_files=0, f_flag=0)
    monkeypatch.setattr(os, "statvfs", lambda path: unlimited)
    with pytest.raises(SharedMemoryFullError, match="pool /any: needs"):
        create_unnamed(1 << 63, "/any", None)


# --- memory that is there ---------------------------------------------------------------------


def test_every_page_of_a_new_pool_is_allocated_and_zero(pool_name: str) -> None:
    config = PoolConfig(total_tokens=128 * 64, block_size=128)
    with pools.create(pool_name, config):
        status = Path(path_of(pool_name)).stat()
        assert status.st_blocks * 512 >= status.st_size > 0


def test_a_pool_larger_than_shared_memory_can_ever_be_is_refused(pool_name: str) -> None:
    space = os.statvfs("/dev/shm")
    if space.f_blocks == 0:
        pytest.skip("/dev/shm has no limit here")
    too_many = space.f_blocks * space.f_frsize // 64 + 1  # 64 bytes of aux a block alone
    if too_many > 1 << 24:
        config = PoolConfig(total_tokens=1 << 24, block_size=1 << 20, fields=wide_fields())
    else:
        config = PoolConfig(total_tokens=too_many, block_size=1)
    before = set(procfs.descriptors())
    with pytest.raises(
        SharedMemoryFullError, match=r"needs .* [MGT]iB, /dev/shm has .* [MGT]iB free"
    ):
        pools.create(pool_name, config)
    assert set(procfs.descriptors()) == before
    assert not Path(path_of(pool_name)).exists()


def wide_fields() -> tuple[Field, ...]:
    return (Field("x", (1 << 26,), "int8"),)


def create_in_small_shared_memory(name: str) -> list[str]:
    """What creating says, with 64 MiB; after each failure nothing may be left."""
    namespaces.shrink_shared_memory(64)

    def attempt(mebibytes: int, keep: list[BlockPool]) -> str:
        before = os.statvfs("/dev/shm").f_bavail
        config = PoolConfig(total_tokens=mebibytes * 1024, fields=(Field("x", (1024,), "int8"),))
        try:
            keep.append(pools.create(f"{name}-{len(keep)}", config))
        except SharedMemoryFullError as error:
            left = before - os.statvfs("/dev/shm").f_bavail
            return f"{error} (left: {left} pages)"
        return "created"

    kept: list[BlockPool] = []
    told = [attempt(100, kept), attempt(40, kept), attempt(40, kept), attempt(8, kept)]
    assert len(os.listdir("/dev/shm")) == len(kept)
    for pool in kept:
        pool.close()
    assert os.listdir("/dev/shm") == []
    return told


def test_a_container_with_small_shared_memory_is_told_at_creation_and_nothing_is_left(
    pool_name: str,
) -> None:
    if reason := namespaces.why_no_mounts():
        pytest.skip(reason)
    never, first, second, smaller = run_in_fork(create_in_small_shared_memory, pool_name)
    assert re.search(
        rf"{pool_name}-0: needs 10\d MiB, /dev/shm has 64 MiB free of 64.*--shm-size=\d+m.*left: 0",
        never,
    )
    assert first == "created"
    assert re.search(r"needs 4\d.* MiB, /dev/shm has 2\d.* MiB free .*--shm-size=.*left: 0", second)
    assert smaller == "created"
