"""An agent of NIXL (`Agent` of `agent_program.py`), and what its libraries read of the environment.

Importing this module does not import NIXL: the agent's class does, in its own process.

What of NIXL 1.5.1 is built around, here and by those who use it: a read cannot be taken back, and
goes on writing after its handle was released; a source that stands still is never told; whoever
reaches the agent can read and write its whole process.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

from shmblocks.nodes.agent_program import AgentError, Copy

# Of one CUDA version each, and the package that chooses between them, which imports torch.
PACKAGES = ("nixl_cu12", "nixl_cu13", "nixl")
CLASS = f"{__name__}:NixlAgent"
_MEMORY = "DRAM"
# Microseconds that its thread sleeps when nothing happens; something wakes it at once. NIXL's
# Python sets 0, with which it never sleeps: an idle agent took 21 to 47% of a core here, and a read
# of 64 KB 3 ms instead of 0.5 (two agents, two busy cores). Smaller: more CPU for nothing. Larger:
# what shows only when it looks, such as a lost connection, shows later.
THREAD_DELAY = 100_000


def is_installed() -> bool:
    """Whether this Python has NIXL. Imports nothing."""
    return any(importlib.util.find_spec(package) is not None for package in PACKAGES)


def require_nixl() -> None:
    """Raises `ImportError` where NIXL is not installed."""
    if not is_installed():
        raise ImportError(
            "engine 'nixl': NIXL is not installed here: pip install 'shmblocks[nixl]' (240 MB), "
            "or leave out the engine: TCP streams need nothing"
        )


def is_tcp_only() -> bool:
    """Whether agents of this process's environment use no other way than TCP."""
    return os.environ.get("UCX_TLS", "tcp") == "tcp"


def environment(patience: float, device: str | None) -> dict[str, str]:
    """This process's environment for an agent; what is set there already stays.

    `patience`: seconds without an acknowledgement after which a connection is lost; `device`: the
    network interface that it uses and listens on (None: all).
    """
    probe = f"{max(1, int(patience / 3))}s"
    ours = {
        # The one way that was tried. Over others memory is mapped writable: `is_tcp_only`.
        "UCX_TLS": "tcp",
        # The system's libibverbs beside UCX's own crashes the process at its end.
        "UCX_MODULES": "^ib",
        "UCX_TCP_USER_TIMEOUT": f"{max(1, int(patience * 1000))}ms",
        "UCX_TCP_KEEPIDLE": probe,
        "UCX_TCP_KEEPINTVL": probe,
        "UCX_TCP_KEEPCNT": "3",
        # 8 KB by default, which costs twice the CPU.
        "UCX_TCP_TX_SEG_SIZE": "64K",
        # What they would say is in the errors. UCX writes a warning at each connection's end.
        "UCX_LOG_LEVEL": "fatal",
        "UCX_HANDLE_ERRORS": "none",
        "UCX_WARN_UNUSED_ENV_VARS": "n",
        "NIXL_LOG_LEVEL": "FATAL",
    }
    if device is not None and is_tcp_only():
        ours["UCX_NET_DEVICES"] = device
    return {**ours, **os.environ}


class NixlAgent:
    """One agent with the UCX backend; one thread uses it."""

    def __init__(self, name: str, memory: Sequence[tuple[int, int]]) -> None:
        """Registers the memory, a list of (address, size), for whoever reaches the agent."""
        self._api = _api()
        try:
            config = self._api.nixl_agent_config(enable_prog_thread=True, backends=[])
            with _sleeping_threads(self._api.nixlBind):
                self._agent = self._api.nixl_agent(name, config)
            self._agent.create_backend("UCX", {})
            regions = [(address, size, 0, "") for address, size in memory]
            self._agent.register_memory(regions, _MEMORY)
            self.metadata: bytes = self._agent.get_agent_metadata()
        except Exception as error:  # its errors have no base class of their own
            chosen = [f"{name}={os.environ.get(name)}" for name in ("UCX_TLS", "UCX_NET_DEVICES")]
            raise AgentError(
                f"NIXL makes no agent: {_text(error)} ({', '.join(chosen)}; more is told with "
                "UCX_LOG_LEVEL=info and NIXL_LOG_LEVEL=INFO)"
            ) from error
        # Of the server that is read from: its metadata, and the name that NIXL knows it by.
        self._known = (b"", "")
        self._going = 0

    def begin(self, metadata: bytes, copies: Sequence[Copy]) -> object:
        """Post one READ of all copies."""
        agent = self._agent
        try:
            remote = self._remote(metadata)
            here = agent.get_xfer_descs([(each.here, each.size, 0) for each in copies], _MEMORY)
            there = agent.get_xfer_descs([(each.there, each.size, 0) for each in copies], _MEMORY)
            read = agent.initialize_xfer("READ", here, there, remote, b"")
            state = agent.transfer(read)
        except Exception as error:
            raise AgentError(f"NIXL does not begin to read: {_text(error)}") from error
        self._going += 1
        return _Read(read, state)

    def _remote(self, metadata: bytes) -> str:
        """The name of the agent with that metadata. A server that was started again has another
        name, so that what is known of its predecessor is of no use."""
        known, remote = self._known
        if metadata != known:
            if remote and not self._going:
                self._agent.remove_remote_agent(remote)
            remote = self._agent.add_remote_agent(metadata)
            self._known = (metadata, remote)
        return remote

    def is_done(self, read: object) -> bool:
        """Whether it is DONE; any other end is an error."""
        if not isinstance(read, _Read):
            raise TypeError(f"read: expected what `begin` gave, got {type(read).__name__}")
        try:
            if read.state == "PROC":
                read.state = self._agent.check_xfer_state(read.handle)
            if read.state == "PROC":
                return False
            if read.state == "DONE":
                self._going -= 1
                self._agent.release_xfer_handle(read.handle)
                return True
        except Exception as error:
            raise AgentError(f"NIXL lost the connection: {_text(error)}") from error
        raise AgentError(f"NIXL ended the read with {read.state}")

    def close(self) -> None:
        """Take leave of the server while that can still be done."""
        try:
            if self._known[1]:
                self._agent.remove_remote_agent(self._known[1])
            self._agent.agent = None  # destroys it
        except Exception as error:  # noqa: BLE001 - the process ends, whatever it is
            logging.getLogger("shmblocks").debug("NIXL: %s", error)


class _Read:
    def __init__(self, handle: object, state: str) -> None:
        self.handle = handle
        self.state = state


def _api() -> Any:  # noqa: ANN401 - it has no types
    for package in PACKAGES:
        if importlib.util.find_spec(package) is not None:
            return importlib.import_module(f"{package}._api")
    raise AgentError("NIXL is not installed")


@contextlib.contextmanager
def _sleeping_threads(bindings: Any) -> Iterator[None]:  # noqa: ANN401 - as above
    """Agents that are made meanwhile have `THREAD_DELAY`, which is no argument of theirs."""
    make = bindings.nixlAgent

    def make_sleeping(name: str, config: Any) -> object:  # noqa: ANN401
        config.pthrDelay = THREAD_DELAY
        return make(name, config)

    bindings.nixlAgent = make_sleeping
    try:
        yield
    finally:
        bindings.nixlAgent = make


def _text(error: Exception) -> str:
    """`nixlRemoteDisconnectError: NIXL_ERR_REMOTE_DISCONNECT`."""
    return f"{type(error).__name__}: {error}"
