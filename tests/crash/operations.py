"""Every operation that changes a pool, ready to be killed or interrupted at every line.

A case names how its scene is set up, and gives a function that gets ready in the child and returns
the call that is to be disturbed.

once           it is a single change: whatever happens to the process, it is done or it is not.
               (`reap`, `close` and what runs them are several in a row, each done or not.)
whole          when it is interrupted it is done or it is not, though it may be several changes
               (as `once`, if nothing else is said)
undone         when it is interrupted it gives back what it took
interruptible  no: it is the first thing that a forked child does, which is interrupted elsewhere
with_fork      the lines of fork handlers belong to it
maps           it maps the fields a second time, for as long as the pool is open

Waiting for blocks is in tests/wait_queue, queues are in tests/queue, transfers in
transfer_cases.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import msgspec

from shmblocks import (
    UNBOUNDED,
    BlockHandle,
    BlockPool,
    IncompatibleConfigError,
    KeyExistsError,
    ParticipantId,
    PoolExistsError,
    remove_pool,
)
from shmblocks.testing import Point, abandon, remember, run_and_kill
from tests.crash.scenes import (
    CONFIG,
    LARGE,
    Scene,
    leftover,
    nobody,
    pool_of_two,
    publish,
    reserve,
    survivor,
)

Operation = Callable[[Scene], Callable[[], object]]
Setup = Callable[[], AbstractContextManager[Scene]]


class Case(NamedTuple):
    """One operation in one situation."""

    operation: Operation
    setup: Setup
    once: bool
    whole: bool
    undone: bool
    interruptible: bool
    with_fork: bool
    maps: bool

    @property
    def name(self) -> str:
        return self.operation.__name__


CASES: dict[str, Case] = {}


def case(
    setup: Setup = survivor,
    *,
    once: bool = True,
    whole: bool | None = None,
    undone: bool = False,
    interruptible: bool = True,
    with_fork: bool = False,
    maps: bool = False,
) -> Callable[[Operation], Operation]:
    def register(operation: Operation) -> Operation:
        is_whole = once if whole is None else whole
        entry = Case(operation, setup, once, is_whole, undone, interruptible, with_fork, maps)
        CASES[entry.name] = entry
        return operation

    return register


def joined(scene: Scene) -> BlockPool:
    """The inherited pool, with the child as a participant of its own."""
    scene.pool.available_blocks()
    return scene.pool


# ---- create and attach -----------------------------------------------------------------------


@case(nobody, once=False)
def create(scene: Scene) -> Callable[[], object]:
    return lambda: BlockPool.create(scene.name, CONFIG, prefault="off")


@case(leftover, once=False)
def create_in_place_of_a_leftover(scene: Scene) -> Callable[[], object]:
    return lambda: BlockPool.create(scene.name, CONFIG, prefault="off")


@case(survivor)
def create_under_a_name_that_is_taken(scene: Scene) -> Callable[[], object]:
    def create_in_vain() -> None:
        with contextlib.suppress(PoolExistsError):
            BlockPool.create(scene.name, CONFIG, prefault="off")

    return create_in_vain


@case(survivor)
def attach(scene: Scene) -> Callable[[], object]:
    return lambda: BlockPool.attach(scene.name, prefault="off")


@contextlib.contextmanager
def all_slots_of_the_dead() -> Iterator[Scene]:
    config = msgspec.structs.replace(CONFIG, max_participants=3)
    with survivor(config) as scene:
        other = BlockPool.attach(scene.name, prefault="off")
        reserve(other, 5)
        abandon(other)
        yield scene


@case(all_slots_of_the_dead, once=False)
def attach_in_place_of_the_dead(scene: Scene) -> Callable[[], object]:
    return lambda: BlockPool.attach(scene.name, prefault="off")


@case(nobody, once=False)
def ensure_as_the_first_one(scene: Scene) -> Callable[[], object]:
    return lambda: BlockPool.ensure(scene.name, CONFIG, prefault="off")


@case(leftover, once=False)
def ensure_in_place_of_a_leftover(scene: Scene) -> Callable[[], object]:
    return lambda: BlockPool.ensure(scene.name, CONFIG, prefault="off")


@case(survivor)
def ensure_what_is_there(scene: Scene) -> Callable[[], object]:
    return lambda: BlockPool.ensure(scene.name, CONFIG, prefault="off")


@case(survivor)
def ensure_with_another_config(scene: Scene) -> Callable[[], object]:
    def ensure_in_vain() -> None:
        with contextlib.suppress(IncompatibleConfigError):
            BlockPool.ensure(scene.name, LARGE, prefault="off")

    return ensure_in_vain


@case(survivor, interruptible=False, with_fork=True)
def join_after_fork(scene: Scene) -> Callable[[], object]:
    return scene.pool.available_blocks


# ---- alloc and grow --------------------------------------------------------------------------


@case(undone=True)
def alloc(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    return lambda: pool.alloc(10, req_id="some request")


@case(undone=True)
def alloc_default(scene: Scene) -> Callable[[], object]:
    return joined(scene).alloc_default


@contextlib.contextmanager
def large() -> Iterator[Scene]:
    with survivor(LARGE) as scene:
        yield scene


@case(large, undone=True)
def alloc_blocks(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    return lambda: pool.alloc_blocks(70, 77)


@contextlib.contextmanager
def cursor_near_the_end() -> Iterator[Scene]:
    with survivor(LARGE) as scene:
        hole = reserve(scene.pool, 4 * 20)
        far = reserve(scene.pool, 4 * 54)
        scene.mine.append(remember(scene.pool, far))
        scene.pool.free(hole)
        yield scene


@case(cursor_near_the_end, undone=True)
def alloc_that_wraps(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    return lambda: pool.alloc(4 * 4)


@case(cursor_near_the_end)
def alloc_in_vain(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    return lambda: pool.alloc(4 * 30)


@contextlib.contextmanager
def pool_full_of_the_dead() -> Iterator[Scene]:
    """Reservations and leases of two dead participants fill what the survivor left."""
    with survivor() as scene:
        scene.handle = publish(scene.pool, 4 * 6)
        writer, reader = (BlockPool.attach(scene.name, prefault="off") for _ in range(2))
        reserve(writer, 4 * writer.available_blocks())
        scene.leases.append(reader.open(scene.handle))
        abandon(writer)
        abandon(reader)
        yield scene


@case(pool_full_of_the_dead, once=False, undone=True)
def alloc_that_reclaims(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    return lambda: pool.alloc(4 * 5)


@case()
def grow(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    handle = reserve(pool, 5)
    return lambda: pool.grow(handle, 30)


@case()
def grow_within_its_blocks(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    handle = reserve(pool, 5)
    return lambda: pool.grow(handle, 8)


@case()
def grow_in_vain(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    handle = reserve(pool, 5)
    reserve(pool, 4)
    return lambda: pool.grow(handle, 9)


# ---- publish, leases, free -------------------------------------------------------------------


@case()
def publish_(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    handle = reserve(pool, 30)
    return lambda: pool.publish(handle, readers=2)


@case()
def publish_a_part(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    handle = reserve(pool, 30)
    return lambda: pool.publish(handle, num_tokens=11)


@contextlib.contextmanager
def published() -> Iterator[Scene]:
    """The survivor has published something for two readers."""
    with survivor() as scene:
        scene.handle = publish(scene.pool, 17, readers=2)
        yield scene


@case(published, undone=True, maps=True)
def open_(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    return lambda: scene.leases.append(pool.open(scene.the_handle))


@contextlib.contextmanager
def published_on_a_stream() -> Iterator[Scene]:
    """Blocks of the survivor that a stream has not got to yet."""
    with survivor() as scene:
        scene.handle = reserve(scene.pool, 17)
        scene.pool.state.publish(scene.handle, 17, 2, on_stream=True)
        yield scene


@case(published_on_a_stream, undone=True)
def open_before_it_is_ready(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    return lambda: scene.kept_alive.append(pool.state.open(scene.the_handle))


@contextlib.contextmanager
def landing() -> Iterator[Scene]:
    """The survivor has reserved blocks for others to write into."""
    with survivor() as scene:
        scene.handle = reserve(scene.pool, 17)
        yield scene


@case(landing, undone=True)
def open_for_write(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    return lambda: scene.leases.append(pool.open_for_write(scene.the_handle))


@case(landing)
def release_a_writers_lease(scene: Scene) -> Callable[[], object]:
    lease = joined(scene).open_for_write(scene.the_handle)
    scene.leases.append(lease)
    return lease.release


@case(published)
def release(scene: Scene) -> Callable[[], object]:
    return joined(scene).open(scene.the_handle).release


@case(published)
def release_while_another_reads(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    scene.leases.append(pool.open(scene.the_handle))
    return pool.open(scene.the_handle).release


@case(published)
def release_the_last(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    pool.open(scene.the_handle).release()
    return pool.open(scene.the_handle).release


@case(published)
def release_what_is_draining(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    lease = pool.open(scene.the_handle)
    pool.free(scene.the_handle)
    return lease.release


@case(landing)
def free_a_reservation(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    return lambda: pool.free(scene.the_handle)


@case(published)
def free_what_is_published(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    return lambda: pool.free(scene.the_handle)


@case(published)
def free_what_is_read(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    scene.leases.append(pool.open(scene.the_handle))
    return lambda: pool.free(scene.the_handle)


@case()
def publish_for_any_number_of_readers(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    handle = reserve(pool, 30)
    return lambda: pool.publish(handle, readers=UNBOUNDED)


@contextlib.contextmanager
def published_without_bound() -> Iterator[Scene]:
    """The survivor has published something for any number of readers."""
    with survivor() as scene:
        scene.handle = publish(scene.pool, 17, readers=UNBOUNDED)
        yield scene


@case(published_without_bound, undone=True, maps=True)
def open_one_of_any_number(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    return lambda: scene.leases.append(pool.open(scene.the_handle))


@case(published_without_bound)
def release_one_of_any_number(scene: Scene) -> Callable[[], object]:
    return joined(scene).open(scene.the_handle).release


@case(published_without_bound)
def free_what_any_number_may_read(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    scene.leases.append(pool.open(scene.the_handle))
    return lambda: pool.free(scene.the_handle)


@case(published)
def give_back(scene: Scene) -> Callable[[], object]:
    lease = joined(scene).open(scene.the_handle)
    scene.leases.append(lease)
    return lease.give_back


@case(published)
def give_back_what_is_draining(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    lease = pool.open(scene.the_handle)
    pool.free(scene.the_handle)
    scene.leases.append(lease)
    return lease.give_back


@case(published)
def forgo_one_of_two(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    return lambda: pool.forgo(scene.the_handle)


@case(published)
def forgo_the_last(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    return lambda: pool.forgo(scene.the_handle, 2)


@case(published)
def forgo_while_another_reads(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    scene.leases.append(pool.open(scene.the_handle))
    return lambda: pool.forgo(scene.the_handle)


# ---- readers by name -------------------------------------------------------------------------


def me(scene: Scene) -> ParticipantId:
    who = joined(scene).participant
    assert who is not None
    return who


def the_witness(scene: Scene) -> ParticipantId:
    who = scene.pool.find_participant("witness")
    assert who is not None
    return who


def announced_by_name(scene: Scene) -> BlockHandle:
    """Published by the child, for itself and for the witness."""
    pool = joined(scene)
    return pool.publish(reserve(pool, 10), readers=[me(scene), the_witness(scene)])


@case()
def publish_by_name(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    handle = reserve(pool, 10)
    readers = [the_witness(scene), the_witness(scene)]
    return lambda: pool.publish(handle, readers=readers)


@case(published)
def add_a_reader(scene: Scene) -> Callable[[], object]:
    pool, reader = joined(scene), the_witness(scene)
    return lambda: pool.add_reader(scene.the_handle, reader)


@case(undone=True, maps=True)
def open_by_name(scene: Scene) -> Callable[[], object]:
    pool, handle = joined(scene), announced_by_name(scene)
    return lambda: scene.leases.append(pool.open(handle))


@case()
def release_by_name(scene: Scene) -> Callable[[], object]:
    pool, handle = joined(scene), announced_by_name(scene)
    lease = pool.open(handle)
    scene.leases.append(lease)
    return lease.release


@case()
def give_back_by_name(scene: Scene) -> Callable[[], object]:
    pool, handle = joined(scene), announced_by_name(scene)
    lease = pool.open(handle)
    scene.leases.append(lease)
    return lease.give_back


@case()
def forgo_by_name(scene: Scene) -> Callable[[], object]:
    pool, handle, reader = joined(scene), announced_by_name(scene), the_witness(scene)
    return lambda: pool.forgo(handle, reader=reader)


@case()
def forgo_the_last_by_name(scene: Scene) -> Callable[[], object]:
    pool, handle, reader = joined(scene), announced_by_name(scene), the_witness(scene)
    pool.forgo(handle, reader=me(scene))
    return lambda: pool.forgo(handle, reader=reader)


@case()
def free_what_is_announced(scene: Scene) -> Callable[[], object]:
    pool, handle = joined(scene), announced_by_name(scene)
    return lambda: pool.free(handle)


@case()
def free_what_is_announced_and_read(scene: Scene) -> Callable[[], object]:
    pool, handle = joined(scene), announced_by_name(scene)
    scene.leases.append(pool.open(handle))
    return lambda: pool.free(handle)


@contextlib.contextmanager
def announced_to_the_dead() -> Iterator[Scene]:
    """The survivor has announced two publications to one who is dead."""
    with survivor() as scene:
        reader = BlockPool.attach(scene.name, prefault="off")
        assert reader.participant is not None
        for _ in range(2):
            scene.pool.publish(reserve(scene.pool, 8), readers=[reader.participant])
        abandon(reader)
        yield scene


@case(announced_to_the_dead, once=False)
def reap_what_is_announced_to_the_dead(scene: Scene) -> Callable[[], object]:
    return joined(scene).reap


# ---- reserve, put and take -------------------------------------------------------------------


@case(undone=True)
def reserve_(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    return lambda: scene.reservations.append(pool.reserve(10, req_id="some request"))


@case(once=False, whole=True, undone=True)
def reserve_and_leave_the_block(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)

    def run() -> None:
        with pool.reserve(10):
            pass

    return run


@case(once=False, whole=True, undone=True)
def reserve_and_leave_the_block_by_an_exception(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)

    def run() -> None:
        with contextlib.suppress(LookupError), pool.reserve(10):
            raise LookupError

    return run


@case(once=False, whole=True)
def reserve_and_publish(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)

    def run() -> None:
        with pool.reserve(10) as reservation:
            reservation.publish(readers=2)

    return run


@case()
def grow_in_a_block(scene: Scene) -> Callable[[], object]:
    reservation = joined(scene).reserve(10)
    scene.reservations.append(reservation)
    return lambda: reservation.grow(30)


@case()
def publish_in_a_block(scene: Scene) -> Callable[[], object]:
    reservation = joined(scene).reserve(10)
    scene.reservations.append(reservation)
    return lambda: reservation.publish(readers=2, num_tokens=7)


@contextlib.contextmanager
def with_torch() -> Iterator[Scene]:
    """As `published`. Torch is imported here: children that had to would take a second each."""
    import torch

    torch.set_num_threads(1)
    with published() as scene:
        yield scene


@case(with_torch, once=False, whole=True)
def put(scene: Scene) -> Callable[[], object]:
    import torch

    pool = joined(scene)
    tensors = {"x": torch.ones(9, 2, dtype=torch.int32), "ids": torch.ones(9, dtype=torch.int32)}
    return lambda: pool.put(tensors, readers=2, req_id="some request")


@case(with_torch, once=False, whole=True, maps=True)
def take(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    return lambda: pool.take(scene.the_handle)


@case(with_torch, maps=True)
def make_private(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    lease = pool.open(scene.the_handle)
    scene.leases.append(lease)
    return lambda: scene.kept_alive.append(lease.private("x"))


@case(with_torch, once=False, whole=True, maps=True)
def take_as_the_last_one(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    pool.open(scene.the_handle).release()
    return lambda: pool.take(scene.the_handle)


# ---- the content cache -----------------------------------------------------------------------

KEY = b"a key of 16 byte"
OTHER_KEY = b"one more of them"


@contextlib.contextmanager
def entered() -> Iterator[Scene]:
    """The survivor has published something under a key."""
    with survivor() as scene:
        scene.handle = scene.pool.publish(reserve(scene.pool, 17), readers=UNBOUNDED, key=KEY)
        yield scene


@case()
def publish_under_a_key(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    handle = reserve(pool, 17)
    pool.claim(KEY)
    return lambda: pool.publish(handle, readers=UNBOUNDED, key=KEY, hold=0.001)


@case(entered)
def publish_under_a_key_that_has_an_entry(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    handle = reserve(pool, 17)

    def run() -> None:
        with contextlib.suppress(KeyExistsError):
            pool.publish(handle, readers=UNBOUNDED, key=KEY)

    return run


# (Each lease is a commit of its own: killed, it may hold the first and not the second.)
@case(entered, once=False, whole=True, undone=True, maps=True)
def get_two_leases(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    return lambda: scene.leases.extend(pool.get(KEY, leases=2) or [])


@case(entered)
def get_in_vain(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    return lambda: pool.get(OTHER_KEY)


@case(entered)
def give_a_ticket(scene: Scene) -> Callable[[], object]:
    (lease,) = joined(scene).get(KEY) or []
    scene.leases.append(lease)
    return lease.ticket


# Interrupted when it is adopted, it is given back: then it is neither the giver's nor ours.
@case(entered, whole=False)
def adopt(scene: Scene) -> Callable[[], object]:
    (lease,) = scene.pool.get(KEY) or []
    ticket = lease.ticket()
    pool = joined(scene)
    return lambda: scene.leases.append(pool.adopt(ticket))


@case(entered)
def revoke(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    (lease,) = pool.get(KEY) or []
    ticket = lease.ticket()
    return lambda: pool.revoke(ticket)


@case(entered)
def touch(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    return lambda: pool.touch(KEY, hold=0.001)


@case(entered)
def drop(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    return lambda: pool.drop(KEY)


@case(entered, once=False)
def drop_all(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    pool.publish(reserve(pool, 5), readers=UNBOUNDED, key=OTHER_KEY)
    return pool.drop_all


@case(entered)
def bump_epoch(scene: Scene) -> Callable[[], object]:
    return joined(scene).bump_epoch


@case()
def claim(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    return lambda: pool.claim(KEY)


@case()
def end_claim(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    pool.claim(KEY)
    return lambda: pool.end_claim(KEY)


@contextlib.contextmanager
def claimed_by_the_dead() -> Iterator[Scene]:
    with survivor() as scene:
        other = BlockPool.attach(scene.name, prefault="off")
        other.claim(KEY)
        abandon(other)
        yield scene


@case(claimed_by_the_dead)
def claim_after_the_dead(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    return lambda: pool.claim(KEY)


# ---- peers of node servers -------------------------------------------------------------------


@case()
def connect_a_peer(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    return lambda: pool.peer_state.connect("10.0.0.1:7400")


@case()
def disconnect_two_peers(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    rows = [pool.peer_state.connect(f"10.0.0.{number}:7400") for number in (1, 2)]
    return lambda: [pool.peer_state.disconnect(row) for row in rows]


@case()
def count_a_fetch(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    row = pool.peer_state.connect("10.0.0.1:7400")
    return lambda: (pool.peer_state.served(row, 10), pool.peer_state.fetched(10))


@contextlib.contextmanager
def full_of_entries() -> Iterator[Scene]:
    with survivor() as scene:
        pool = scene.pool
        for number in range(pool.available_blocks() // 2):
            pool.publish(reserve(pool, 4 * 2), readers=UNBOUNDED, key=b"%016d" % number)
        yield scene


@case(full_of_entries, once=False)
def alloc_that_evicts(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    return lambda: pool.alloc(4 * 3)


# ---- channels --------------------------------------------------------------------------------


@contextlib.contextmanager
def announced() -> Iterator[Scene]:
    """The survivor has announced two allocations."""
    with survivor() as scene:
        channel = scene.pool.channel("embeddings", capacity=2)
        for number in range(2):
            channel.send(reserve(scene.pool, 5), message=b"%d" % number)
        yield scene


@case()
def make_a_channel(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    return lambda: pool.channel("embeddings", capacity=2)


@case()
def send(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    channel = pool.channel("embeddings", capacity=2)
    handle = reserve(pool, 17)
    return lambda: channel.send(handle, readers=2, message=b"hello")


@case(announced, undone=True, maps=True)
def receive(scene: Scene) -> Callable[[], object]:
    channel = joined(scene).channel("embeddings")
    return lambda: scene.leases.append(channel.receive())


@case(announced, once=False, whole=True, undone=True, maps=True)
def receive_many(scene: Scene) -> Callable[[], object]:
    channel = joined(scene).channel("embeddings")
    return lambda: scene.leases.extend(channel.receive_many(2))


# ---- reap and recovery -----------------------------------------------------------------------


@case(pool_full_of_the_dead, once=False)
def reap(scene: Scene) -> Callable[[], object]:
    return joined(scene).reap


@case(pool_full_of_the_dead, once=False)
def reap_if_due(scene: Scene) -> Callable[[], object]:
    return joined(scene).reap_if_due


@case()
def reap_if_due_when_it_is_not(scene: Scene) -> Callable[[], object]:
    return joined(scene).reap_if_due


@case()
def find_participant(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    return lambda: pool.find_participant("witness")


@contextlib.contextmanager
def unclaimed() -> Iterator[Scene]:
    """Published blocks whose time is over from the start; the survivor has published nothing."""
    config = msgspec.structs.replace(CONFIG, unclaimed_timeout=1e-9)
    with pool_of_two(config) as scene:
        scene.mine.append(remember(scene.pool, reserve(scene.pool, 6)))
        for num_tokens in (7, 20):
            publish(scene.pool, num_tokens)
        yield scene


@case(unclaimed, once=False)
def reap_what_nobody_claimed(scene: Scene) -> Callable[[], object]:
    return joined(scene).reap


def _dies_half_done(scene: Scene, store: int) -> None:
    """A child dies in its allocation, after the commit and before its `store`-th store."""
    lines: list[int] = []

    def allocate() -> None:
        joined(scene).alloc(4 * 10, req_id="half done")

    def is_it(_: Point) -> bool:
        if scene.pool.state.segment.words[scene.pool.state.journal.head]:
            lines.append(1)
        return len(lines) == store

    run_and_kill(allocate, is_it)


def half_done(store: int) -> Setup:
    """A journal that was committed and not completed, left by a dead child."""

    @contextlib.contextmanager
    def setup() -> Iterator[Scene]:
        with survivor() as scene:
            _dies_half_done(scene, store)
            yield scene

    return setup


@case(half_done(1), interruptible=False)
def recovery_of_a_change_that_was_only_committed(scene: Scene) -> Callable[[], object]:
    return scene.pool.available_blocks


@case(half_done(4), interruptible=False)
def recovery_of_a_change_that_was_made_in_part(scene: Scene) -> Callable[[], object]:
    return scene.pool.available_blocks


@case(half_done(3))
def recovery_by_one_that_goes_on(scene: Scene) -> Callable[[], object]:
    return scene.pool.available_blocks


# ---- leaving ---------------------------------------------------------------------------------


@case(published, once=False)
def close(scene: Scene) -> Callable[[], object]:
    pool = joined(scene)
    reserve(pool, 7)
    pool.publish(reserve(pool, 7))
    scene.leases.append(pool.open(scene.the_handle))
    return pool.close


@case(nobody, once=False)
def close_as_the_last_one(scene: Scene) -> Callable[[], object]:
    pool = BlockPool.create(scene.name, CONFIG, prefault="off")
    reserve(pool, 9)
    publish(pool, 9)
    return pool.close


@case(leftover, once=False)
def remove_a_leftover(scene: Scene) -> Callable[[], object]:
    return lambda: remove_pool(scene.name)
