"""Made, found, inherited, pickled, left and removed; and leftovers replaced."""

from __future__ import annotations

import gc
import os
import pickle
import queue as standard
import threading
from pathlib import Path

import pytest

from shmblocks import (
    BlockHandle,
    BlockPool,
    DamagedPoolError,
    HandleQueue,
    IncompatiblePoolError,
    PoolExistsError,
    PoolNotFoundError,
)
from shmblocks._state.info import ParticipantId
from shmblocks._state.layout import LAYOUT_VERSION
from tests.core import pools
from tests.queue.kit import PATIENCE, Numbered, Waiting, abandon, drain, fill
from tests.support.children import Channel, fork, run_in_child, run_in_fork, spawn


def path_of(name: str) -> Path:
    return Path("/dev/shm", name.removeprefix("/"))


# ---- made and found --------------------------------------------------------------------------


def test_it_says_what_it_is(pool_name: str) -> None:
    with HandleQueue.create(pool_name, 7, message_bytes=100) as queue:
        assert (queue.name, queue.capacity, queue.message_bytes) == ("/" + pool_name, 7, 100)
        assert not queue.is_closed
        assert repr(queue) == f"HandleQueue('/{pool_name}', 0 of 7 messages)"
        queue.put(b"x")
        assert repr(queue) == f"HandleQueue('/{pool_name}', 1 of 7 messages)"


def test_one_that_is_attached_knows_the_sizes(queue: HandleQueue[bytes]) -> None:
    with HandleQueue.attach(queue.name) as other:
        assert (other.capacity, other.message_bytes) == (queue.capacity, queue.message_bytes)
        other.put(b"x")
        assert queue.get() == b"x"


def test_a_name_that_is_in_use_is_refused(queue: HandleQueue[bytes]) -> None:
    queue.put(b"x")
    with pytest.raises(PoolExistsError, match=queue.name):
        HandleQueue.create(queue.name)
    assert queue.get() == b"x"


def test_a_name_that_nobody_has_is_not_found(pool_name: str) -> None:
    with pytest.raises(PoolNotFoundError, match=pool_name):
        HandleQueue.attach(pool_name)


def test_attach_waits_for_the_creator(pool_name: str) -> None:
    with (
        Waiting(lambda: HandleQueue.attach(pool_name, timeout=PATIENCE)) as attaching,
        HandleQueue.create(pool_name) as queue,
        attaching.result() as other,
    ):
        other.put(b"x")
        assert queue.get() == b"x"


def test_a_pool_is_no_queue_and_a_queue_is_no_pool(
    queue: HandleQueue[bytes], pool_name: str
) -> None:
    with pytest.raises(IncompatiblePoolError, match="not a pool"):
        BlockPool.attach(queue.name)
    with pools.create(pool_name + "-pool") as pool:
        with pytest.raises(IncompatiblePoolError, match="not a queue"):
            HandleQueue.attach(pool.name)
        with pytest.raises(PoolExistsError):
            HandleQueue.create(pool.name)


def test_nobody_else_may_open_it(queue: HandleQueue[bytes]) -> None:
    assert path_of(queue.name).stat().st_mode & 0o777 == 0o600


# ---- left ------------------------------------------------------------------------------------


def test_the_last_one_to_leave_removes_it(pool_name: str) -> None:
    queue = HandleQueue.create(pool_name)
    other = HandleQueue.attach(pool_name)
    queue.put(b"x")
    queue.close()
    assert path_of(pool_name).exists()
    assert other.get() == b"x"
    other.close()
    assert not path_of(pool_name).exists()


def attach_and_die(channel: Channel, name: str) -> None:
    queue = HandleQueue.attach(name)
    queue.put(b"from the dead")
    channel.say("attached")
    channel.receive()


def test_the_dead_keep_nothing_alive(pool_name: str) -> None:
    with HandleQueue.create(pool_name) as queue:
        with spawn(attach_and_die, pool_name) as child:
            child.hear("attached")
            child.kill()
        assert queue.get() == b"from the dead"
    assert not path_of(pool_name).exists()


def leave_without_close(_: Channel, name: str) -> None:
    queue = HandleQueue.attach(name)
    queue.put(b"x")


