"""shmblocks: a payload in a pool, announced by a channel of that pool.

The shortest way: `send` publishes and announces, `receive` takes and opens. With the compiled core,
or by the Python alone in both processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from benchmarks.settings import Settings
from benchmarks.transport import (
    Context,
    Ends,
    Incoming,
    Outgoing,
    Receiver,
    Sender,
    copying_sender,
    unique_name,
)
from benchmarks.transports.shmblocks_pool import FIELD, allocate, pool_config
from shmblocks import BlockPool

if TYPE_CHECKING:
    from shmblocks import Channel

# Seconds; `shmblocks._os.wait` has it, and older versions, beside which this may run, elsewhere.
LONGEST_SPIN = 500e-6

CHANNEL = "bench"


def attach(name: str, role: str, spins: bool, has_core: bool) -> tuple[BlockPool, Channel]:
    """The pool and its channel in one of the two processes."""
    if not has_core:
        from shmblocks import _core

        _core.switch_off("measured without")
    pool = BlockPool.attach(name, prefault="now", role=role)
    return pool, pool.channel(CHANNEL, 8, spin=LONGEST_SPIN if spins else 0.0)


def sender(name: str, hidden: int, in_place: bool, spins: bool, has_core: bool) -> Sender:
    pool, channel = attach(name, "producer", spins, has_core)

    def begin(tokens: int) -> Outgoing:
        handle = allocate(pool, tokens)
        return Outgoing(pool.view(handle)[FIELD], partial(channel.send, handle))

    def copy(payload: Tensor) -> None:
        handle = allocate(pool, len(payload))
        pool.view(handle)[FIELD].copy_(payload)
        channel.send(handle)

    return Sender(begin, pool.close) if in_place else copying_sender(copy, pool.close, hidden)


def receiver(name: str, spins: bool, has_core: bool) -> Receiver:
    pool, channel = attach(name, "consumer", spins, has_core)

    def receive() -> Incoming:
        lease = channel.receive()
        return Incoming(lease[FIELD], lease.release)

    return Receiver(receive, pool.close)


@contextmanager
def connect(
    in_place: bool, spins: bool, has_core: bool, context: Context, settings: Settings
) -> Iterator[Ends]:
    name = unique_name("channel")
    with BlockPool.create(name, pool_config(settings), prefault="now"):
        yield Ends(
            partial(sender, name, settings.hidden, in_place, spins, has_core),
            partial(receiver, name, spins, has_core),
        )
