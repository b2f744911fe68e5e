"""Blocks of another node: ours beside raw TCP, zmq and a memcpy, for some sizes.

    python -m benchmarks.nodes [--rounds N] [--tokens N,N] [--json FILE]

Two processes on this machine, over loopback: the *source* holds pool A, the *reader* pool B. Every
transport has its turn in each round, so that what else the machine does falls on all alike. Told
are the median and the best time of one payload, and the seconds of CPU per GB of both processes.

A pool never gives the same blocks twice in a row, so that its memory is never in the processor's
caches. The others go along their memory in the same way.

    memcpy    pool to pool inside the reader: the floor, no network
    raw TCP   one connection, sendall out of a mapping, recv_into another: what the network gives
    nodes     NodeServer and RemotePool: with blocks reserved, a lease, and a publish at the end
    zmq       one REQ and REP socket; what came is copied into the pool (zmq gives its own memory)
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import multiprocessing
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import msgspec

from shmblocks import BlockHandle, BlockPool, PoolConfig, StaleHandleError, multimodal_fields
from shmblocks.nodes import NodeServer, RemotePool

HIDDEN = 3584
BLOCK = 128
# 0.46, 14.3, 118 and 250 MB.
TOKENS = (64, 1984, 16384, 34880)
KEY = b"the key of a benchmark on one machine"


class Measured(msgspec.Struct, frozen=True):
    """One transport at one size. CPU seconds are per GB of payload."""

    transport: str
    payload_bytes: int
    median_seconds: float
    best_seconds: float
    reader_cpu: float
    source_cpu: float

    @property
    def speed(self) -> float:
        """GB/s of the median."""
        return self.payload_bytes / self.median_seconds / 1e9


class Transport(NamedTuple):
    name: str
    carry: Callable[[int], None]


def config(most: int) -> PoolConfig:
    blocks = -(-most // BLOCK) + 1
    return PoolConfig(
        total_tokens=blocks * BLOCK, fields=multimodal_fields(HIDDEN), block_size=BLOCK
    )


# ---- the source --------------------------------------------------------------------------------


def source(control: Connection, name: str, most: int) -> None:
    """Answers `("publish", tokens)` with a handle, `("cpu",)` with its seconds, until `None`."""
    of = config(most)
    with (
        BlockPool.create(name, of, prefault="now") as pool,
        NodeServer(pool, ("127.0.0.1", 0), key=KEY) as server,
        socket.create_server(("127.0.0.1", 0)) as raw,
        _zmq_source(most * of.token_bytes) as zmq_port,
    ):
        payload = mmap.mmap(-1, most * of.token_bytes)
        payload.write(os.urandom(1 << 20) * (len(payload) >> 20))
        threading.Thread(target=_send_raw, args=(raw, payload), daemon=True).start()
        control.send((server.address, raw.getsockname(), zmq_port))
        while (question := control.recv()) is not None:
            if question[0] == "publish":
                with pool.reserve(question[1]) as reservation:
                    control.send(reservation.publish())
            elif question[0] == "free":
                with contextlib.suppress(StaleHandleError):
                    pool.free(question[1])
                control.send(None)
            else:
                control.send(time.process_time())


class Along:
    """Parts of a memory, one behind the other, and from its start again."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._at = 0

    def next(self, count: int) -> memoryview:
        """The next part of so many bytes."""
        if self._at + count > len(self._memory):
            self._at = 0
        start, self._at = self._at, self._at + count
        return self._memory[start : self._at]


def _send_raw(listener: socket.socket, payload: mmap.mmap) -> None:
    connection, _ = listener.accept()
    with connection, memoryview(payload) as memory:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        along = Along(memory)
        while asked := connection.recv(8, socket.MSG_WAITALL):
            connection.sendall(along.next(int.from_bytes(asked, "little")))


@contextlib.contextmanager
def _zmq_source(most: int) -> Iterator[int]:
    """The port of a REP socket; 0 where zmq is not installed."""
    try:
        import zmq
    except ImportError:
        yield 0
        return
    context = zmq.Context()
    replying = context.socket(zmq.REP)
    port = replying.bind_to_random_port("tcp://127.0.0.1")
    along = Along(memoryview(bytearray(os.urandom(1 << 20) * ((most >> 20) + 1))))

    def reply() -> None:
        with contextlib.suppress(zmq.ContextTerminated):
            while True:
                replying.send(along.next(int.from_bytes(replying.recv(), "little")), copy=False)
        replying.close(linger=0)

    thread = threading.Thread(target=reply, daemon=True)
    thread.start()
    yield port
    context.term()
    thread.join()


# ---- the reader --------------------------------------------------------------------------------


