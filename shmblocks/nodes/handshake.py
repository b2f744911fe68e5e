"""Who is there: both ends prove that they know the key, and neither says it.

    server -> reader   Hello{version, nonce_s}
    reader -> server   Prove{nonce_r, HMAC(key, "reader" | Hello | nonce_r)}
    server -> reader   Welcome{pools, HMAC(key, "server" | Hello | nonce_r | pools)}

- Both nonces are new for each connection, so that what was recorded of another is of no use; and
  the two texts begin differently, so that a proof cannot be sent back to its author.
- The reader proves first: a server tells strangers nothing but a random number.
- HMAC-SHA256, compared in constant time. Without a key both use an empty one, which proves nothing:
  that is allowed on loopback only (the callers see to it).

What it does not do: protect what follows. Whoever can change packets between the nodes can take
over a connection after the handshake, and whoever can read them reads the rows: use TLS, or a
network that does it (WireGuard, a service mesh).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

import msgspec

from shmblocks.errors import AuthenticationError, IncompatiblePoolError
from shmblocks.nodes.messages import (
    BUSY,
    NONCE_BYTES,
    VERSION,
    Hello,
    Prove,
    Refused,
    ServedPool,
    Welcome,
    encode,
    error_of,
)
from shmblocks.nodes.stream import ConnectionLostError, Stream

# Shorter keys can be guessed from one recorded handshake.
MIN_KEY_BYTES = 16
# Where the key lies, for those who cannot be given it as an argument.
KEY_FILE_VARIABLE = "SHMBLOCKS_KEY_FILE"
_CONTEXT = b"shmblocks nodes 1 "


class BusyError(Exception):
    """The server has as many connections as it takes."""


def checked_key(key: bytes | None) -> bytes | None:
    """The key, if it is one."""
    if key is None:
        return None
    if not isinstance(key, bytes):
        raise TypeError(f"key: expected bytes or None, got {type(key).__name__}")
    if len(key) < MIN_KEY_BYTES:
        raise ValueError(
            f"key: expected at least {MIN_KEY_BYTES} random bytes, got {len(key)}: make one with "
            "`head -c 32 /dev/urandom > key`"
        )
    return key


def key_from_environment() -> bytes | None:
    """The bytes of the file that SHMBLOCKS_KEY_FILE names; None when it names none."""
    path = os.environ.get(KEY_FILE_VARIABLE)
    return checked_key(Path(path).read_bytes()) if path else None


def greet(
    stream: Stream, key: bytes | None, pools: tuple[ServedPool, ...], deadline: float | None
) -> None:
    """The server's part. Raises `AuthenticationError` for a reader that does not know the key."""
    hello = Hello(VERSION, secrets.token_bytes(NONCE_BYTES))
    stream.send(hello, deadline)
    prove = stream.receive(deadline, Prove)
    if not hmac.compare_digest(prove.mac, _proof(key, b"reader", encode(hello), prove.nonce)):
        raise AuthenticationError(
            "the keys of the two nodes differ (or only one of them has one): give both the same"
        )
    said = msgspec.msgpack.encode(pools)
    mac = _proof(key, b"server", encode(hello), prove.nonce, said)
    stream.send(Welcome(pools, mac), deadline)


def introduce(stream: Stream, key: bytes | None, deadline: float | None) -> tuple[ServedPool, ...]:
    """The reader's part: what the server serves.

    Raises `AuthenticationError` when either end does not know the key, `IncompatiblePoolError` when
    the other end speaks another version, `BusyError`.
    """
    hello = stream.receive(deadline, Hello, Refused)
    if isinstance(hello, Refused):
        raise _why_not(stream, hello)
    if hello.version != VERSION:
        raise IncompatiblePoolError(
            f"node {stream.peer}: it speaks version {hello.version} between nodes, this is "
            f"{VERSION}: use the same shmblocks on both"
        )
    nonce = secrets.token_bytes(NONCE_BYTES)
    stream.send(Prove(nonce, _proof(key, b"reader", encode(hello), nonce)), deadline)
    welcome = stream.receive(deadline, Welcome, Refused)
    if isinstance(welcome, Refused):
        raise _why_not(stream, welcome)
    said = msgspec.msgpack.encode(welcome.pools)
    if not hmac.compare_digest(welcome.mac, _proof(key, b"server", encode(hello), nonce, said)):
        raise AuthenticationError(
            f"node {stream.peer}: it did not prove that it knows the key: something else listens "
            "there, or the keys differ"
        )
    return welcome.pools


def _why_not(stream: Stream, answer: Refused) -> Exception:
    if answer.kind == BUSY:
        return BusyError(answer.reason)
    if answer.kind == AuthenticationError.__name__:
        return error_of(answer, f"node {stream.peer}")
    return ConnectionLostError(f"it refused the connection: {answer.reason}")


def _proof(key: bytes | None, who: bytes, *parts: bytes) -> bytes:
    # HMAC fills short keys with zeros, so that two keys could be the same: a digest cannot.
    digest = hashlib.sha256(key or b"").digest()
    code = hmac.new(digest, _CONTEXT + who, hashlib.sha256)
    for part in parts:
        # Each with its length: no two lists of parts are the same text.
        code.update(len(part).to_bytes(4, "little") + part)
    return code.digest()
