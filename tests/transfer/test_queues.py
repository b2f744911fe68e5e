"""Bytes over queues: never blocked by a full one, in order, and clear about a broken one."""

from __future__ import annotations

import multiprocessing
import multiprocessing.queues
import queue
import sys
import time
from collections.abc import Iterator

import pytest

from shmblocks.transfer import QueueLike
from shmblocks.transfer.queues import Incoming, Outgoing, QueueBrokenError
from tests.support.children import run_program
from tests.transfer.kinds import PlainQueue


@pytest.fixture
def pipe() -> Iterator[multiprocessing.queues.SimpleQueue[bytes]]:
    made: multiprocessing.queues.SimpleQueue[bytes] = multiprocessing.SimpleQueue()
    yield made
    made.close()


def drain(rx: QueueLike) -> list[object]:
    incoming = Incoming(rx)
    items = []
    while (item := incoming.receive(0.0)) is not None:
        items.append(item)
    return items


def test_what_a_full_queue_does_not_take_waits_in_the_outbox_in_order() -> None:
    tx: queue.Queue[bytes] = queue.Queue(2)
    outgoing = Outgoing(tx)
    sent = [bytes([number]) for number in range(7)]
    for data in sent:
        outgoing.send(data)
    assert len(outgoing) == 5
    got: list[object] = []
    while len(got) < 7:
        got += drain(tx)
        outgoing.flush()
    assert got == sent
    assert len(outgoing) == 0


def test_a_full_pipe_does_not_block_the_sender(
    pipe: multiprocessing.queues.SimpleQueue[bytes],
) -> None:
    outgoing = Outgoing(pipe)
    sent = [number.to_bytes(2, "little") * 60 for number in range(2000)]
    for data in sent:
        outgoing.send(data)  # some 250 kB, and a pipe holds 64 KiB
    assert len(outgoing) > 0
    got: list[object] = []
    while len(got) < len(sent):
        got += drain(pipe)
        outgoing.flush()
    assert got == sent


def test_an_empty_queue_gives_none_at_once_and_after_a_timeout() -> None:
    for rx in (queue.Queue[bytes](), queue.SimpleQueue[bytes](), PlainQueue()):
        incoming = Incoming(rx)
        assert incoming.receive(0.0) is None
        start = time.monotonic()
        assert incoming.receive(0.02) is None
        assert time.monotonic() - start >= 0.019
        rx.put(b"here")
        assert incoming.receive(5.0) == b"here"


def test_a_pipe_is_waited_for_not_polled(pipe: multiprocessing.queues.SimpleQueue[bytes]) -> None:
    incoming = Incoming(pipe)
    start = time.monotonic()
    assert incoming.receive(0.02) is None
    assert time.monotonic() - start >= 0.019
    pipe.put(b"here")
    assert incoming.receive(0.0) == b"here"


def test_a_closed_queue_is_a_broken_queue() -> None:
    closed: multiprocessing.queues.Queue[bytes] = multiprocessing.Queue()
    incoming, outgoing = Incoming(closed), Outgoing(closed)
    closed.close()
    closed.join_thread()
    with pytest.raises(QueueBrokenError, match="reading from the queue failed"):
        incoming.receive(0.0)
    with pytest.raises(QueueBrokenError, match="putting into the queue failed"):
        outgoing.send(b"lost")
    assert len(outgoing) == 0


def test_a_closed_pipe_is_a_broken_queue() -> None:
    closed: multiprocessing.queues.SimpleQueue[bytes] = multiprocessing.SimpleQueue()
    incoming = Incoming(closed)
    closed.close()
    with pytest.raises(QueueBrokenError, match="reading from the queue failed"):
        incoming.receive(0.01)


def test_a_closed_handle_queue_is_a_broken_queue(pool_name: str) -> None:
    from shmblocks.queue import HandleQueue

    closed = HandleQueue.create(pool_name, capacity=1)
    incoming, outgoing = Incoming(closed), Outgoing(closed)
    assert outgoing.limit == closed.message_bytes
    outgoing.send(b"taken")
    outgoing.send(b"kept")
    assert len(outgoing) == 1
    assert incoming.receive(0.0) == b"taken"
    closed.close()
    with pytest.raises(QueueBrokenError, match="closed"):
        incoming.receive(0.0)
    with pytest.raises(QueueBrokenError, match="closed"):
        outgoing.flush()


def test_what_is_no_queue_is_a_type_error_that_says_what_is_missing() -> None:
    with pytest.raises(TypeError, match=r"tx: expected a queue with put\(bytes\), got list"):
        Outgoing([])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"rx: expected a queue with get_nowait\(\), or"):
        Incoming([])  # type: ignore[arg-type]


def test_the_zmq_adapter_waits_as_long_as_it_is_told_and_says_full_and_empty() -> None:
    zmq = pytest.importorskip("zmq")
    from shmblocks.transfer import ZmqQueue

    with zmq.Context() as context, context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as two:
        one.set_hwm(1)
        one.bind("inproc://adapter")
        left = ZmqQueue(one)
        with pytest.raises(queue.Full):
            left.put_nowait(b"nobody is connected")
        with pytest.raises(queue.Full):
            left.put(b"nobody is connected", timeout=0.005)
        two.connect("inproc://adapter")
        right = ZmqQueue(two)
        left.put(b"here")
        assert right.get(timeout=5.0) == b"here"
        with pytest.raises(queue.Empty):
            right.get_nowait()
        start = time.monotonic()
        with pytest.raises(queue.Empty):
            right.get(timeout=0.02)
        assert time.monotonic() - start >= 0.019
        Outgoing(right).send(b"back")
        assert Incoming(left).receive(5.0) == b"back"
    with pytest.raises(QueueBrokenError, match="zmq"):
        Incoming(left).receive(0.0)


def test_importing_transfers_imports_neither_zmq_nor_torch() -> None:
    program = "import sys, shmblocks.transfer; print({'zmq', 'torch'} & set(sys.modules))"
    assert run_program([sys.executable, "-c", program]).stdout == "set()\n"
