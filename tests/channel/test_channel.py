"""A channel: order, bounds, waiting, fan-out, and what happens to messages of the dead."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import threading
import time

import pytest

from shmblocks import (
    BlockHandle,
    BlockPool,
    InvalidStateError,
    PoolClosedError,
    PoolTimeoutError,
    StaleHandleError,
    State,
)
from shmblocks.channel import Channel
from shmblocks.testing import abandon
from tests.support.children import Channel as Pipe
from tests.support.children import fork, wait_until

# Seconds in which a thread that is woken has ended, on a busy machine, too.
SOON = 10.0


def take(pool: BlockPool, num_tokens: int = 4) -> BlockHandle:
    handle = pool.alloc(num_tokens)
    assert handle is not None
    return handle


def send(channel: Channel, message: bytes) -> BlockHandle:
    pool = channel.pool
    assert isinstance(pool, BlockPool)
    return channel.send(take(pool), message=message)


def receive(channel: Channel, timeout: float | None = 0.0) -> bytes:
    with channel.receive(timeout=timeout) as lease:
        return lease.message


# ---- messages ------------------------------------------------------------------------------------


def test_messages_come_in_the_order_in_which_they_were_sent(pool: BlockPool) -> None:
    channel = pool.channel("images")
    for number in range(20):
        send(channel, b"%d" % number)
    assert len(channel) == 20
    assert [receive(channel) for _ in range(20)] == [b"%d" % number for number in range(20)]


def test_a_ring_goes_round(pool: BlockPool) -> None:
    channel = pool.channel("images", capacity=3)
    for number in range(100):
        send(channel, b"%d" % number)
        assert receive(channel) == b"%d" % number


def test_a_reservation_that_was_sent_is_published_and_over(pool: BlockPool) -> None:
    channel = pool.channel("images")
    with pool.reserve(6) as reservation:
        handle = channel.send(reservation, num_tokens=5, message=b"five")
        assert reservation.is_over
    assert handle.num_tokens == 5
    with channel.receive(timeout=0) as lease:
        assert lease.handle == handle
        assert lease.message == b"five"
    with pytest.raises(StaleHandleError):
        pool.open(handle)


def test_published_blocks_can_be_announced(pool: BlockPool) -> None:
    channel = pool.channel("images")
    handle = pool.publish(take(pool), readers=2)
    channel.send(handle)
    with pool.open(handle), channel.receive(timeout=0) as lease:
        assert lease.handle == handle


def test_what_was_freed_cannot_be_sent(pool: BlockPool) -> None:
    handle = take(pool)
    pool.free(handle)
    with pytest.raises(StaleHandleError):
        pool.channel("images").send(handle)


def test_blocks_that_a_writer_has_open_cannot_be_sent(pool: BlockPool) -> None:
    handle = take(pool)
    with pool.open_for_write(handle), pytest.raises(InvalidStateError, match="writer's lease"):
        pool.channel("images").send(handle)


def test_a_message_whose_blocks_were_freed_is_passed_over(pool: BlockPool) -> None:
    channel = pool.channel("images")
    first = send(channel, b"first")
    send(channel, b"second")
    pool.free(first)
    assert receive(channel) == b"second"
    assert channel.receive_nowait() is None


def test_many_are_received_at_once_oldest_first(pool: BlockPool) -> None:
    channel = pool.channel("images")
    for number in range(5):
        send(channel, b"%d" % number)
    leases = channel.receive_many(3, timeout=0)
    assert [lease.message for lease in leases] == [b"0", b"1", b"2"]
    for lease in leases:
        lease.release()
    leases = channel.receive_many(9, timeout=0)
    assert [lease.message for lease in leases] == [b"3", b"4"]
    for lease in leases:
        lease.release()


def test_one_send_goes_to_all_channels(pool: BlockPool) -> None:
    channels = [pool.channel(name) for name in ("rank-0", "rank-1", "rank-2")]
    with pool.reserve(4) as reservation:
        handle = pool.send(channels, reservation, message=b"all")
    assert [receive(channel) for channel in channels] == [b"all"] * 3
    with pytest.raises(StaleHandleError):  # the last of three readers freed it
        pool.open(handle)


def test_when_one_of_several_channels_is_full_nothing_is_sent(pool: BlockPool) -> None:
    one, two = pool.channel("one", capacity=1), pool.channel("two", capacity=1)
    send(two, b"there")
    with pool.reserve(4) as reservation:
        with pytest.raises(PoolTimeoutError, match=r"channel two .* full"):
            pool.send([one, two], reservation, timeout=0.0)
        assert not reservation.is_over
        assert len(one) == 0
    assert receive(two) == b"there"


def test_a_message_of_sixty_four_bytes_fits_and_a_longer_one_is_refused(pool: BlockPool) -> None:
    channel = pool.channel("images")
    send(channel, b"x" * 64)
    assert receive(channel) == b"x" * 64
    with pool.reserve(1) as reservation:
        with pytest.raises(ValueError, match="message: expected at most 64 bytes, got 65"):
            channel.send(reservation, message=b"x" * 65)
        with pytest.raises(TypeError, match="message: expected bytes, got str"):
            channel.send(reservation, message="text")  # type: ignore[arg-type]


# ---- channels ------------------------------------------------------------------------------------


def test_a_name_leads_to_the_same_channel_in_every_process(pool: BlockPool) -> None:
    send(pool.channel("images"), b"hello")

    def receive_there(pipe: Pipe, name: str) -> None:
        with BlockPool.attach(name, prefault="off") as attached:
            pipe.say(receive(attached.channel("images", capacity=9)))

    with fork(receive_there, pool.name) as child:
        child.hear(b"hello")


def test_a_pool_says_when_it_has_no_room_for_a_channel(pool: BlockPool) -> None:
    with pytest.raises(ValueError, match=r"channel_slots=\.\.\."):
        pool.channel("large", capacity=5000)
    for number in range(4):
        pool.channel(f"channel {number}", capacity=2)
    with pytest.raises(ValueError, match=r"has 4 channels .* PoolConfig\(channels=\.\.\.\)"):
        pool.channel("one more", capacity=2)
    assert pool.channel("channel 3").index == 3


def test_a_channel_refuses_to_be_pickled(pool: BlockPool) -> None:
    with pytest.raises(TypeError, match="send the pool"):
        pickle.dumps(pool.channel("images"))


@pytest.mark.parametrize("name", ["", "x" * 64])
def test_a_name_that_does_not_fit_is_refused(pool: BlockPool, name: str) -> None:
    with pytest.raises(ValueError, match="name: expected 1 to 63 bytes"):
        pool.channel(name)


# ---- waiting -------------------------------------------------------------------------------------


def test_a_receive_that_waits_in_vain_times_out_and_says_of_which_channel(pool: BlockPool) -> None:
    began = time.monotonic()
    with pytest.raises(PoolTimeoutError, match=f"channel images of pool {pool.name}: no message"):
        pool.channel("images").receive(timeout=0.05)
    assert time.monotonic() - began >= 0.05


def test_a_receiver_asleep_is_woken_by_a_send_of_another_process(pool: BlockPool) -> None:
    def send_when_told(pipe: Pipe, name: str) -> None:
        with BlockPool.attach(name, prefault="off") as attached:
            channel = attached.channel("images")
            pipe.hear("send")
            send(channel, b"late")

    with fork(send_when_told, pool.name) as child:
        channel = pool.channel("images", spin=0)
        child.say("send")
        assert receive(channel, timeout=30) == b"late"


def test_a_sender_waits_for_capacity(pool: BlockPool) -> None:
    channel = pool.channel("images", capacity=1, spin=0)
    send(channel, b"first")
    thread = threading.Thread(target=send, args=(channel, b"second"))
    thread.start()
    assert receive(channel, timeout=30) == b"first"
    assert receive(channel, timeout=30) == b"second"
    thread.join()


def test_closing_the_pool_ends_the_waits_of_this_process(pool: BlockPool) -> None:
    channel = pool.channel("images", spin=0)
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            channel.receive(timeout=None)
        except PoolClosedError as error:
            errors.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    time.sleep(0.05)  # asleep, more often than not; either way it must end
    pool.close()
    thread.join(SOON)  # without a time limit of its own, only the close can end it
    assert len(errors) == 1


def test_closing_the_pool_ends_a_send_that_waits_for_capacity(pool: BlockPool) -> None:
    channel = pool.channel("images", capacity=1, spin=0)
    send(channel, b"first")
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            send(channel, b"second")
        except PoolClosedError as error:
            errors.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    time.sleep(0.05)
    pool.close()
    thread.join(SOON)
    assert len(errors) == 1


def test_coroutines_send_and_receive(pool: BlockPool) -> None:
    channel = pool.channel("images", capacity=1)

    async def sender() -> None:
        for number in range(10):
            async with await pool.reserve_async(4) as reservation:
                await channel.send_async(reservation, message=b"%d" % number, timeout=30)

    async def receiver() -> list[bytes]:
        found = []
        for _ in range(10):
            with await channel.receive_async(timeout=30) as lease:
                found.append(lease.message)
        return found

    async def both() -> list[bytes]:
        found, _ = await asyncio.gather(receiver(), sender())
        return found

    assert asyncio.run(both()) == [b"%d" % number for number in range(10)]


def test_a_receive_that_is_cancelled_takes_no_message(pool: BlockPool) -> None:
    channel = pool.channel("images")

    async def cancel() -> None:
        waiting = asyncio.ensure_future(channel.receive_async(timeout=30))
        await asyncio.sleep(0)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting

    asyncio.run(cancel())
    send(channel, b"for another")
    assert receive(channel) == b"for another"


def test_an_async_receive_that_waits_in_vain_times_out(pool: BlockPool) -> None:
    with pytest.raises(PoolTimeoutError, match="no message"):
        asyncio.run(pool.channel("images").receive_async(timeout=0.02))


# ---- deaths --------------------------------------------------------------------------------------


def taken_by_a_dead_receiver(pool: BlockPool, channel: Channel, count: int = 1) -> None:
    other = BlockPool.attach(pool.name, prefault="off")
    leases = other.channel(channel.name).receive_many(count, timeout=0)
    assert len(leases) == count
    abandon(other)
    pool.reap()


def test_the_lease_of_a_dead_receiver_comes_back_and_its_message_is_gone(pool: BlockPool) -> None:
    channel = pool.channel("images")
    send(channel, b"taken")
    taken_by_a_dead_receiver(pool, channel)
    assert channel.receive_nowait() is None
    assert pool.available_blocks() == 32


def test_a_channel_that_redelivers_gives_it_to_the_next_receiver_at_the_front(
    pool: BlockPool,
) -> None:
    channel = pool.channel("images", redeliver=True)
    for message in (b"a", b"b", b"c", b"d"):
        send(channel, message)
    taken_by_a_dead_receiver(pool, channel, count=2)
    assert [receive(channel) for _ in range(4)] == [b"a", b"b", b"c", b"d"]
    assert pool.available_blocks() == 32


def test_a_redelivered_message_finds_a_slot_also_in_a_full_channel(pool: BlockPool) -> None:
    channel = pool.channel("images", capacity=2, redeliver=True)
    send(channel, b"a")
    send(channel, b"b")
    other = BlockPool.attach(pool.name, prefault="off")
    kept = other.channel("images").receive_many(2, timeout=0)
    send(channel, b"c")
    send(channel, b"d")
    abandon(other)
    assert len(kept) == 2
    pool.reap()
    assert [receive(channel) for _ in range(4)] == [b"a", b"b", b"c", b"d"]


def test_a_receiver_asleep_gets_what_a_dead_one_had(pool: BlockPool) -> None:
    channel = pool.channel("images", redeliver=True, spin=0)
    send(channel, b"again")
    other = BlockPool.attach(pool.name, prefault="off")
    kept = other.channel("images").receive_many(1, timeout=0)
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(receive(channel, timeout=30)))
    thread.start()
    abandon(other)
    assert len(kept) == 1
    wait_until(lambda: pool.reap().leases == 1 or bool(found), "the dead receiver is reaped")
    thread.join(30)
    assert found == [b"again"]


def test_a_sender_that_dies_in_a_full_channel_leaves_nothing_published(pool: BlockPool) -> None:
    def fill(pipe: Pipe, name: str) -> None:
        attached = BlockPool.attach(name, prefault="off")
        channel = attached.channel("images", capacity=1, spin=0)
        send(channel, b"sent")
        pipe.say("full")
        send(channel, b"never")

    with fork(fill, pool.name) as child:
        child.hear("full")
        wait_until(
            lambda: any(info.state is State.RESERVED for info in pool.allocations()),
            "the sender has reserved",
        )
        child.kill()
    pool.reap()
    channel = pool.channel("images")
    assert receive(channel) == b"sent"
    assert channel.receive_nowait() is None
    assert pool.available_blocks() == 32


def test_processes_share_the_messages_and_each_goes_to_one(pool: BlockPool) -> None:
    def receive_all(pipe: Pipe, name: str) -> None:
        with BlockPool.attach(name, prefault="off") as attached:
            channel = attached.channel("images", capacity=8)
            found = []
            while (message := receive(channel, timeout=30)) != b"end":
                found.append(int(message))
            pipe.say(found)

    with fork(receive_all, pool.name) as one, fork(receive_all, pool.name) as two:
        channel = pool.channel("images", capacity=8)
        for number in range(200):
            with pool.reserve(4, timeout=30) as reservation:
                channel.send(reservation, message=b"%d" % number, timeout=30)
        for _ in range(2):
            with pool.reserve(4, timeout=30) as reservation:
                channel.send(reservation, message=b"end", timeout=30)
        first, second = one.receive(), two.receive()
    assert isinstance(first, list)
    assert isinstance(second, list)
    assert first == sorted(first)
    assert second == sorted(second)
    assert sorted(first + second) == list(range(200))
