"""Two nodes with agents: NIXL's where it is installed, and fake ones that do what a test wants."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from shmblocks import BlockPool, PoolConfig
from shmblocks.nodes import NodeServer, RemotePool, nixl_agent
from shmblocks.nodes.agent_process import AgentProcess
from tests.nodes import fake_agent
from tests.nodes.kit import (
    KEY,
    LARGE,
    LARGE_TOKENS,
    LONG,
    Fetching,
    Pair,
    assert_arrived,
    publish,
    two_pools,
)
from tests.support.children import wait_until

TOTAL_BYTES = LARGE_TOKENS * 4096


def use_fake_agents() -> None:
    """In a child of a test; a test itself has the fixture `agents`."""
    vars(nixl_agent)["CLASS"] = fake_agent.CLASS
    vars(nixl_agent)["is_installed"] = lambda: True


@dataclass
class Agents:
    """Which agents a test uses, and how they are held up in the middle of a read."""

    is_fake: bool
    folder: Path
    _stopped: list[int] = field(default_factory=list)

    def tell(self, what: str) -> None:
        """Make the fake ones do something (`fake_agent.py`)."""
        (self.folder / what).touch()

    def untell(self, what: str) -> None:
        (self.folder / what).unlink()

    def hold(self, server: NodeServer, size: int = TOTAL_BYTES) -> None:
        """Reads of so many bytes do not come to their end from now on."""
        if self.is_fake:
            self.tell(f"hold-{size}")
        else:
            pid = agent_of(server)
            os.kill(pid, signal.SIGSTOP)
            self._stopped.append(pid)

    def go_on(self) -> None:
        for each in self.folder.glob("hold-*"):
            each.unlink()
        stopped, self._stopped = self._stopped, []
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def current_agent(node: NodeServer | RemotePool) -> int | None:
    """The process of its agent, if it has one."""
    assert node._nixl is not None
    return node._nixl.agent_pid


def agent_of(node: NodeServer | RemotePool) -> int:
    """The process of its agent."""
    pid = current_agent(node)
    assert pid is not None
    return pid


def has_ended(pid: int) -> bool:
    """Whether a process is no more, or a zombie with all its threads: it has no memory, lock or
    descriptor then."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state in "ZX" and len(os.listdir(f"/proc/{pid}/task")) == 1
    except (FileNotFoundError, ProcessLookupError):
        return True


def processes_of(remote: RemotePool) -> list[AgentProcess]:
    assert remote._nixl is not None
    return list(remote._nixl._processes)


def wait_for_read(remote: RemotePool, count: int = 1) -> None:
    """Until so many reads are under way."""
    wait_until(
        lambda: sum(len(each._readings) for each in processes_of(remote)) >= count,
        "an agent reads",
        LONG,
    )


def wait_for_rows(pool: BlockPool, fetching: Fetching) -> None:
    """Until something has come into a pool that was all zeros, or the fetch is over."""
    layout, field = pool.state.layout, pool.config.fields[0]
    first, size = layout.fields[field.name], pool.config.total_tokens * field.token_bytes
    # One byte of each block: random ones, few of which are zero.
    sample = pool.state.segment.memory[first : first + size : pool.config.block_size * 4096]
    # With hardly a pause: the other rows follow at once.
    while not any(sample) and not fetching.is_over:
        time.sleep(0.0002)
    sample.release()


def assert_quarantine_ends(remote: RemotePool) -> None:
    """Its agents have ended, and with them everything that they kept."""
    wait_until(lambda: remote.stats().quarantined == 0, "nothing is quarantined", LONG)
    wait_until(
        lambda: all(each.is_over or each.is_usable for each in processes_of(remote)),
        "no retired agent is left",
        LONG,
    )


@contextlib.contextmanager
def two_nixl_nodes(
    of: PoolConfig | None = LARGE,
    *,
    connections: int = 2,
    patience: float = 10.0,
    checksum: bool = False,
) -> Iterator[Pair]:
    """A server that offers NIXL, and a reader that uses it."""
    with (
        two_pools(of) as (here, there),
        NodeServer(there, ("127.0.0.1", 0), key=KEY, patience=patience, nixl=True) as server,
        RemotePool(
            here,
            server.address,
            key=KEY,
            connections=connections,
            patience=patience,
            checksum=checksum,
            engine="nixl",
        ) as remote,
    ):
        yield Pair(here, there, server, remote)


def warm_up(pair: Pair, rng: random.Random) -> None:
    """One fetch, so that the agents are there and know each other."""
    published = publish(pair.there, 1, rng)
    assert_arrived(pair.here, pair.remote.fetch(published.handle, timeout=LONG), published)
