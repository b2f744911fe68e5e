"""Where a node listens: names, numbers, and which of them are this machine's own.

`resolve` keeps to a deadline, which getaddrinfo(3) does not: a name that is not a number is looked
up in a thread, and a thread that is late is left to itself.
"""

from __future__ import annotations

import ipaddress
import math
import operator
import socket
import threading
from typing import NamedTuple

from shmblocks._os.wait import seconds_left
from shmblocks.nodes.stream import ConnectionLostError, DeadlinePassedError

Address = tuple[str, int]


class Endpoint(NamedTuple):
    """What a socket is made for and connected (or bound) to."""

    family: int
    address: tuple[object, ...]  # as the sockets of its family take it

    @property
    def is_loopback(self) -> bool:
        """Whether only processes of this machine (of its network namespace) reach it."""
        return ipaddress.ip_address(str(self.address[0]).partition("%")[0]).is_loopback


def parse_address(text: str) -> Address:
    """The address that `address_text` writes; ValueError for any other text."""
    host, _, port = text.rpartition(":")
    if not (host and port.isascii() and port.isdigit()):
        raise ValueError(f"address: expected HOST:PORT, got {text!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def checked_address(address: Address | str) -> Address:
    """`(host, port)` of the right types, or from "host:port"; ValueError or TypeError for anything
    else."""
    host, port = parse_address(address) if isinstance(address, str) else address
    port = operator.index(port)
    if not host or not 0 <= port < 1 << 16:
        raise ValueError(
            f"address: expected (host, port) with a port of 0 to 65535, got {address!r}"
        )
    return str(host), port


def address_text(address: Address) -> str:
    """`10.0.0.1:7400`, `[::1]:7400`."""
    host, port = address[0], address[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def resolve(address: Address, deadline: float | None) -> list[Endpoint]:
    """The endpoints that a host name stands for."""
    try:
        return _look_up(address, socket.AI_NUMERICHOST)
    except socket.gaierror:
        return _look_up_in_thread(address, deadline)


def _look_up(address: Address, flags: int) -> list[Endpoint]:
    found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=flags)
    return [Endpoint(family, where) for family, _, _, _, where in found]


def _look_up_in_thread(address: Address, deadline: float | None) -> list[Endpoint]:
    found: list[Endpoint] = []
    problems: list[str] = []

    def look_up() -> None:
        try:
            found.extend(_look_up(address, 0))
        except OSError as error:
            problems.append(str(error))

    thread = threading.Thread(target=look_up, name="shmblocks-resolving", daemon=True)
    thread.start()
    left = seconds_left(deadline)
    thread.join(None if left == math.inf else max(left, 0.0))
    if thread.is_alive():
        raise DeadlinePassedError
    if not found:
        why = problems[0] if problems else "no address"
        raise ConnectionLostError(f"the name {address[0]!r} leads nowhere: {why}")
    return found
