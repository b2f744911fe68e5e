"""The reader's half of NIXL: rows are read by an agent process, into blocks of the own pool.

     1  an agent process          one per `RemotePool`; it is started when there is none to use
     2  Read  ---->               the server opens a lease, and says where its agent has the rows
     3  <---- Granted
     4  a writer's lease          on the blocks here, until nothing can come into them any more
     5  the agent reads           this end says `StillReading` meanwhile, and looks at the clock
     6  Commit  ---->             the server looks whether its lease is still open
     7  <---- Sent                as after rows over the stream; then published, and Done

A read that does not end by DONE (a deadline, a lost connection, a dead agent, a cancellation) is
given up at once. Its blocks stay in quarantine until its agent process has ended
(`agent_process.py`); the next fetch starts another one, which takes half a second.

The state of a read is NIXL's word, and only DONE is believed. That the server still held the lease
then is the server's word.
"""

from __future__ import annotations

import contextlib
import math
import os
import ssl
import threading
import time
import weakref

from shmblocks._os.wait import seconds_left
from shmblocks._state.counters import Counter
from shmblocks.errors import PeerDiedError, ShmBlocksError
from shmblocks.handle import BlockHandle
from shmblocks.nodes import nixl_agent
from shmblocks.nodes.agent_messages import Rows
from shmblocks.nodes.agent_process import AgentProcess, AgentRead, RetiredError
from shmblocks.nodes.attempt import Attempt
from shmblocks.nodes.devices import device_of
from shmblocks.nodes.messages import Granted, Sent, StillReading
from shmblocks.nodes.nixl_fields import fields_of, require_fields
from shmblocks.nodes.stream import ConnectionLostError, DeadlinePassedError, Stream
from shmblocks.pool import BlockPool

# Seconds between two looks at the clock and at the connection while an agent works. Smaller: more
# CPU. Larger: a server that is lost, or a cancellation, is noticed later.
LOOK = 0.02
# The server's patience is divided by this: so often it hears that the read goes on.
_TOLD_PER_PATIENCE = 4


# How rows may come.
ENGINES = ("tcp", "nixl")


def is_nixl(engine: str, tls: ssl.SSLContext | None) -> bool:
    """Whether it is NIXL; ValueError for no engine, and where it would break what TLS promises."""
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
    if engine == "nixl" and tls is not None:
        raise ValueError("engine 'nixl': rows would cross as they are; leave out `tls`, or it")
    return engine == "nixl"


