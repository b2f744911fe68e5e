"""`AgentProcess`: an agent in a process of its own, as this process sees it.

    starting  --Ready-->  ready  --retire, or a read without DONE-->  retired  -->  over
        \\----------------------- its process has ended ------------------------------/

A read has a writer's lease on the blocks that it lands in, from before it is posted until nothing
can come into them any more:

    its agent said DONE         the lease ends at once
    anything else (an error, a  the blocks are *quarantined*: the lease stays. The agent is retired:
    deadline, somebody gave it  it begins no other read, and when those that go on have ended its
    up)                         process ends. The lease ends when the kernel says that it has.

That is all that can be done: NIXL cannot take a read back, and one that was released goes on
writing. Who owns the blocks may free them meanwhile: they drain, and are given to nobody.

Contract
- An agent is destroyed with its process, and only so: `waitpid` is the proof that nobody writes.
- The process inherits a description that says so to others (`open_for_writer`): when this process
  dies first, what it holds goes to nobody before the agent's process has gone too.
- `begin` never waits for the agent. `over` of a read, and `ready`, are set whatever happens.
- A forked child has no agent process; its parent's goes on.

What it does not do: know NIXL, nodes, or deadlines.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from shmblocks.errors import ShmBlocksError
from shmblocks.lease import Lease
from shmblocks.nodes.agent_messages import (
    MAX_BYTES,
    Begin,
    Ended,
    Ready,
    Region,
    Rows,
    Setup,
    pack,
    unpack_answer,
)

# Seconds that an agent process may take to end by itself, before it is killed. Smaller: it takes no
# leave of others, who may have to find that out. Larger: quarantined blocks come back later.
ENDING_PATIENCE = 3.0
# Seconds that closing waits for it: only a process that is stuck in the kernel takes longer.
CLOSING_PATIENCE = 10.0

# The child finds this package where it is, also when only this process's `sys.path` leads there.
_ROOT = str(Path(__file__).resolve().parents[2])
_START = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from shmblocks.nodes.agent_program import main; main(int(sys.argv[2]))"
)

_log = logging.getLogger("shmblocks")


class Fields(NamedTuple):
    """The fields of one pool: `size` bytes from byte `start` of a file, which is closed once the
    agent process has it."""

    file: io.FileIO
    start: int
    size: int
    is_writable: bool


class RetiredError(Exception):
    """The agent begins no read any more: take another one."""


class AgentRead:
    """One read. `over` is set when it has ended, with `problem` empty when all rows are here;
    `released` when nothing comes into its blocks any more."""

    def __init__(self, lease: Lease, blocks: int) -> None:
        """Takes over a writer's lease on so many blocks: where the rows are to land."""
        # That has begun it.
        self.process: AgentProcess | None = None
        self.over = threading.Event()
        self.released = threading.Event()
        self.problem = ""
        # Whether the agent has begun to read, as far as is known.
        self.was_begun = True
        # Whether it ended because its agent process did.
        self.lost_agent = False
        self.blocks = blocks
        self.is_quarantined = False
        self._lease = lease

    def give_up(self) -> None:
        """Nobody waits for it any more. Its blocks come back when nothing comes into them."""
        if self.process is None:
            self.release()
        else:
            self.process.give_up(self)

    def release(self) -> None:
        """Nothing comes into its blocks any more."""
        try:
            self._lease.release()
        except ShmBlocksError as error:
            _log.warning("%s: %s (it ends with its pool)", self._lease, str(error))
        self.released.set()


