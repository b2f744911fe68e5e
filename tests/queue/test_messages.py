"""What goes through a queue: bytes and Structs, whole, in order, or else a typed error."""

from __future__ import annotations

import queue as standard
import random
from collections.abc import Iterator

import msgspec
import pytest

from shmblocks import BlockHandle, HandleQueue, MalformedMessageError
from tests.queue.kit import CAPACITY, MESSAGE_BYTES, Numbered, Waiting, fill, positions

HANDLE = BlockHandle(8, 16, 2000, 77, 2**63 + 5)


@pytest.fixture
def handles(pool_name: str) -> Iterator[HandleQueue[BlockHandle]]:
    with HandleQueue.create(pool_name, 8, message_type=BlockHandle) as made:
        yield made


@pytest.fixture
def raw(handles: HandleQueue[BlockHandle]) -> Iterator[HandleQueue[bytes]]:
    """The same queue, for bytes: the way in for what is no handle."""
    with HandleQueue.attach(handles.name) as attached:
        yield attached


# ---- bytes -----------------------------------------------------------------------------------


def test_bytes_arrive_as_they_were(queue: HandleQueue[bytes], rng: random.Random) -> None:
    sizes = [0, 1, 7, 8, 9, MESSAGE_BYTES - 1, MESSAGE_BYTES]
    for _ in range(20):
        for size in sizes:
            message = rng.randbytes(size)
            queue.put(message)
            assert queue.get() == message


def test_what_is_left_of_a_longer_message_is_not_seen(queue: HandleQueue[bytes]) -> None:
    for _ in range(CAPACITY):
        queue.put(b"x" * MESSAGE_BYTES)
        queue.get()
    queue.put(b"a\x00")
    assert queue.get() == b"a\x00"


def test_a_message_that_is_too_long_is_refused_and_nothing_changed(
    queue: HandleQueue[bytes],
) -> None:
    with pytest.raises(ValueError, match=r"at most 64 bytes, got 65.*message_bytes"):
        queue.put(b"x" * (MESSAGE_BYTES + 1))
    assert queue.empty()


def test_what_is_not_bytes_is_refused(queue: HandleQueue[bytes]) -> None:
    for wrong in ("text", bytearray(b"x"), memoryview(b"x"), 7, None, [b"x"], HANDLE):
        with pytest.raises(TypeError, match="expects bytes, got"):
            queue.put(wrong)  # type: ignore[arg-type]
    assert queue.empty()


@pytest.mark.parametrize(
    ("argument", "wrong"),
    [("capacity", 0), ("capacity", -1), ("capacity", 2**24 + 1), ("message_bytes", 0)],
)
def test_sizes_out_of_range_are_refused(pool_name: str, argument: str, wrong: int) -> None:
    with pytest.raises(ValueError, match=f"{argument}: expected 1 to"):
        HandleQueue.create(pool_name, **{argument: wrong})  # type: ignore[call-overload]


@pytest.mark.parametrize("argument", ["capacity", "message_bytes"])
def test_sizes_that_are_no_whole_numbers_are_refused(pool_name: str, argument: str) -> None:
    with pytest.raises(TypeError):
        HandleQueue.create(pool_name, **{argument: 2.5})  # type: ignore[call-overload]


def test_a_queue_of_one_message_of_one_byte_works(pool_name: str) -> None:
    with HandleQueue.create(pool_name, 1, message_bytes=1) as queue:
        for number in range(5):
            queue.put(bytes([number]))
            with pytest.raises(standard.Full):
                queue.put_nowait(b"x")
            assert queue.get() == bytes([number])


# ---- structs ---------------------------------------------------------------------------------


def test_a_struct_arrives_as_it_was(handles: HandleQueue[BlockHandle]) -> None:
    handles.put(HANDLE)
    got = handles.get()
    assert got == HANDLE
    assert isinstance(got, BlockHandle)


def test_what_a_typed_queue_carries_is_what_a_handle_encodes_to(
    handles: HandleQueue[BlockHandle], raw: HandleQueue[bytes]
) -> None:
    handles.put(HANDLE)
    assert BlockHandle.decode(raw.get()) == HANDLE
    raw.put(HANDLE.encode())
    assert handles.get() == HANDLE


