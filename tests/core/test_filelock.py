"""File locks belong to descriptions: what the kernel promises, and the fork trap."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import pytest

from shmblocks._os.filelock import FileLocks, share_byte
from tests.support.children import Channel, fork, run_in_fork


@pytest.fixture
def fd() -> Iterator[int]:
    """A descriptor of a nameless file in shared memory."""
    number = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    os.ftruncate(number, 4096)
    yield number
    os.close(number)


def test_a_byte_is_locked_by_one_description_at_a_time(fd: int) -> None:
    first, second = FileLocks(fd), FileLocks(fd)
    assert first.try_lock(7)
    assert first.try_lock(7), "a lock of one's own is no obstacle"
    assert not second.try_lock(7)
    assert second.try_lock(8)
    first.unlock(7)
    assert second.try_lock(7)
    first.close()
    second.close()


def test_only_the_locks_of_others_are_seen(fd: int) -> None:
    first, second = FileLocks(fd), FileLocks(fd)
    assert first.try_lock(70)
    assert not first.is_locked_by_others(70)
    assert second.is_locked_by_others(70)
    assert second.is_locked_by_others(64, 1000)
    assert not second.is_locked_by_others(71, 1000)
    first.close()
    assert not second.is_locked_by_others(64, 1000)
    second.close()


def test_the_whole_file_is_entered_by_one_description_at_a_time(fd: int) -> None:
    first, second = FileLocks(fd), FileLocks(fd)
    assert first.try_enter()
    assert first.try_enter(), "a lock of one's own is no obstacle"
    assert not second.try_enter()
    second.leave()  # takes nothing from the other
    assert not second.try_enter()
    first.leave()
    assert second.try_enter()
    second.close()
    assert first.try_enter()
    first.close()


def test_who_is_inside_and_which_bytes_are_locked_are_two_things(fd: int) -> None:
    first, second = FileLocks(fd), FileLocks(fd)
    assert first.try_enter()
    assert second.try_lock(7)
    assert not second.is_locked_by_others(0, 65536)
    second.unlock(7)
    assert not second.try_enter()
    first.leave()
    assert first.try_lock(7)
    assert second.try_enter()
    first.close()
    second.close()


def test_a_shared_byte_is_held_until_its_last_description_is_closed(fd: int) -> None:
    locks = FileLocks(fd)
    first, second = locks.open_again(), locks.open_again("rb")
    assert share_byte(first.fileno(), 7)
    assert share_byte(second.fileno(), 7)
    assert not locks.try_lock(7)
    first.close()
    assert locks.is_locked_by_others(7)
    second.close()
    assert locks.try_lock(7)
    with locks.open_again() as third:
        assert not share_byte(third.fileno(), 7)
    locks.close()


def test_closing_is_idempotent_and_says_so_with_its_descriptor(fd: int) -> None:
    locks = FileLocks(fd)
    assert locks.fd >= 0
    locks.close()
    locks.close()
    assert locks.fd == -1


def test_what_a_killed_process_held_is_free(fd: int) -> None:
    ours = FileLocks(fd)
    with fork(hold, fd) as child:
        child.hear("locked")
        assert ours.is_locked_by_others(9)
        assert not ours.try_enter()
        child.kill()
    assert ours.try_lock(9)
    assert ours.try_enter()
    ours.close()


def hold(channel: Channel, fd: int) -> None:
    locks = FileLocks(fd)
    assert locks.try_lock(9)
    assert locks.try_enter()
    channel.say("locked")
    channel.receive()


def test_a_forked_child_that_reopened_holds_nothing_and_takes_nothing_from_its_parent(
    fd: int,
) -> None:
    locks = FileLocks(fd)
    assert locks.try_lock(9)
    assert locks.try_enter()

    def in_child() -> tuple[bool, bool, bool]:
        locks.reopen_after_fork()
        return locks.is_locked_by_others(9), locks.try_lock(9), locks.try_enter()

    assert run_in_fork(in_child) == (True, False, False)
    assert not locks.is_locked_by_others(9)
    stranger = FileLocks(fd)
    assert not stranger.try_enter(), "the child's leaving has freed what its parent holds"
    stranger.close()
    locks.close()


def test_a_mapping_that_a_child_inherited_keeps_no_lock_of_its_dead_parent(fd: int) -> None:
    """The trap: locks on the description that is *mapped* would outlive the parent here."""
    ours = FileLocks(fd)
    reader, writer = os.pipe()
    with fork(hold_and_fork, fd, reader, writer) as parent:
        parent.hear("the child is there and has closed its descriptors")
        assert ours.is_locked_by_others(9)
        assert not ours.try_enter()
        parent.kill()
    assert ours.try_lock(9)
    assert ours.try_enter()
    os.close(reader)
    os.close(writer)  # which ends the child
    ours.close()


def hold_and_fork(channel: Channel, fd: int, reader: int, writer: int) -> None:
    mapping = mmap.mmap(fd, 4096)
    locks = FileLocks(fd)
    assert locks.try_lock(9)
    assert locks.try_enter()
    told, tell = os.pipe()
    if os.fork() == 0:
        locks.reopen_after_fork()
        os.close(writer)
        os.write(tell, b".")
        os.read(reader, 1)
        os._exit(len(mapping) and 0)
    os.read(told, 1)
    channel.say("the child is there and has closed its descriptors")
    channel.receive()
