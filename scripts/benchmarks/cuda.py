"""`scripts/bench --device cuda`: what a handoff of embeddings on a GPU costs.

One payload of 2000 x 3584 bf16, two processes. A handoff is timed from the producer's first call to
the moment at which the consumer has a tensor to give to a kernel; both read the same clock. Twice:

- back to back, as under load: the producer, which has other work then, does not sleep while it
  waits for the consumer to be done; the consumer waits as the carrier does (*awake*: it spins)
- after two milliseconds in which the producer slept, and the consumer if it does not spin, when
  processors have to be woken and caches filled

What a call keeps the host is taken in one process too, back to back and after sleep, and beside it,
as a yardstick, what torch needs to slice a tensor in host memory.

- *pool, in place*    the encoder wrote into the pool's blocks (not timed): publish, carry, open
- *pool, with copy*   the data lies in a tensor of the producer's own: alloc, copy, publish, carry,
                      open
- *torch queue*       `torch.multiprocessing.Queue` carries a new CUDA tensor each time
- *d2d copy*          floor: one copy of the payload on the GPU, waited for
- *bare wake*         floor: the carrier with a message of 40 bytes and nothing else

Every payload is checked in the consumer after the clock was read; a wrong one ends the run.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.queues import Queue
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.multiprocessing

from benchmarks.report import quantile
from shmblocks import BlockHandle, BlockPool, Field, HandleQueue, PoolConfig

T = TypeVar("T")

TOKENS = 2000
HIDDEN = 3584
FIELD = "input_embeddings"
PATIENCE = 120.0
IDLE_SECONDS = {"": 0.0, ", after 2 ms of sleep": 0.002}
# Longer than the longest pause between two handoffs.
AWAKE_SPIN = 0.01
# So often each way has its turn: the machine is not the same from one second to the next.
TURNS = 5
CARRIERS = ("HandleQueue, awake", "HandleQueue", "Pipe")
# Times of one way: microseconds, smallest first when shown.
Times = dict[str, list[float]]


class WrongBytesError(Exception):
    """The consumer did not get what the producer wrote."""


class Carrier(Protocol):
    """Carries encoded handles one way."""

    def send_bytes(self, data: bytes) -> None: ...

    def recv_bytes(self) -> bytes: ...


class QueueCarrier:
    """A `HandleQueue` by its name."""

    def __init__(self, queue: HandleQueue[bytes]) -> None:
        self._queue = queue

    def send_bytes(self, data: bytes) -> None:
        self._queue.put(data)

    def recv_bytes(self) -> bytes:
        return self._queue.get(timeout=PATIENCE)


class Names(NamedTuple):
    """What both processes meet by."""

    pool: str
    queue: str


def pool_config() -> PoolConfig:
    return PoolConfig(total_tokens=64 * 128, fields=(Field(FIELD, (HIDDEN,), "bf16"),))


@contextlib.contextmanager
def carriers(names: Names, pipe: Connection) -> Iterator[dict[str, Carrier]]:
    """Of one side; the queue is there already."""
    with (
        contextlib.closing(HandleQueue.attach(names.queue)) as queue,
        contextlib.closing(HandleQueue.attach(names.queue, spin=AWAKE_SPIN)) as awake,
    ):
        ways = (QueueCarrier(awake), QueueCarrier(queue), pipe)
        yield dict(zip(CARRIERS, ways, strict=True))


def check(tensor: torch.Tensor, seed: int) -> None:
    if not bool((tensor == seed % 128).all()):
        raise WrongBytesError(f"handoff {seed}: expected {seed % 128} everywhere")


# --- the consumer -----------------------------------------------------------------------------


def consume(
    names: Names,
    handles: Connection,
    tensors: Queue[torch.Tensor],
    back: Connection,
    plan: list[tuple[str, str, int]],
) -> None:
    """The other process: receives as planned, tells when it had what."""
    torch.zeros(1, device="cuda")
    with (
        BlockPool.attach(names.pool, prefault="now", role="consumer") as pool,
        carriers(names, handles) as ways,
    ):
        back.send("ready")
        for way, carrier, rounds in plan:
            for seed in range(rounds):
                back.send(_receive(way, ways.get(carrier), tensors, pool, seed))
        torch.cuda.synchronize()
        back.recv()


def _receive(
    way: str,
    carrier: Carrier | None,
    tensors: Queue[torch.Tensor],
    pool: BlockPool,
    seed: int,
) -> tuple[int, int]:
    """When the tensor was there, and how long `open` took; nanoseconds."""
    if carrier is None:
        tensor = tensors.get(timeout=PATIENCE)
        there = time.monotonic_ns()
        check(tensor, seed)
        return there, 0
    data = carrier.recv_bytes()
    if way == "bare wake":
        return time.monotonic_ns(), 0
    handle = BlockHandle.decode(data)
    before = time.monotonic_ns()
    lease = pool.open(handle)
    opened = time.monotonic_ns()
    tensor = lease[FIELD]
    there = time.monotonic_ns()
    check(tensor, seed)
    del tensor
    lease.release()
    torch.cuda.synchronize()
    return there, opened - before


# --- the producer -----------------------------------------------------------------------------


class Turn(NamedTuple):
    """Microseconds, of each handoff and of the host's time in it."""

    handoff_us: list[float]
    publish_us: list[float]
    open_us: list[float]