class AgentProcess:
    """Owns one agent process, the socket to it, a thread, and the leases of its reads."""

    def __init__(
        self,
        agent: str,
        fields: Sequence[Fields],
        environment: Mapping[str, str],
        note_quarantined: Callable[[int], object] | None = None,
    ) -> None:
        """Starts it, and does not wait for it.

        agent             `module:Class` of an `Agent` (agent_program.py)
        fields            what it may touch; rows land in the first. Taken over
        note_quarantined  is told how many blocks, each time
        """
        self._note_quarantined = note_quarantined
        self.ready = threading.Event()
        # Why there is no agent; empty while there may be one.
        self.problem = ""
        self.metadata = b""
        self.addresses: tuple[int, ...] = ()
        self._is_retired = False
        self._is_over = False
        self._numbers = itertools.count(1)
        self._readings: dict[int, AgentRead] = {}
        self._lock = threading.Lock()
        # Unique: a peer that met another agent of the same name refuses this one's metadata.
        setup_name = f"shmblocks-{os.getpid()}-{secrets.token_hex(8)}"
        with contextlib.ExitStack() as stack:
            for each in fields:
                stack.callback(each.file.close)
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.callback(theirs.close)
            self._socket = ours
            undo = stack.enter_context(contextlib.ExitStack())
            undo.callback(ours.close)
            regions = tuple(
                Region(each.file.fileno(), each.start, each.size, each.is_writable)
                for each in fields
            )
            ours.send(pack(Setup(agent, setup_name, regions)))
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, _ROOT, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                # NIXL's Python part logs there.
                stdout=subprocess.DEVNULL,
                env=environment,
                pass_fds=[theirs.fileno(), *(each.file.fileno() for each in fields)],
                # A Ctrl-C is for this process, which then ends the other in order.
                start_new_session=True,
            )
            _living.add(self)
            self._thread: threading.Thread | None = threading.Thread(
                target=self._listen, name="shmblocks-agent", daemon=True
            )
            undo.callback(self._process.wait)
            undo.callback(self._process.kill)
            self._thread.start()
            undo.pop_all()

    # ---- what it is --------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """Of the agent process."""
        return self._process.pid

    @property
    def is_usable(self) -> bool:
        """Whether it may still begin reads: it starts, or is ready."""
        return not self._is_retired and not self._is_over

    @property
    def is_over(self) -> bool:
        """Whether its process has ended, and all that was kept for it is given back."""
        return self._thread is None or not self._thread.is_alive()

    @property
    def quarantined_blocks(self) -> int:
        """Blocks that something may still come into, though their reads are over."""
        with self._lock:
            return sum(each.blocks for each in self._readings.values() if each.is_quarantined)

    # ---- reads -------------------------------------------------------------------------------

    def begin(self, reading: AgentRead, metadata: bytes, rows: Sequence[Rows]) -> None:
        """Begin to read from the agent of that metadata. Raises `RetiredError`."""
        with self._lock:
            if not self.is_usable:
                raise RetiredError
            number = next(self._numbers)
            self._readings[number] = reading
            # Behind the other: interrupted between the two, nothing was posted, and its owner
            # releases it.
            reading.process = self
        # An agent process that has just died is told by the end of its socket.
        with contextlib.suppress(OSError):
            self._socket.send(pack(Begin(number, metadata, tuple(rows))))

    def give_up(self, reading: AgentRead) -> None:
        """`AgentRead.give_up`, of one that was begun here."""
        with self._lock:
            if reading.over.is_set() and not reading.problem:
                return
            blocks = self._quarantine(reading, "given up")
        self._count(blocks)
        self._end_if_idle()

    def retire(self) -> None:
        """Begin nothing more, and end when the reads that go on have ended."""
        with self._lock:
            self._is_retired = True
        self._end_if_idle()

    def _quarantine(self, reading: AgentRead, problem: str) -> int:
        """Under the lock: keep its blocks until the process has ended; how many that are now."""
        self._is_retired = True
        reading.problem = reading.problem or problem
        if reading.is_quarantined or self._is_over:
            return 0
        reading.is_quarantined = True
        return reading.blocks

    def _count(self, quarantined: int) -> None:
        if quarantined and self._note_quarantined is not None:
            self._note_quarantined(quarantined)

    def _end_if_idle(self) -> None:
        with self._lock:
            goes_on = any(
                not each.is_quarantined and not each.released.is_set()
                for each in self._readings.values()
            )
            if self._is_over or not self._is_retired or goes_on:
                return
        self._hang_up()

    def _hang_up(self) -> None:
        """Both ends see the end of the socket: the agent process ends, the thread waits for it."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    # ---- the thread --------------------------------------------------------------------------

    def _listen(self) -> None:
        try:
            while data := self._receive():
                self._hear(unpack_answer(data))
        except msgspec.DecodeError as error:
            # Whoever reaches the agent can write over it.
            _log.warning("agent process %d says what none says: %s", self.pid, str(error))
        finally:
            self._hang_up()
            self._bury()

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(MAX_BYTES)
        except OSError:
            return b""

    def _hear(self, answer: Ready | Ended) -> None:
        if isinstance(answer, Ready):
            self.metadata, self.addresses = answer.metadata, answer.addresses
            self.ready.set()
        elif not answer.number:
            self.problem = answer.problem
        elif answer.problem:
            self._fail(answer)
        else:
            self._complete(answer.number)
        self._end_if_idle()

    def _complete(self, number: int) -> None:
        with self._lock:
            reading = self._readings.pop(number, None)
        if reading is not None:
            reading.release()
            reading.over.set()

    def _fail(self, answer: Ended) -> None:
        with self._lock:
            reading = self._readings.get(answer.number)
            if reading is None:
                return
            reading.was_begun = answer.was_begun
            blocks = self._quarantine(reading, answer.problem)
        self._count(blocks)
        reading.over.set()

    def _bury(self) -> None:
        """Wait for the end of the process, and give back what was kept for it."""
        code = self._wait()
        ending = f"ended with code {code}" if code >= 0 else f"was killed by {_signal_name(-code)}"
        ending = f"(pid {self.pid}) {ending}"
        with self._lock:
            self._is_over = True
            readings, self._readings = list(self._readings.values()), {}
            self.problem = self.problem or f"it {ending}"
        for reading in readings:
            reading.release()
            if not reading.over.is_set():
                reading.problem = reading.problem or ending
                reading.lost_agent = not reading.is_quarantined
                reading.over.set()
        self.ready.set()
        self._socket.close()

    def _wait(self) -> int:
        try:
            return self._process.wait(ENDING_PATIENCE)
        except subprocess.TimeoutExpired:
            # Also one that is stopped.
            self._process.kill()
            return self._process.wait()

    # ---- the end -----------------------------------------------------------------------------

    def close(self) -> None:
        """End it, whatever it does, and wait for that. Idempotent."""
        with self._lock:
            self._is_retired = True
        self._hang_up()
        # The collector may run in that thread, and close what is dropped.
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(CLOSING_PATIENCE)

    def forget_parent(self) -> None:
        """In a forked child: the process is the parent's, and so are the thread and the leases."""
        self._lock = threading.Lock()
        self._thread = None
        self._is_retired = self._is_over = True
        self._readings = {}
        self._socket.close()
        # Not to be waited for here, nor to be warned of.
        self._process.returncode = 0


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# Of this process, for the fork handler.
_living: weakref.WeakSet[AgentProcess] = weakref.WeakSet()


def _forget_all() -> None:
    for process in list(_living):
        process.forget_parent()


os.register_at_fork(after_in_child=_forget_all)