class NixlReads:
    """Reads of one `RemotePool`; owns its agent processes: the one in use, and those that end."""

    def __init__(self, pool: BlockPool, peer: str, patience: float) -> None:
        """`pool` is where rows land, in host memory; `peer` names the node in messages."""
        nixl_agent.require_nixl()
        require_fields(pool)
        self._pool = pool
        self._peer = peer
        self._patience = patience
        self._start()
        _living.add(self)

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._processes: list[AgentProcess] = []
        self._is_closed = False

    @property
    def quarantined_blocks(self) -> int:
        """Blocks here that something may still come into, though their fetches have failed."""
        return sum(process.quarantined_blocks for process in list(self._processes))

    @property
    def agent_pid(self) -> int | None:
        """The process of the agent in use, if there is one."""
        return next((each.pid for each in self._processes if each.is_usable), None)

    # ---- agents ------------------------------------------------------------------------------

    def prepare(self, attempt: Attempt, stream: Stream, interval: float = math.inf) -> AgentProcess:
        """An agent that is ready, so that the other node's lease need not wait for one.

        `interval`: seconds after which the server is told again that somebody reads.
        """
        attempt.waits_for = "its NIXL agent to start"
        while True:
            process = self._usable(stream)
            _wait(process.ready, attempt, stream, interval)
            if not process.problem:
                return process
            if not process.metadata:
                raise PeerDiedError(
                    f"node {self._peer}: the NIXL agent of this process does not start: "
                    f"{process.problem}"
                )
            # It was there, and has died since: another one.

    def _usable(self, stream: Stream) -> AgentProcess:
        with self._lock:
            if self._is_closed:
                raise ConnectionLostError("closed in this process")
            self._processes = [each for each in self._processes if not each.is_over]
            for process in self._processes:
                if process.is_usable:
                    return process
            device = device_of(stream.local_host)
            process = AgentProcess(
                nixl_agent.CLASS,
                [fields_of(self._pool, is_written=True)],
                nixl_agent.environment(self._patience, device),
                self._note_quarantined,
            )
            self._processes.append(process)
            return process

    def _note_quarantined(self, blocks: int) -> None:
        with contextlib.suppress(ShmBlocksError):
            self._pool.peer_state.count(Counter.NODE_QUARANTINED, blocks)

    # ---- reads -------------------------------------------------------------------------------

    def read(
        self,
        attempt: Attempt,
        stream: Stream,
        granted: Granted,
        landing: BlockHandle,
        first_token: int,
        num_tokens: int,
    ) -> None:
        """Read what was granted into tokens of a reservation; nothing comes late when it returns.

        When it raises, the blocks are in quarantine, and may be freed as any.
        """
        rows = self._rows(granted, landing, first_token, num_tokens)
        # How often the server is told, in seconds.
        interval = min(max(granted.patience_ms / 1000 / _TOLD_PER_PATIENCE, LOOK), 60.0)
        reading = self._try(attempt, stream, granted, landing, rows, interval)
        if reading.problem and not reading.was_begun:
            # The agent's connection was lost while nobody used it, which shows now. Another agent
            # makes another one, as soon as nothing can come by this one any more.
            _wait(reading.released, attempt, stream, interval)
            reading = self._try(attempt, stream, granted, landing, rows, interval)
        if reading.lost_agent:
            raise PeerDiedError(
                f"node {self._peer}: the NIXL agent of this process {reading.problem} while it "
                "read: fetch again, another one is started"
            )
        if reading.problem:
            raise ConnectionLostError(reading.problem)

    def _try(
        self,
        attempt: Attempt,
        stream: Stream,
        granted: Granted,
        landing: BlockHandle,
        rows: list[Rows],
        interval: float,
    ) -> AgentRead:
        """A read that is over, somehow."""
        blocks = self._pool.config.blocks_for(landing.num_tokens)
        reading = AgentRead(self._pool.open_for_write(landing), blocks)
        try:
            while reading.process is None:
                process = self.prepare(attempt, stream, interval)
                with contextlib.suppress(RetiredError):
                    process.begin(reading, granted.metadata, rows)
            attempt.waits_for = "its rows, which the NIXL agent reads"
            _wait(reading.over, attempt, stream, interval)
        except BaseException:
            reading.give_up()
            raise
        return reading

    def _rows(
        self, granted: Granted, landing: BlockHandle, first_token: int, num_tokens: int
    ) -> list[Rows]:
        """Where the rows of each field come from, and go to; lengths are ours."""
        config, layout = self._pool.config, self._pool.state.layout
        if len(granted.addresses) != len(config.fields):
            raise ConnectionLostError(
                f"it granted {len(granted.addresses)} fields of {len(config.fields)}"
            )
        base = min(layout.fields.values())
        token = landing.start_block * config.block_size + first_token
        return [
            Rows(
                layout.fields[field.name] - base + token * field.token_bytes,
                address,
                num_tokens * field.token_bytes,
            )
            for field, address in zip(config.fields, granted.addresses, strict=True)
        ]

    # ---- the end -----------------------------------------------------------------------------

    def close(self) -> None:
        """End all agents, and wait for that: nothing is quarantined any more. Idempotent."""
        with self._lock:
            self._is_closed = True
            processes, self._processes = self._processes, []
        for process in processes:
            process.retire()
        for process in processes:
            process.close()

    def forget_parent(self) -> None:
        """In a forked child: the agents are the parent's; this process starts its own."""
        is_closed = self._is_closed
        self._start()
        self._is_closed = is_closed


def _wait(
    event: threading.Event, attempt: Attempt, stream: Stream, interval: float = math.inf
) -> None:
    """Until the event, the attempt's deadline, or the end of the connection.

    Each `interval` seconds the server is told that somebody still reads.
    """
    told = time.monotonic()
    while not event.wait(min(LOOK, max(0.0, seconds_left(attempt.deadline)))):
        if seconds_left(attempt.deadline) <= 0:
            raise DeadlinePassedError
        if not stream.is_quiet:
            # Nothing was asked: it says how the connection has ended.
            stream.receive(attempt.deadline, Sent)
            raise ConnectionLostError("it answered something that was not asked")
        now = time.monotonic()
        if now - told >= interval:
            told = now
            stream.send(StillReading(attempt.rid), attempt.deadline)


# Of this process, for the fork handler.
_living: weakref.WeakSet[NixlReads] = weakref.WeakSet()


def _forget_all() -> None:
    for reads in list(_living):
        reads.forget_parent()


os.register_at_fork(after_in_child=_forget_all)