class Producer:
    """Sends as planned, and takes the time."""

    def __init__(
        self,
        pool: BlockPool,
        ways: dict[str, Carrier],
        tensors: Queue[torch.Tensor],
        back: Connection,
    ) -> None:
        self._pool = pool
        self._ways = ways
        self._tensors = tensors
        self._back = back
        self._own = torch.empty(TOKENS, HIDDEN, dtype=torch.bfloat16, device="cuda")
        self._publish_us: list[float] = []

    def run(self, way: str, carrier: str, rounds: int, idle: float) -> Turn:
        """So many handoffs."""
        send = {
            "bare wake": self._wake,
            "pool, in place": self._in_place,
            "pool, with copy": self._with_copy,
            "torch queue": self._tensor,
        }[way]
        turn = Turn([], [], [])
        self._publish_us = turn.publish_us
        for seed in range(rounds):
            if idle:
                time.sleep(idle)
            begun = send(self._ways.get(carrier), seed)
            there, opening = self._answer(is_busy=not idle)
            turn.handoff_us.append((there - begun) / 1e3)
            if opening:
                turn.open_us.append(opening / 1e3)
            torch.cuda.synchronize()
        return turn

    def _answer(self, is_busy: bool) -> tuple[int, int]:
        deadline = time.monotonic() + PATIENCE
        while not self._back.poll(0 if is_busy else PATIENCE):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the consumer said nothing for {PATIENCE} s")
        there, opening = self._back.recv()
        return there, opening

    def _wake(self, carrier: Carrier | None, seed: int) -> int:
        begun = time.monotonic_ns()
        if carrier is not None:
            carrier.send_bytes(bytes(40))
        return begun

    def _in_place(self, carrier: Carrier | None, seed: int) -> int:
        handle = self._alloc()
        self._pool.view(handle)[FIELD].fill_(seed % 128)
        torch.cuda.synchronize()
        begun = time.monotonic_ns()
        self._publish(handle, carrier)
        return begun

    def _with_copy(self, carrier: Carrier | None, seed: int) -> int:
        self._own.fill_(seed % 128)
        torch.cuda.synchronize()
        begun = time.monotonic_ns()
        handle = self._alloc()
        self._pool.view(handle)[FIELD].copy_(self._own)
        self._publish(handle, carrier)
        return begun

    def _alloc(self) -> BlockHandle:
        handle = self._pool.alloc(TOKENS, timeout=PATIENCE)
        if handle is None:
            raise TimeoutError(f"no room: {self._pool.stats()}")
        return handle

    def _publish(self, handle: BlockHandle, carrier: Carrier | None) -> None:
        before = time.monotonic_ns()
        handle = self._pool.publish(handle)
        self._publish_us.append((time.monotonic_ns() - before) / 1e3)
        if carrier is not None:
            carrier.send_bytes(handle.encode())

    def _tensor(self, carrier: Carrier | None, seed: int) -> int:
        tensor = torch.empty(TOKENS, HIDDEN, dtype=torch.bfloat16, device="cuda")
        tensor.fill_(seed % 128)
        torch.cuda.synchronize()
        begun = time.monotonic_ns()
        self._tensors.put(tensor)
        return begun