MALFORMED = [
    b"",
    b"\xc1",
    b"not a handle",
    b"\x95\x01",
    HANDLE.encode()[:-1],
    HANDLE.encode() + b"\x00",
    b"\x95\xff\x01\x01\x01\x01",
    msgspec.msgpack.encode("text"),
    msgspec.msgpack.encode({"start_block": 1}),
]


@pytest.mark.parametrize("malformed", MALFORMED)
def test_a_malformed_message_is_a_typed_error_and_the_next_arrives(
    handles: HandleQueue[BlockHandle], raw: HandleQueue[bytes], malformed: bytes
) -> None:
    raw.put(malformed)
    handles.put(HANDLE)
    with pytest.raises(MalformedMessageError, match=r"expected .*BlockHandle.*got"):
        handles.get()
    assert handles.get() == HANDLE


def test_random_bytes_are_a_message_or_a_typed_error(
    handles: HandleQueue[BlockHandle], raw: HandleQueue[bytes], rng: random.Random
) -> None:
    good = HANDLE.encode()
    for _ in range(3000):
        data = bytearray(good if rng.random() < 0.7 else rng.randbytes(rng.randrange(40)))
        for _ in range(rng.randrange(3)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        raw.put(bytes(data))
        try:
            assert isinstance(handles.get_nowait(), BlockHandle)
        except MalformedMessageError:
            pass
    assert handles.empty()


# ---- many at once ----------------------------------------------------------------------------


def test_get_many_takes_what_is_there_up_to_its_limit(queue: HandleQueue[bytes]) -> None:
    fill(queue)
    assert queue.get_many(3) == [b"0", b"1", b"2"]
    assert queue.get_many(100) == [b"3"]
    with pytest.raises(standard.Empty):
        queue.get_many(3, block=False)
    with pytest.raises(standard.Empty):
        queue.get_many(3, timeout=0.001)


def test_get_many_waits_for_the_first_and_not_for_more(queue: HandleQueue[bytes]) -> None:
    with Waiting(lambda: queue.get_many(CAPACITY)) as getter:
        getter.until_asleep()
        queue.put(b"x")
        assert getter.result() == [b"x"]


def test_get_many_wakes_a_putter_for_each_message(no_net: None, queue: HandleQueue[bytes]) -> None:
    fill(queue)
    putters = [Waiting(lambda: queue.put(b"x")).until_asleep() for _ in range(3)]
    assert len(queue.get_many(3)) == 3
    for putter in putters:
        putter.result()
    assert queue.full()


@pytest.mark.parametrize("limit", [0, -1, -(2**70)])
def test_get_many_of_less_than_one_is_refused(queue: HandleQueue[bytes], limit: int) -> None:
    """Found: a negative limit moved the head backwards, and old messages came again."""
    queue.put(b"x")
    queue.get()
    queue.put(b"y")
    before = positions(queue)
    with pytest.raises(ValueError, match=r"limit: expected .*1"):
        queue.get_many(limit, timeout=0)
    assert positions(queue) == before
    assert queue.get() == b"y"


def test_a_malformed_message_among_many_takes_no_other_with_it(
    handles: HandleQueue[BlockHandle], raw: HandleQueue[bytes]
) -> None:
    """Found: all messages of a batch were lost with a malformed one."""
    good = [msgspec.structs.replace(HANDLE, start_block=number) for number in range(4)]
    for message in (good[0], b"malformed", good[1], b"malformed too", b"and this", good[2]):
        raw.put(message if isinstance(message, bytes) else message.encode())
    got: list[BlockHandle] = []
    errors = []
    for _ in range(6):
        try:
            got += handles.get_many(100, block=False)
        except MalformedMessageError as error:
            errors.append(str(error))
        except standard.Empty:
            break
    assert got == good[:3]
    assert len(errors) == 3
    handles.put(good[3])
    assert handles.get() == good[3]


def test_what_is_not_of_the_type_of_the_queue_is_refused_by_put(
    handles: HandleQueue[BlockHandle],
) -> None:
    """Found: it was the error of whoever got it."""
    for wrong in (HANDLE.encode(), Numbered(1, 2), None):
        with pytest.raises(TypeError, match="expects BlockHandle, got"):
            handles.put(wrong)  # type: ignore[arg-type]
    assert handles.empty()


def test_messages_of_another_type_of_struct_arrive(pool_name: str) -> None:
    with HandleQueue.create(pool_name, 4, message_type=Numbered) as queue:
        queue.put(Numbered(1, 2))
        assert queue.get() == Numbered(1, 2)
