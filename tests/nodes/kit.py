"""Two pools as two nodes: what is in them, and a network between them that misbehaves on demand.

Nothing here imports torch: fields are read and written as bytes.
"""

from __future__ import annotations

import contextlib
import random
import select
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from shmblocks import UNBOUNDED, BlockHandle, BlockPool, Field, PoolConfig, ShmBlocksError
from shmblocks.lease import Lease, Reservation
from shmblocks.nodes import NodeServer, RemotePool
from tests.support.children import wait_until
from tests.support.naming import new_pool_name

BLOCK = 4
BLOCKS = 64
KEY = b"sixteen bytes or more of a secret"
# Seconds: long enough for a machine that does twenty other things, and never reached otherwise.
LONG = 30.0

FIELDS = (
    Field("x", (3,), "int32"),
    Field("ids", (), "int64"),
    Field("positions", (3,), "int32", transposed=True),
    Field("flags", (), "bool"),
)

Content = dict[str, bytes]


def config(blocks: int = BLOCKS, fields: tuple[Field, ...] = FIELDS) -> PoolConfig:
    return PoolConfig(
        total_tokens=blocks * BLOCK,
        fields=fields,
        block_size=BLOCK,
        default_num_blocks=2,
        max_participants=16,
        max_leases=64,
        lock_timeout=20.0,
    )


# Rows of 4 KiB: a fetch is larger than what sockets hold, so that it can be stopped in the middle.
LARGE = PoolConfig(
    total_tokens=8192,
    fields=(Field("x", (4096,), "int8"),),
    block_size=64,
    default_num_blocks=2,
    lock_timeout=20.0,
)
LARGE_TOKENS = 4096


class Published(NamedTuple):
    """What was published on the first node."""

    handle: BlockHandle
    content: Content


def publish(pool: BlockPool, num_tokens: int, rng: random.Random, *, readers: int = 1) -> Published:
    """Random bytes in every field, and in aux."""
    with pool.reserve(num_tokens, timeout=0.0) as reservation:
        content = fill(reservation, rng)
        return Published(reservation.publish(readers=readers), content)


def publish_entry(pool: BlockPool, key: bytes, num_tokens: int, rng: random.Random) -> Published:
    """The same, as an entry of the cache."""
    with pool.reserve(num_tokens, timeout=0.0) as reservation:
        content = fill(reservation, rng)
        return Published(reservation.publish(readers=UNBOUNDED, key=key), content)


def fill(reservation: Reservation, rng: random.Random) -> Content:
    """Random bytes in every field, and in aux."""
    content: Content = {}
    for name in ("aux", *reservation):
        memory = reservation.memory(name)
        data = rng.randbytes(len(memory))
        # Bytes of a bool are 0 and 1.
        content[name] = bytes(byte & 1 for byte in data) if name == "flags" else data
        memory[:] = content[name]
    return content


def content_of(lease: Lease) -> Content:
    return {name: bytes(lease.memory(name)) for name in ("aux", *lease)}


def read(pool: BlockPool, handle: BlockHandle) -> Content:
    """One reader's lease, and what it reads."""
    with pool.open(handle) as lease:
        return content_of(lease)


def assert_arrived(pool: BlockPool, local: BlockHandle, published: Published) -> None:
    assert local.num_tokens == published.handle.num_tokens
    assert local.pool_id == pool.pool_id
    assert read(pool, local) == published.content


def assert_fetchable(pool: BlockPool, published: Published) -> None:
    """Its reader is still to come, and nothing has changed. Uses it up."""
    wait_until(lambda: not holds_leases(pool), "the server has given its lease back", LONG)
    assert read(pool, published.handle) == published.content


def holds_leases(pool: BlockPool) -> bool:
    return any(info.leases for info in pool.allocations())


def assert_nothing_held(pool: BlockPool) -> None:
    """Every block is free (a server may need a moment to hear that its reader is done)."""
    total = pool.config.total_blocks
    wait_until(lambda: pool.available_blocks() == total, f"{pool} is free", LONG)
    assert pool.check() == []


# ---- two nodes ---------------------------------------------------------------------------------


@dataclass
class Pair:
    """Two pools in one process, one served and one fetched into."""

    here: BlockPool
    there: BlockPool
    server: NodeServer
    remote: RemotePool


@contextlib.contextmanager
def two_pools(of: PoolConfig | None = None) -> Iterator[tuple[BlockPool, BlockPool]]:
    """The own pool, and the other node's."""
    with (
        BlockPool.create(new_pool_name(), of or config(), role="here", prefault="off") as here,
        BlockPool.create(new_pool_name(), of or config(), role="there", prefault="off") as there,
    ):
        yield here, there


