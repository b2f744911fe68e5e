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
- *d2d copy*          baseline: one copy of the payload on the GPU, waited for
- *bare wake*         baseline: the carrier with a message of 40 bytes and nothing else

Every payload is checked in the consumer after the clock was read; a wrong one ends the run.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.queues import Queue
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.multiprocessing

from benchmarks.report import quantile
from benchmarks.transport import PATIENCE, unique_name
from benchmarks.transports.shmblocks_pool import FIELD, BytesIn, BytesOut, QueueEnd
from shmblocks import BlockHandle, BlockPool, Field, HandleQueue, PoolConfig

T = TypeVar("T")

TOKENS = 2000
HIDDEN = 3584
IDLE_SECONDS = {"": 0.0, ", after 2 ms of sleep": 0.002}
# Longer than the longest pause between two handoffs.
AWAKE_SPIN = 0.01
# So often each way has its turn: the machine is not the same from one second to the next.
TURNS = 5
CARRIERS = ("HandleQueue, awake", "HandleQueue", "Pipe")
WAKE, IN_PLACE, COPY, TORCH = "bare wake", "pool, in place", "pool, with copy", "torch queue"
# What is measured: a way, and what carries its handle.
WAYS = [(way, carrier) for carrier in CARRIERS for way in (WAKE, IN_PLACE, COPY)] + [(TORCH, "")]


class WrongBytesError(Exception):
    """The consumer did not get what the producer wrote."""


def pool_config(blocks: int) -> PoolConfig:
    return PoolConfig(total_tokens=blocks * 128, fields=(Field(FIELD, (HIDDEN,), "bf16"),))


def allocate(pool: BlockPool, tokens: int) -> BlockHandle:
    handle = pool.alloc(tokens, timeout=PATIENCE)
    if handle is None:
        raise TimeoutError(f"no free blocks: {pool.stats()}")
    return handle


@contextlib.contextmanager
def queues(name: str) -> Iterator[tuple[QueueEnd, QueueEnd]]:
    """The ends of one side: one that spins until the next handoff, one that goes to sleep."""
    with (
        contextlib.closing(QueueEnd(HandleQueue.attach(name, spin=AWAKE_SPIN))) as awake,
        contextlib.closing(QueueEnd(HandleQueue.attach(name))) as asleep,
    ):
        yield awake, asleep


def check(tensor: torch.Tensor, seed: int) -> None:
    if not bool((tensor == seed % 128).all()):
        raise WrongBytesError(f"handoff {seed}: expected {seed % 128} everywhere")


class Names(NamedTuple):
    """What both processes meet by."""

    pool: str
    queue: str


# --- the consumer -----------------------------------------------------------------------------


def consume(
    names: Names, pipe: Connection, tensors: Queue[torch.Tensor], back: Connection, each: int
) -> None:
    """The other process: receives in the producer's order, and tells when it had what."""
    torch.zeros(1, device="cuda")
    with (
        BlockPool.attach(names.pool, prefault="now", role="consumer") as pool,
        queues(names.queue) as (awake, asleep),
    ):
        carriers: dict[str, BytesIn] = dict(zip(CARRIERS, (awake, asleep, pipe), strict=True))
        back.send("ready")
        for way, carrier in WAYS * TURNS * len(IDLE_SECONDS):
            for seed in range(each):
                if way == TORCH:
                    back.send(_receive_tensor(tensors, seed))
                else:
                    back.send(_receive(way, carriers[carrier], pool, seed))
        torch.cuda.synchronize()
        back.recv()


def _receive_tensor(tensors: Queue[torch.Tensor], seed: int) -> tuple[int, int]:
    tensor = tensors.get(timeout=PATIENCE)
    there = time.monotonic_ns()
    check(tensor, seed)
    return there, 0