class Reader:
    """Pool B, and one connection of each kind to the source."""

    def __init__(self, control: Connection, pool: BlockPool, stack: contextlib.ExitStack) -> None:
        address, raw_address, zmq_port = control.recv()
        self._control = control
        self._pool = pool
        self._remote = stack.enter_context(RemotePool(pool, address, key=KEY))
        self._raw = stack.enter_context(socket.create_connection(raw_address))
        self._raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        most = pool.config.total_tokens * pool.config.token_bytes
        self._payload = Along(memoryview(bytearray(os.urandom(1 << 20) * (most // (1 << 20) + 1))))
        self._handle: BlockHandle | None = None
        self.transports = [
            Transport("memcpy", self._copy),
            Transport("raw TCP", self._receive_raw),
            Transport("nodes", self._fetch),
        ]
        if zmq_port:
            self._start_zmq(zmq_port, stack)

    def _start_zmq(self, port: int, stack: contextlib.ExitStack) -> None:
        import zmq

        context = stack.enter_context(zmq.Context())
        asking = stack.enter_context(context.socket(zmq.REQ))
        asking.connect(f"tcp://127.0.0.1:{port}")

        def receive(tokens: int) -> None:
            asking.send(self._size(tokens).to_bytes(8, "little"))
            came = memoryview(asking.recv(copy=False).buffer)
            with self._pool.reserve(tokens) as reservation:
                start = 0
                for name in reservation:
                    memory = reservation.memory(name)
                    memory[:] = came[start : start + len(memory)]
                    start += len(memory)

        self.transports.append(Transport("zmq", receive))

    def _size(self, tokens: int) -> int:
        return tokens * self._pool.config.token_bytes

    def _copy(self, tokens: int) -> None:
        with self._pool.reserve(tokens) as reservation:
            for name in reservation:
                memory = reservation.memory(name)
                memory[:] = self._payload.next(len(memory))

    def _receive_raw(self, tokens: int) -> None:
        memory, got = self._payload.next(self._size(tokens)), 0
        self._raw.sendall(len(memory).to_bytes(8, "little"))
        while got < len(memory):
            got += self._raw.recv_into(memory[got:])

    def _fetch(self, tokens: int) -> None:
        handle = self._handle
        if handle is None:
            raise RuntimeError("nothing was published")
        self._pool.free(self._remote.fetch(handle, timeout=60.0))

    def publish(self, tokens: int) -> None:
        """Over there, before the clock runs."""
        self._control.send(("publish", tokens))
        self._handle = self._control.recv()

    def forget(self) -> None:
        """Free what nobody has fetched, over there."""
        self._control.send(("free", self._handle))
        self._control.recv()

    def source_cpu(self) -> float:
        """Seconds that the other process has computed."""
        self._control.send(("cpu",))
        seconds: float = self._control.recv()
        return seconds


def measure(reader: Reader, tokens: int, rounds: int, token_bytes: int) -> list[Measured]:
    """All transports at one size, in turns; the first round is not counted."""
    times: dict[str, list[float]] = {each.name: [] for each in reader.transports}
    ours: dict[str, float] = dict.fromkeys(times, 0.0)
    theirs: dict[str, float] = dict.fromkeys(times, 0.0)
    for number in range(rounds + 1):
        for name, carry in reader.transports:
            if name == "nodes":
                reader.publish(tokens)
            their_start, our_start = reader.source_cpu(), time.process_time()
            start = time.perf_counter()
            carry(tokens)
            elapsed = time.perf_counter() - start
            if number:
                times[name].append(elapsed)
                ours[name] += time.process_time() - our_start
                theirs[name] += reader.source_cpu() - their_start
    size = tokens * token_bytes
    gigabytes = size * rounds / 1e9
    return [
        Measured(
            name,
            size,
            statistics.median(taken),
            min(taken),
            ours[name] / gigabytes,
            theirs[name] / gigabytes,
        )
        for name, taken in times.items()
    ]


def table(measured: Sequence[Measured]) -> str:
    heading = (
        f"{'MB':>7} {'transport':9} {'median ms':>10} {'best ms':>9} {'GB/s':>6} {'of raw':>7} "
        f"{'CPU s/GB reader':>16} {'source':>7}"
    )
    raw = {each.payload_bytes: each.speed for each in measured if each.transport == "raw TCP"}
    lines = (
        f"{each.payload_bytes / 1e6:7.2f} {each.transport:9} {each.median_seconds * 1e3:10.2f} "
        f"{each.best_seconds * 1e3:9.2f} {each.speed:6.2f} "
        f"{each.speed / raw[each.payload_bytes]:7.2f} {each.reader_cpu:16.2f} "
        f"{each.source_cpu:7.2f}"
        for each in measured
    )
    return "\n".join((heading, *lines))


def run(tokens: Sequence[int], rounds: int) -> list[Measured]:
    """Everything, between two fresh processes."""
    name = f"bench-nodes-{os.getpid()}"
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=source, args=(theirs, f"{name}-a", max(tokens)))
    child.start()
    theirs.close()
    of = config(max(tokens))
    try:
        with (
            contextlib.ExitStack() as stack,
            BlockPool.create(f"{name}-b", of, prefault="now") as pool,
        ):
            with contextlib.ExitStack() as connections:
                reader = Reader(ours, pool, connections)
                # Each page of both pools is mapped once, as it is after a while of any use.
                for _ in range(2):
                    for transport in reader.transports:
                        reader.publish(max(tokens))
                        transport.carry(max(tokens))
                        reader.forget()
                found: list[Measured] = []
                for size in tokens:
                    found += measure(reader, size, rounds, of.token_bytes)
            stack.callback(ours.send, None)
        return found
    finally:
        ours.close()
        child.join(30)
        if child.is_alive():
            child.kill()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench nodes", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tokens", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--json", metavar="FILE", type=Path)
    options = parser.parse_args(arguments)
    measured = run(options.tokens or TOKENS, options.rounds)
    print(table(measured))
    if options.json:
        options.json.write_bytes(msgspec.json.encode(measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
