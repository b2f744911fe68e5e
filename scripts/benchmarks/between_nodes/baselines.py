"""Floors: a memcpy without a network, and a socket without anything around it.

memcpy       memory to pool inside the reader
raw TCP      one connection, sendall out of a mapping, recv_into another
raw waitall  the same with MSG_WAITALL: the kernel wakes the reader once, not for every piece
"""

from __future__ import annotations

import contextlib
import socket
import threading

from benchmarks.between_nodes.kit import LOOPBACK, Along, Nothing, own_pool, size_of
from shmblocks import BlockPool


def nothing(_: contextlib.ExitStack, __: str, ___: int, ____: object) -> Nothing:
    return Nothing()


class Memcpy:
    def __init__(self, pool: BlockPool, most: int) -> None:
        self._pool = pool
        self._along = Along(most)

    def carry(self, tokens: int, _: object) -> None:
        with self._pool.reserve(tokens) as reservation:
            for name in reservation:
                memory = reservation.memory(name)
                memory[:] = self._along.next(len(memory))


def memcpy(stack: contextlib.ExitStack, name: str, most: int, _: object) -> Memcpy:
    return Memcpy(own_pool(stack, name, most), most)


class RawSource(Nothing):
    """Sends as many bytes as it is asked for, from a thread."""

    def __init__(self, stack: contextlib.ExitStack, most: int) -> None:
        listener = stack.enter_context(socket.create_server((LOOPBACK, 0)))
        self.told = listener.getsockname()
        threading.Thread(target=_send, args=(listener, Along(most)), daemon=True).start()


def _send(listener: socket.socket, along: Along) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while asked := connection.recv(8, socket.MSG_WAITALL):
            connection.sendall(along.next(int.from_bytes(asked, "little")))


def raw_source(stack: contextlib.ExitStack, _: str, most: int, __: object) -> RawSource:
    return RawSource(stack, most)


class RawReader:
    def __init__(self, connection: socket.socket, most: int, flags: int) -> None:
        self._connection = connection
        self._along = Along(most)
        self._flags = flags

    def carry(self, tokens: int, _: object) -> None:
        memory, got = self._along.next(size_of(tokens)), 0
        self._connection.sendall(len(memory).to_bytes(8, "little"))
        while got < len(memory):
            got += self._connection.recv_into(memory[got:], 0, self._flags)


def _raw_reader(stack: contextlib.ExitStack, most: int, told: object, flags: int) -> RawReader:
    connection = stack.enter_context(socket.create_connection(told))  # type: ignore[arg-type]
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return RawReader(connection, most, flags)


def raw_reader(stack: contextlib.ExitStack, _: str, most: int, told: object) -> RawReader:
    return _raw_reader(stack, most, told, 0)


def waitall_reader(stack: contextlib.ExitStack, _: str, most: int, told: object) -> RawReader:
    return _raw_reader(stack, most, told, socket.MSG_WAITALL)