def handoffs(rounds: int) -> dict[str, list[float]]:
    """Name -> microseconds, of every way with every carrier, in turns."""
    context = multiprocessing.get_context("spawn")
    names = Names(f"bench-cuda-{os.getpid()}", f"bench-cuda-q-{os.getpid()}")
    theirs, ours = context.Pipe(duplex=False)
    back, back_theirs = context.Pipe()
    tensors: Queue[torch.Tensor] = torch.multiprocessing.get_context("spawn").Queue()
    ways_and_carriers = [
        (way, carrier)
        for carrier in CARRIERS
        for way in ("bare wake", "pool, in place", "pool, with copy")
    ]
    ways_and_carriers.append(("torch queue", ""))
    each = rounds // TURNS
    plan = [(way, carrier, each) for way, carrier in ways_and_carriers] * TURNS * len(IDLE_SECONDS)
    with (
        BlockPool.create(names.pool, pool_config(), prefault="now", device="cuda") as pool,
        contextlib.closing(HandleQueue.create(names.queue, message_type=None)),
        carriers(names, ours) as ways,
    ):
        child = context.Process(target=consume, args=(names, theirs, tensors, back_theirs, plan))
        child.start()
        producer = Producer(pool, ways, tensors, back)
        if not back.poll(PATIENCE) or back.recv() != "ready":
            raise TimeoutError("the consumer did not start")
        found: dict[str, list[float]] = {}
        skip = each // 10
        for label, idle in IDLE_SECONDS.items():
            for way, carrier in ways_and_carriers * TURNS:
                turn = producer.run(way, carrier, each, idle)
                comma = ", " if carrier else ""
                for what, times in (
                    (way, turn.handoff_us),
                    ("publish, host time", turn.publish_us),
                    ("open, host time", turn.open_us),
                ):
                    if times:
                        name = f"{what}{comma}{carrier}{label}"
                        found.setdefault(name, []).extend(times[skip:])
        back.send("end")
        child.join(PATIENCE)
        if child.exitcode != 0:
            raise ChildProcessError(f"the consumer ended with {child.exitcode}")
    return found


# --- floors and copies ------------------------------------------------------------------------


