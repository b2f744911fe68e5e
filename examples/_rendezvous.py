"""How two programs that share nothing but a pool's name meet, to pass handles.

A unix socket in the temporary folder, its path made from the pool's name. It keeps messages apart
(SOCK_SEQPACKET), so one message is one encoded handle, or END. Nothing is pickled. It carries
handles only: the embeddings themselves never pass through it.

Any other queue does as well: a handle is some 30 bytes.
"""

from __future__ import annotations

import os
import select
import socket
import tempfile
import time

END = b"end"  # the producer's last message; a closed socket without it means that it died
LARGEST_MESSAGE = 64  # bytes; an encoded handle has at most 40
RETRY_SECONDS = 0.02  # smaller: a busier wait for the producer; larger: a later start


def socket_path(pool_name: str) -> str:
    """Where the producer of this pool listens. One per user, so that users do not meet."""
    file = f"shmblocks-{os.getuid()}-{pool_name.strip('/')}.sock"
    return os.path.join(tempfile.gettempdir(), file)


def wait_for_consumer(pool_name: str, timeout: float) -> socket.socket:
    """Listen until one consumer comes; TimeoutError if none does.

    Call it while holding the pool: its name is the producer's alone, so a socket file already
    there was left by a dead one.
    """
    path = socket_path(pool_name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        _remove(path)
        server.bind(path)
        try:
            os.chmod(path, 0o600)
            server.listen(1)
            server.settimeout(timeout)
            return _accept(server, pool_name, timeout)
        finally:
            _remove(path)


def find_producer(pool_name: str, timeout: float) -> socket.socket:
    """Connect to the producer of this pool; TimeoutError if none listens in time."""
    path = socket_path(pool_name)
    deadline = time.monotonic() + timeout
    while (connection := _connect(path)) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no producer listened on {path} within {timeout:g} s")
        time.sleep(RETRY_SECONDS)
    connection.settimeout(timeout)
    return connection


def has_hung_up(consumer: socket.socket, within: float) -> bool:
    """Whether the consumer goes away within so many seconds. It never sends anything else."""
    return bool(select.select([consumer], [], [], within)[0])


def _accept(server: socket.socket, pool_name: str, timeout: float) -> socket.socket:
    try:
        consumer, _ = server.accept()
    except TimeoutError:
        raise TimeoutError(
            f"no consumer came within {timeout:g} s;"
            f" start one: python examples/consumer.py --name {pool_name}"
        ) from None
    consumer.settimeout(timeout)
    return consumer


def _connect(path: str) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(path)
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except BaseException:
        connection.close()
        raise
    return connection


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