def test_a_child_that_just_ends_has_left(pool_name: str) -> None:
    queue = HandleQueue.create(pool_name)
    with spawn(leave_without_close, pool_name), fork(leave_without_close, pool_name):
        pass
    assert drain(queue) == [b"x", b"x"]
    queue.close()
    assert not path_of(pool_name).exists()


def create_and_end(_: Channel, name: str) -> None:
    HandleQueue.create(name).put(b"x")


def test_the_only_one_that_just_ends_removes_it(pool_name: str) -> None:
    with spawn(create_and_end, pool_name):
        pass
    assert not path_of(pool_name).exists()


def test_one_that_nobody_refers_to_any_more_has_left(pool_name: str) -> None:
    HandleQueue.create(pool_name)
    gc.collect()
    assert not path_of(pool_name).exists()


def test_a_queue_of_the_dead_is_not_found_and_replaced(pool_name: str) -> None:
    left = HandleQueue.create(pool_name, 3)
    left.put(b"old")
    abandon(left)
    assert path_of(pool_name).exists()
    with pytest.raises(PoolNotFoundError, match="leftover"):
        HandleQueue.attach(pool_name)
    with HandleQueue.create(pool_name, 5) as queue:
        assert (queue.capacity, queue.empty()) == (5, True)


def test_a_pool_of_the_dead_is_replaced_by_a_queue_and_the_other_way(pool_name: str) -> None:
    pools.abandon(pools.create(pool_name))
    left = HandleQueue.create(pool_name)
    abandon(left)
    with pools.create(pool_name):
        pass


def test_one_whose_name_was_taken_away_goes_on(queue: HandleQueue[bytes]) -> None:
    with HandleQueue.attach(queue.name) as other:
        path_of(queue.name).unlink()
        other.put(b"x")
        assert queue.get() == b"x"
        with pytest.raises(PoolNotFoundError):
            HandleQueue.attach(queue.name)


def test_leaving_does_not_remove_another_queue_of_the_same_name(
    queue: HandleQueue[bytes],
) -> None:
    path_of(queue.name).unlink()
    with HandleQueue.create(queue.name) as newer:
        queue.close()
        assert path_of(queue.name).exists()
        with HandleQueue.attach(newer.name) as other:
            other.put(b"x")
            assert newer.get() == b"x"


# ---- inherited and sent ----------------------------------------------------------------------


def put_and_get(queue: HandleQueue[bytes]) -> bytes:
    message = queue.get(timeout=PATIENCE)
    queue.put(message + b" and back")
    return message


def test_a_forked_child_goes_on_with_it(queue: HandleQueue[bytes]) -> None:
    queue.put(b"there")
    assert run_in_fork(put_and_get, queue) == b"there"
    assert queue.get() == b"there and back"


def test_a_spawned_child_gets_it_as_an_argument(queue: HandleQueue[bytes]) -> None:
    queue.put(b"there")
    assert run_in_child(put_and_get, queue) == b"there"
    assert queue.get() == b"there and back"


def test_its_type_and_spin_are_sent_along(pool_name: str) -> None:
    with HandleQueue.create(pool_name, 4, message_type=Numbered, spin=0.5) as queue:
        queue.put(Numbered(1, 2))
        with pickle.loads(pickle.dumps(queue)) as copy:
            assert (copy._message_type, copy._spin) == (Numbered, 0.5)
            assert copy.get() == Numbered(1, 2)


def test_a_queue_that_was_sent_is_not_another_that_took_its_name(pool_name: str) -> None:
    """Found: a matching name passed for the same queue."""
    with HandleQueue.create(pool_name) as queue:
        sent = pickle.dumps(queue)
    with HandleQueue.create(pool_name) as newer:
        with pytest.raises(PoolNotFoundError, match="another has taken its name"):
            pickle.loads(sent)
        newer.put(b"x")
        assert newer.get() == b"x"


def outlive_the_parent_there(channel: Channel, queue: HandleQueue[bytes]) -> bool:
    queue.put(b"from the child")
    channel.say("in")
    channel.hear("alone")
    got = queue.get(timeout=PATIENCE) == b"from the child"
    queue.close()
    return got and not path_of(queue.name).exists()


