"""What runs in an agent process: one agent, and the fields of the pools that it may touch.

Contract
- Whoever reaches the agent can read, and over TCP write, every byte of this process (NIXL checks
  neither). So it has nothing: it maps the fields of its pools and not their state, closes the
  descriptors, has no key, and ends with its parent.
- It never forks: a forked child's end breaks the agent of its parent.
- It ends when its parent closes the socket or dies, by `os._exit`: what the agent's libraries do at
  an ordinary exit can crash. An agent that does not let itself be closed in time is killed by an
  alarm. In either case the kernel has taken the mapping away when the process is gone, and nothing
  can write into the pool any more.

It runs in one thread, beside those of the agent.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import mmap
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from shmblocks.nodes.agent_messages import (
    MAX_BYTES,
    Begin,
    Ended,
    Ready,
    Region,
    Setup,
    pack,
    unpack,
)

# Seconds between two questions to the agent whether a read is over, growing from one to the other:
# it has no way to tell by itself. Smaller: more CPU while large reads go on. Larger: reads take
# longer by as much.
SHORTEST_PAUSE = 50e-6
LONGEST_PAUSE = 1e-3
# Seconds for closing the agent, in which it takes leave of others, before the process is killed.
CLOSING_SECONDS = 2


class AgentError(Exception):
    """A read ended without all rows, or there can be no agent; the text says why."""


class Copy(NamedTuple):
    """`size` bytes from an address of the other agent to one of this process."""

    here: int
    there: int
    size: int


class Agent(Protocol):
    """Reads memory of agents in other processes. Its class is made with a name and the (address,
    size) of each part of memory that it may touch; `AgentError` when there can be none."""

    metadata: bytes

    def begin(self, metadata: bytes, copies: Sequence[Copy]) -> object:
        """Begin to read from the agent of that metadata; what `is_done` is asked about."""
        ...

    def is_done(self, read: object) -> bool:
        """Whether everything has come. Raises `AgentError` when it never will."""
        ...

    def close(self) -> None:
        """Read nothing more, and take leave."""
        ...


def main(fd: int) -> None:
    """Serve the parent at the other end of the socket `fd`. Ends the process."""
    code = 1
    try:
        # It holds the rows of others, and may be crashed from outside.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _serve(socket.socket(fileno=fd))
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        raise
    finally:
        os._exit(code)


def _serve(parent: socket.socket) -> None:
    try:
        setup = unpack(parent.recv(MAX_BYTES), Setup)
        memory = [_mapped(region) for region in setup.regions]
        agent = _agent(setup, memory)
    except (AgentError, OSError) as error:
        _say(parent, Ended(0, str(error)))
        return
    try:
        _say(parent, Ready(agent.metadata, tuple(address for address, _ in memory)))
        _Reads(parent, agent, memory[0][0]).run()
    finally:
        # Whatever the parent has made of it.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
        signal.alarm(CLOSING_SECONDS)
        agent.close()


def _agent(setup: Setup, memory: list[tuple[int, int]]) -> Agent:
    module, _, name = setup.agent.partition(":")
    agent: Agent = getattr(importlib.import_module(module), name)(setup.name, memory)
    return agent


class _Reads:
    """The reads under way."""

    def __init__(self, parent: socket.socket, agent: Agent, base: int) -> None:
        """Rows land behind the address `base`."""
        self._parent = parent
        self._agent = agent
        self._base = base
        self._going: dict[int, object] = {}

    def run(self) -> None:
        """Until the parent closes its end."""
        pause = SHORTEST_PAUSE
        while True:
            readable, _, _ = select.select([self._parent], [], [], pause if self._going else None)
            if readable:
                data = _heard(self._parent)
                if not data:
                    return
                self._begin(unpack(data, Begin))
                pause = SHORTEST_PAUSE
            for number in list(self._going):
                self._ask(number)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _begin(self, begin: Begin) -> None:
        copies = [Copy(self._base + rows.offset, rows.address, rows.size) for rows in begin.rows]
        try:
            self._going[begin.number] = self._agent.begin(begin.metadata, copies)
        except AgentError as error:
            _say(self._parent, Ended(begin.number, str(error), was_begun=False))

    def _ask(self, number: int) -> None:
        try:
            if not self._agent.is_done(self._going[number]):
                return
            problem = ""
        except AgentError as error:
            problem = str(error)
        del self._going[number]
        _say(self._parent, Ended(number, problem))


def _heard(parent: socket.socket) -> bytes:
    """The next datagram; nothing when the parent is gone."""
    try:
        return parent.recv(MAX_BYTES)
    except OSError:
        return b""


def _say(parent: socket.socket, message: Ready | Ended) -> None:
    # A parent that is gone shows when it is heard again.
    with contextlib.suppress(OSError):
        parent.send(pack(message))


def _mapped(region: Region) -> tuple[int, int]:
    """Map a region; (address, size).

    By mmap(2) itself: Python's object keeps a descriptor, by which the whole segment could be had.
    The mapping keeps the open file description, with the lock that says that somebody writes here.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,
    )
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if region.is_writable else 0)
    address = libc.mmap(None, region.size, protection, mmap.MAP_SHARED, region.fd, region.start)
    number = ctypes.get_errno()
    os.close(region.fd)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(number, f"cannot map {region.size} bytes: {os.strerror(number)}")
    return address, region.size