def device_copy(rounds: int) -> list[float]:
    """Microseconds of one copy of the payload on the GPU, from the call to its end."""
    source = torch.ones(TOKENS, HIDDEN, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    return _timed(copy, rounds)


def host_times(rounds: int, idle: float) -> dict[str, list[float]]:
    """Microseconds that each call keeps the host, in one process that does nothing else.

    `idle`: seconds that it sleeps before each call.
    """
    found: dict[str, list[float]] = {}

    def timed(call: str, function: Callable[..., T], *args: object) -> T:
        if idle:
            time.sleep(idle)
        begun = time.perf_counter_ns()
        result = function(*args)
        found.setdefault(call, []).append((time.perf_counter_ns() - begun) / 1e3)
        return result

    name = f"bench-host-{os.getpid()}"
    rows = torch.zeros(TOKENS, 64)
    with BlockPool.create(name, pool_config(), prefault="now", device="cuda") as pool:
        for seed in range(rounds * 2):
            handle = timed("alloc", pool.alloc, TOKENS, None, False, PATIENCE)
            if handle is None:
                raise TimeoutError("no room")
            pool.view(handle)
            handle = timed("publish", pool.publish, handle)
            lease = timed("open", pool.open, handle)
            timed("release", lease.release)
            timed("a slice by torch", rows.__getitem__, slice(10, 20))
            if idle or seed % 2:
                torch.cuda.synchronize()
    return {call: times[rounds:] for call, times in found.items()}


def _timed(call: Callable[[], None], rounds: int) -> list[float]:
    for _ in range(3):
        call()
    found = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        begun = time.monotonic_ns()
        call()
        torch.cuda.synchronize()
        found.append((time.monotonic_ns() - begun) / 1e3)
    return found


def host_to_device(rounds: int) -> dict[str, float]:
    """GB/s at the median, of one payload and of a large copy, from three kinds of host memory."""
    rates: dict[str, float] = {}
    name = f"bench-pin-{os.getpid()}"
    config = PoolConfig(total_tokens=320 * 128, fields=(Field(FIELD, (HIDDEN,), "bf16"),))
    with BlockPool.create(name, config, prefault="now") as pool:
        handle = pool.alloc(config.total_tokens)
        if handle is None:
            raise TimeoutError("a new pool has no room")
        whole = pool.view(handle)[FIELD].fill_(1)
        rates |= _rates({"pageable": whole}, rounds)
        begun = time.monotonic()
        pool.pin()
        rates["pin(), seconds"] = time.monotonic() - begun
        torchs = torch.ones_like(whole).pin_memory()
        rates |= _rates({"pinned pool": whole, "torch pinned": torchs}, rounds)
        del whole
    return rates


def _rates(sources: dict[str, torch.Tensor], rounds: int) -> dict[str, float]:
    """Of all of them, in turns."""
    found = {}
    for label, tokens in (("14.3 MB", TOKENS), ("294 MB", None)):
        times: dict[str, list[float]] = {kind: [] for kind in sources}
        for _ in range(TURNS):
            for kind, source in sources.items():
                part = source[:tokens]
                target = torch.empty_like(part, device="cuda")

                def copy(target: torch.Tensor = target, part: torch.Tensor = part) -> None:
                    target.copy_(part, non_blocking=True)

                times[kind] += _timed(copy, max(20, rounds // 5 // TURNS))
        for kind, source in sources.items():
            size = source[:tokens].nbytes
            found[f"{kind}, {label}"] = size / quantile(times[kind], 0.5) / 1e3
    return found


# --- what is said of it -----------------------------------------------------------------------


def main(rounds: int, json_file: Path | None) -> int:
    if not torch.cuda.is_available():
        print(f"--device cuda: torch {torch.__version__} finds no GPU")
        return 2
    found = handoffs(rounds)
    for label, idle in IDLE_SECONDS.items():
        for call, times in host_times(rounds, idle).items():
            found[f"{call}, host time, one process{label}"] = times
    found["d2d copy of the payload"] = device_copy(rounds)
    rates = host_to_device(rounds)
    show(found, rates)
    if json_file:
        json_file.write_text(json.dumps({"microseconds": found, "rates": rates}))
    return 0


def show(found: dict[str, list[float]], rates: dict[str, float]) -> None:
    device = torch.cuda.get_device_name(0)
    print(f"{device}, torch {torch.__version__}; {TOKENS} x {HIDDEN} bf16; microseconds")
    for name, times in found.items():
        p50, p99 = quantile(times, 0.5), quantile(times, 0.99)
        print(f"  {name:50} p50 {p50:9.1f}   p99 {p99:9.1f}   n {len(times)}")
    print("host to GPU, GB/s at the median")
    for name, rate in rates.items():
        print(f"  {name:50} {rate:9.3f}")
    for target, is_met, seen in judge(found, rates):
        print(f"  {'met   ' if is_met else 'MISSED'} {target}: {seen}")


def judge(
    found: dict[str, list[float]], rates: dict[str, float]
) -> Iterator[tuple[str, bool, str]]:
    def p50(name: str) -> float:
        return quantile(found[name], 0.5)

    for call in ("publish", "open"):
        for where in (*(f", {carrier}" for carrier in CARRIERS), ", one process"):
            name = f"{call}, host time{where}"
            yield f"{name} at most 15 us", p50(name) <= 15, f"{p50(name):.1f} us"
    peer = p50("torch queue")
    for carrier, share in (("Pipe", 0.5), ("HandleQueue", 0.2), ("HandleQueue, awake", 0.2)):
        name = f"pool, in place, {carrier}"
        ratio = p50(name) / peer
        yield f"{name} at most {share} of torch's queue", ratio <= share, f"{ratio:.2f}"
    for size in ("14.3 MB", "294 MB"):
        ratio = rates[f"pinned pool, {size}"] / rates[f"torch pinned, {size}"]
        yield f"pinned pool, {size}, at least 97% of torch's", ratio >= 0.97, f"{ratio:.3f}"