def test_a_forked_child_outlives_its_parents_use_and_is_then_the_last(pool_name: str) -> None:
    queue = HandleQueue.create(pool_name)
    with fork(outlive_the_parent_there, queue) as child:
        child.hear("in")
        queue.close()
        assert path_of(pool_name).exists()
        child.say("alone")
        assert child.result() is True


def participant_of(queue: HandleQueue[bytes]) -> ParticipantId:
    me = queue.state.participants.me
    assert me is not None
    return me


def in_two_threads_at_once(queue: HandleQueue[bytes]) -> set[int]:
    barrier = threading.Barrier(8)

    def first_use() -> int:
        barrier.wait()
        queue.put(b"x")
        return participant_of(queue).slot

    threads = [Waiting(first_use) for _ in range(8)]
    return {thread.result() for thread in threads}


def test_threads_that_use_it_first_in_a_forked_child_take_one_slot(pool_name: str) -> None:
    with HandleQueue.create(pool_name, 16) as queue:
        slots = run_in_fork(in_two_threads_at_once, queue)
        assert len(slots) == 1
        assert slots != {participant_of(queue).slot}
        assert len(drain(queue)) == 8


def two_children_speak(channel: Channel, queue: HandleQueue[bytes]) -> bytes:
    channel.hear("go")
    queue.put(b"%d" % os.getpid(), timeout=PATIENCE)
    return queue.get(timeout=PATIENCE)


def test_forked_siblings_go_on_with_what_their_parent_left(pool_name: str) -> None:
    queue = HandleQueue.create(pool_name, 4)
    with fork(two_children_speak, queue) as first, fork(two_children_speak, queue) as second:
        queue.close()
        first.say("go")
        second.say("go")
        assert {first.result(), second.result()} == {b"%d" % first.pid, b"%d" % second.pid}


# ---- hostile headers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (24 * 8, bytes(8)),
        (24 * 8, b"\xff" * 8),
        (24 * 8, (5).to_bytes(8, "little")),
        (25 * 8, bytes(8)),
        (25 * 8, b"\xff" * 8),
        (25 * 8, (72).to_bytes(8, "little")),
    ],
)
def test_a_damaged_header_is_a_typed_error_and_nothing_is_mapped(
    queue: HandleQueue[bytes], offset: int, data: bytes
) -> None:
    write_into(queue.name, offset, data)
    with pytest.raises(DamagedPoolError, match="header is damaged"):
        HandleQueue.attach(queue.name)


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (0, b"\x00"),
        (0, b"SHMBLKS\x00"),
        (8, (LAYOUT_VERSION + 1).to_bytes(8, "little")),
        (24, (4096).to_bytes(8, "little")),
    ],
)
def test_what_is_no_queue_of_this_version_is_a_typed_error_and_nothing_is_mapped(
    queue: HandleQueue[bytes], offset: int, data: bytes
) -> None:
    write_into(queue.name, offset, data)
    with pytest.raises(IncompatiblePoolError):
        HandleQueue.attach(queue.name)


def write_into(name: str, offset: int, data: bytes) -> None:
    with path_of(name).open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_file_that_is_too_short_is_a_typed_error(queue: HandleQueue[bytes]) -> None:
    path = path_of(queue.name)
    data = path.read_bytes()
    path.unlink()
    for size in (0, 100, 4095, 4096, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises((IncompatiblePoolError, PoolNotFoundError)):
            HandleQueue.attach(queue.name)
    path.unlink()


def test_random_headers_are_a_typed_error_or_work(queue: HandleQueue[bytes], rng: object) -> None:
    import random

    assert isinstance(rng, random.Random)
    path = path_of(queue.name)
    good = path.read_bytes()[:256]
    for _ in range(200):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(256)] = rng.randrange(256)
        with path.open("r+b") as file:
            file.write(data)
        try:
            with HandleQueue.attach(queue.name, spin=0) as other:
                fill(other)
                drain(other)
        except (IncompatiblePoolError, DamagedPoolError, PoolNotFoundError, standard.Full):
            pass
    with path.open("r+b") as file:
        file.write(good)


def test_a_handle_of_a_warm_up_request_crosses_too(pool_name: str) -> None:
    with HandleQueue.create(pool_name, message_type=BlockHandle) as queue:
        fake = BlockHandle(0, 8, 1000, 0, 5)
        queue.put(fake)
        assert queue.get().is_fake