@contextlib.contextmanager
def two_nodes(
    of: PoolConfig | None = None,
    *,
    connections: int = 2,
    patience: float = 10.0,
    max_connections: int = 64,
) -> Iterator[Pair]:
    with (
        two_pools(of) as (here, there),
        NodeServer(
            there,
            ("127.0.0.1", 0),
            key=KEY,
            patience=patience,
            max_connections=max_connections,
        ) as server,
        RemotePool(
            here, server.address, key=KEY, connections=connections, patience=patience
        ) as remote,
    ):
        yield Pair(here, there, server, remote)


class Fetching:
    """A fetch in a thread of the test, and what came of it."""

    def __init__(self, remote: RemotePool, handle: BlockHandle, timeout: float = LONG) -> None:
        self.local: BlockHandle | None = None
        self.error: ShmBlocksError | None = None
        self._thread = threading.Thread(target=self._run, args=(remote, handle, timeout))
        self._thread.start()

    def _run(self, remote: RemotePool, handle: BlockHandle, timeout: float) -> None:
        try:
            self.local = remote.fetch(handle, timeout=timeout)
        except ShmBlocksError as error:
            # Its type and text: its frames would keep the pool's mapping.
            self.error = type(error)(str(error))

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> Fetching:
        self._thread.join()
        return self


# ---- a network that misbehaves -----------------------------------------------------------------

# What a rule makes of bytes that come from the server, given how many came before them.
Rule = Callable[[int, bytes], bytes]


def pass_on(_: int, data: bytes) -> bytes:
    return data


def garble(at: int) -> Rule:
    """Flip one bit of the byte with that number."""

    def rule(offset: int, data: bytes) -> bytes:
        if not offset <= at < offset + len(data):
            return data
        changed = bytearray(data)
        changed[at - offset] ^= 0x10
        return bytes(changed)

    return rule


class Proxy:
    """A connection's middle: forwards one connection after the other, by a rule.

    `cut_after`: forwards so many bytes of the server, then ends both connections.
    `stall_after` forwards so many bytes of the server and then nothing more until `go_on`;
    `has_stalled` tells when it has come to that.
    """

    def __init__(
        self, target: tuple[str, int], rule: Rule = pass_on, *, cut_after: int = 1 << 62
    ) -> None:
        self._target = target
        self._rule = rule
        self._cut_after = cut_after
        self._stall_at: int | None = None
        self.has_stalled = threading.Event()
        self._goes_on = threading.Event()
        self._is_over = False
        self.from_server = 0
        self.from_reader = bytearray()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self._thread = threading.Thread(target=self._run, name="proxy")
        self._thread.start()

    def stall_after(self, count: int) -> None:
        self._stall_at = count

    def go_on(self) -> None:
        self._stall_at = None
        self._goes_on.set()

    def close(self) -> None:
        self._is_over = True
        self._goes_on.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._is_over:
            try:
                reader, _ = self._listener.accept()
            except OSError:
                return
            with reader, socket.socket() as server, contextlib.suppress(OSError):
                server.connect(self._target)
                self.from_server = 0
                self._forward(reader, server)

    def _forward(self, reader: socket.socket, server: socket.socket) -> None:
        while not self._is_over and self.from_server < self._cut_after:
            readable, _, _ = select.select([reader, server], [], [], 0.02)
            if reader in readable:
                data = reader.recv(1 << 16)
                if not data:
                    return
                self.from_reader += data
                server.sendall(data)
            if server in readable and not self._from_server(reader, server):
                return

    def _from_server(self, reader: socket.socket, server: socket.socket) -> bool:
        most = min(1 << 16, self._cut_after - self.from_server)
        if self._stall_at is not None:
            if self.from_server >= self._stall_at:
                self.has_stalled.set()
                return self._wait_stalled(reader)
            most = min(most, self._stall_at - self.from_server)
        data = server.recv(most)
        if not data:
            return False
        before, self.from_server = self.from_server, self.from_server + len(data)
        reader.sendall(self._rule(before, data))
        return True

    def _wait_stalled(self, reader: socket.socket) -> bool:
        """Until it goes on; False when the reader has gone."""
        while not self._goes_on.wait(0.01):
            readable, _, _ = select.select([reader], [], [], 0)
            if readable and not reader.recv(1, socket.MSG_PEEK):
                return False
        return not self._is_over
