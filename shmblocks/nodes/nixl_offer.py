"""The server's half of NIXL: an agent process that has the fields of the served pools.

It is asked for nothing: agents of readers read its memory. It has the pools' fields mapped to read
only (over TCP), so that a peer that writes kills it, and changes nothing. When it has died, the
next question starts another one, of another name; readers get the new metadata with their grant.

What it does not do: know what is read. A lease is held by the server meanwhile (`service.py`).
"""

from __future__ import annotations

import os
import threading
import weakref

from shmblocks.errors import IncompatibleConfigError, PeerDiedError
from shmblocks.lease import Lease
from shmblocks.nodes import nixl_agent
from shmblocks.nodes.agent_process import AgentProcess
from shmblocks.nodes.messages import MAX_METADATA_BYTES, Granted, Read
from shmblocks.nodes.nixl_fields import fields_of, require_fields
from shmblocks.nodes.rows import AUX
from shmblocks.pool import BlockPool

# Seconds that an agent may take to start. Shorter: on a busy machine a server has no NIXL. Longer:
# readers wait for one that hangs.
STARTING_PATIENCE = 30.0


class NixlOffer:
    """Owns the agent process of one server."""

    def __init__(self, pools: list[BlockPool], device: str | None, patience: float) -> None:
        """Starts it; `device`: the network interface that it listens on (None: all).

        Raises `ImportError` without NIXL, ValueError, `PeerDiedError` when it does not start.
        """
        nixl_agent.require_nixl()
        for pool in pools:
            require_fields(pool)
        self._pools = pools
        self._device = device
        self._patience = patience
        self._lock = threading.Lock()
        self._is_closed = False
        self._process: AgentProcess | None = None
        _living.add(self)
        try:
            self._ready()
        except BaseException:
            self.close()
            raise

    @property
    def agent_pid(self) -> int | None:
        """The process of the agent, while there is one."""
        process = self._process
        return process.pid if process is not None and process.is_usable else None

    def grant(self, read: Read, pool: BlockPool, lease: Lease) -> Granted:
        """What a reader needs to read from this lease's allocation."""
        process = self._ready()
        layout, config = pool.state.layout, pool.config
        base = process.addresses[self._pools.index(pool)] - min(layout.fields.values())
        token = lease.handle.start_block * config.block_size + read.first_token
        return Granted(
            read.rid,
            lease.handle.num_tokens,
            bytes(lease.memory(AUX)),
            int(self._patience * 1000),
            process.metadata,
            tuple(
                base + layout.fields[field.name] + token * field.token_bytes
                for field in config.fields
            ),
        )

    def _ready(self) -> AgentProcess:
        """The agent process, which is started when there is none."""
        with self._lock:
            if self._is_closed:
                raise PeerDiedError("the node server is closed")
            if self._process is None or not self._process.is_usable:
                self._process = AgentProcess(
                    nixl_agent.CLASS,
                    [fields_of(pool, is_written=False) for pool in self._pools],
                    nixl_agent.environment(self._patience, self._device),
                )
            process = self._process
        if not process.ready.wait(STARTING_PATIENCE):
            raise PeerDiedError(f"the server's NIXL agent is not there in {STARTING_PATIENCE:g} s")
        if process.problem:
            raise PeerDiedError(f"the server has no NIXL agent: {process.problem}")
        if len(process.metadata) > MAX_METADATA_BYTES:
            raise IncompatibleConfigError(
                f"the server's NIXL agent has {len(process.metadata)} bytes of metadata, more than "
                f"{MAX_METADATA_BYTES}: give it fewer devices (UCX_NET_DEVICES)"
            )
        return process

    def close(self) -> None:
        """End the agent; reads that go on fail. Idempotent."""
        with self._lock:
            self._is_closed = True
            process, self._process = self._process, None
        if process is not None:
            process.close()

    def forget_parent(self) -> None:
        """In a forked child: the agent is the parent's."""
        self._lock = threading.Lock()
        self._is_closed = True
        self._process = None


# Of this process, for the fork handler.
_living: weakref.WeakSet[NixlOffer] = weakref.WeakSet()


def _forget_all() -> None:
    for offer in list(_living):
        offer.forget_parent()


os.register_at_fork(after_in_child=_forget_all)
