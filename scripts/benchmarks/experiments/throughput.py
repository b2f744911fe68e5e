"""One producer, one to eight consumers that share a queue: messages a second.

The producer hands over tensors as fast as they are taken; each consumer takes one, reads a value
of it, and gives it back. To compare every byte would measure the comparing; so each transport first
has a turn that is not timed, in which every message is filled anew and every byte of it compared.
"""

from __future__ import annotations

import time
from functools import partial

from benchmarks.payload import Pattern
from benchmarks.report import Done, Experiment, Turn
from benchmarks.settings import Settings
from benchmarks.transport import Connect, Ends
from benchmarks.transports import shmblocks_pool, standard
from benchmarks.transports.shmblocks_pool import QUEUE_LENGTH, handle_queue
from benchmarks.workers import Make, Workers, fresh_processes

# Messages for each consumer in the turn that is compared.
CHECKED = 3
# Seconds. A turn that is over sooner is made again, with so many times more messages.
SHORTEST = 0.3
MORE = 20

_queue = partial(handle_queue, True)
TRANSPORTS: dict[str, Connect] = {
    "shmblocks, in place": partial(shmblocks_pool.connect, True, _queue),
    "shmblocks, with copy": partial(shmblocks_pool.connect, False, _queue),
    "torch Queue": partial(standard.connect_torch_queue, "file_descriptor"),
    "SharedMemory per message": partial(standard.connect_shared_memory, _queue),
}


def throughput(consumers: tuple[int, ...], tokens: int, hidden: int, messages: int) -> Experiment:
    """`messages` of [tokens, hidden] bf16 through each transport, shared by so many consumers."""
    # As many payloads as lie in the queue, and one that each consumer reads.
    depth = QUEUE_LENGTH + max(consumers)
    settings = Settings(tokens=(tokens,), hidden=hidden, depth=depth)
    rows, numbers = [], {}
    for name, connect in TRANSPORTS.items():
        rates = {count: _rate(connect, settings, count, messages) for count in consumers}
        rows.append([name, *(f"{rate:,.0f}" for rate in rates.values())])
        for count, rate in rates.items():
            numbers[f"{name}, {count} consumers, messages a second"] = rate
    return Experiment(
        name="throughput",
        title=f"Messages a second, {tokens:,} x {hidden} x bf16, by consumers of one queue",
        note="One producer; every message goes to one of the consumers. pyzmq is left out, since "
        "PUSH deals messages out in turn, whoever is free; so is iceoryx2: its streams stalled in "
        "some runs, for a reason that is not understood.",
        header=["", *(str(count) for count in consumers)],
        rows=rows,
        numbers=numbers,
    )


def _rate(connect: Connect, settings: Settings, consumers: int, messages: int) -> float:
    """Messages a second."""
    context = fresh_processes()
    with connect(context, settings) as ends:
        roles: list[tuple[str, Make]] = [
            (f"consumer {number}", partial(Taker, ends, settings)) for number in range(consumers)
        ]
        roles.append(("producer", partial(Giver, ends, settings)))
        with Workers(context, roles) as workers:
            workers.wait_ready()
            _turn(workers, settings, consumers, CHECKED * consumers, checks=True)
            rate = _turn(workers, settings, consumers, messages)
            if messages / rate < SHORTEST:
                rate = _turn(workers, settings, consumers, MORE * messages)
            return rate


def _turn(
    workers: Workers, settings: Settings, consumers: int, messages: int, checks: bool = False
) -> float:
    size = settings.most_tokens
    shares = [
        Turn(messages // consumers + (number < messages % consumers), size, checks=checks)
        for number in range(consumers)
    ]
    *taken, given = workers.turn(*shares, Turn(messages, size, checks=checks))
    took = max(one.ended_ns for one in taken) - given.began_ns
    return messages / took * 1e9


class Giver:
    """The producer."""

    def __init__(self, ends: Ends, settings: Settings) -> None:
        self._sender = ends.sender()
        self.close = self._sender.close
        self._pattern = Pattern(settings.hidden, settings.seed)

    def turn(self, turn: Turn) -> Done:
        began = time.monotonic_ns()
        for _ in range(turn.count):
            outgoing = self._sender.begin(turn.size)
            if turn.checks and outgoing.payload is not None:
                self._pattern.fill(outgoing.payload, turn.first)
            outgoing.send()
        return Done(began_ns=began)


class Taker:
    """One of the consumers."""

    def __init__(self, ends: Ends, settings: Settings) -> None:
        self._receiver = ends.receiver()
        self.close = self._receiver.close
        self._pattern = Pattern(settings.hidden, settings.seed)

    def turn(self, turn: Turn) -> Done:
        for _ in range(turn.count):
            incoming = self._receiver.receive()
            tensor = incoming.tensor
            if tensor is None:
                raise TypeError("expected a transport with data")
            if turn.checks:
                self._pattern.check(tensor, turn.first, turn.size)
            tensor[-1, -1].item()
            del tensor  # or what it lies in could not be given back
            incoming.release()
        return Done(ended_ns=time.monotonic_ns())