def _receive(way: str, carrier: BytesIn, pool: BlockPool, seed: int) -> tuple[int, int]:
    """When the tensor was there, and how long `open` took; nanoseconds."""
    data = carrier.recv_bytes()
    if way == WAKE:
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
        carriers: dict[str, BytesOut],
        tensors: Queue[torch.Tensor],
        back: Connection,
    ) -> None:
        self._pool = pool
        self._carriers = carriers
        self._tensors = tensors
        self._back = back
        self._own = torch.empty(TOKENS, HIDDEN, dtype=torch.bfloat16, device="cuda")

    def run(self, way: str, carrier: str, rounds: int, idle: float) -> Turn:
        """So many handoffs."""
        turn = Turn([], [], [])
        for seed in range(rounds):
            if idle:
                time.sleep(idle)
            if way == TORCH:
                begun = self._send_tensor(seed)
            else:
                begun = self._send(way, self._carriers[carrier], seed, turn.publish_us)
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

    def _send(self, way: str, carrier: BytesOut, seed: int, publish_us: list[float]) -> int:
        """When it began: with what the encoder would do in any case behind it."""
        if way == WAKE:
            begun = time.monotonic_ns()
            carrier.send_bytes(bytes(40))
            return begun
        if way == IN_PLACE:
            handle = allocate(self._pool, TOKENS)
            self._pool.view(handle)[FIELD].fill_(seed % 128)
            torch.cuda.synchronize()
            begun = time.monotonic_ns()
        else:
            self._own.fill_(seed % 128)
            torch.cuda.synchronize()
            begun = time.monotonic_ns()
            handle = allocate(self._pool, TOKENS)
            self._pool.view(handle)[FIELD].copy_(self._own)
        before = time.monotonic_ns()
        handle = self._pool.publish(handle)
        publish_us.append((time.monotonic_ns() - before) / 1e3)
        carrier.send_bytes(handle.encode())
        return begun

    def _send_tensor(self, seed: int) -> int:
        tensor = torch.empty(TOKENS, HIDDEN, dtype=torch.bfloat16, device="cuda")
        tensor.fill_(seed % 128)
        torch.cuda.synchronize()
        begun = time.monotonic_ns()
        self._tensors.put(tensor)
        return begun


def handoffs(rounds: int) -> dict[str, list[float]]:
    """Name -> microseconds, of every way with every carrier, in turns."""
    context = multiprocessing.get_context("spawn")
    names = Names(unique_name("cuda"), unique_name("cuda-queue"))
    theirs, ours = context.Pipe(duplex=False)
    back, back_theirs = context.Pipe()
    tensors: Queue[torch.Tensor] = torch.multiprocessing.get_context("spawn").Queue()
    each = rounds // TURNS
    found: dict[str, list[float]] = {}
    with (
        BlockPool.create(names.pool, pool_config(64), prefault="now", device="cuda") as pool,
        contextlib.closing(HandleQueue.create(names.queue)),
        queues(names.queue) as (awake, asleep),
    ):
        child = context.Process(
            target=consume, args=(names, theirs, tensors, back_theirs, each), daemon=True
        )
        child.start()
        carriers: dict[str, BytesOut] = dict(zip(CARRIERS, (awake, asleep, ours), strict=True))
        producer = Producer(pool, carriers, tensors, back)
        if not back.poll(PATIENCE) or back.recv() != "ready":
            raise TimeoutError("the consumer did not start")
        for label, idle in IDLE_SECONDS.items():
            for way, carrier in WAYS * TURNS:
                turn = producer.run(way, carrier, each, idle)
                calls = (way, "publish, host time", "open, host time")
                for call, times in zip(calls, turn, strict=True):
                    if times:
                        name = f"{call}{', ' if carrier else ''}{carrier}{label}"
                        found.setdefault(name, []).extend(times[each // 10 :])
        back.send("end")
        child.join(PATIENCE)
        if child.exitcode != 0:
            raise ChildProcessError(f"the consumer ended with {child.exitcode}")
    return found


# --- baselines and copies ------------------------------------------------------------------------


def device_copy(rounds: int) -> list[float]:
    """Microseconds of one copy of the payload on the GPU, from the call to its end."""
    source = torch.ones(TOKENS, HIDDEN, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)

    return _timed(lambda: target.copy_(source), rounds)


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

    rows = torch.zeros(TOKENS, 64)
    config = pool_config(64)
    with BlockPool.create(unique_name("host"), config, prefault="now", device="cuda") as pool:
        for seed in range(rounds * 2):
            handle = timed("alloc", allocate, pool, TOKENS)
            pool.view(handle)
            handle = timed("publish", pool.publish, handle)
            lease = timed("open", pool.open, handle)
            timed("release", lease.release)
            timed("a slice by torch", rows.__getitem__, slice(10, 20))
            if idle or seed % 2:
                torch.cuda.synchronize()
    return {call: times[rounds:] for call, times in found.items()}


def _timed(call: Callable[[], object], rounds: int) -> list[float]:
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
    config = pool_config(320)
    with BlockPool.create(unique_name("pinned"), config, prefault="now") as pool:
        handle = allocate(pool, config.total_tokens)
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
                copy = partial(target.copy_, part, non_blocking=True)
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
    rounds = max(rounds, 2 * TURNS)  # each way has its turn so often
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
