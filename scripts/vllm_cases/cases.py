"""What must hold with real engines, one function each; `CASES` has them in the order they run in.

Every answer is compared, token by token, with that of an engine without a connector ("mono").
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shmblocks import BlockPool
from shmblocks.vllm import ConnectorConfig
from vllm_cases import photos
from vllm_cases.engines import CaseError, Engine, leftovers, transfer

# Seconds from the end of a killed encoder's process to the answer of the one who waited for it,
# beyond what an answer of that engine takes anyhow on this machine at this moment. A wait that runs
# into its timeout would take 20 s here. (After SIGKILL the kernel first frees the process's memory,
# then its locks: on a busy machine half a second in which nobody can see that it is dead.)
AFTER_A_DEATH = 0.5
POOL_BYTES = 8 << 20
# The engine's own encoder cache: 128 embeddings are two photographs.
SMALL_CACHE = {"max_num_batched_tokens": 128}


class Bench:
    """One model, its answers without a connector, and the names of what belongs to this run."""

    def __init__(self, model: Path, logs: Path, prefix: str) -> None:
        self.model = model
        self.prefix = prefix
        self._logs = logs
        self._reference: dict[str, list[int]] = {}
        self._pools = 0

    def pool(self) -> str:
        """A name that no other case has."""
        self._pools += 1
        return f"{self.prefix}-{self.model.name}-{self._pools}"

    def start(self, name: str, config: dict[str, Any] | None, **more: object) -> Engine:
        """Start an engine; wait for it with `ready()`."""
        settings: dict[str, Any] = {"model": str(self.model), **more}
        if config is not None:
            settings["ec_transfer_config"] = config
        return Engine(f"{self.model.name}-{name}", settings, self._logs)

    def learn(self, names: list[str]) -> None:
        """Ask an engine without a connector about these photographs."""
        with self.start("mono", None).ready() as mono:
            self._reference |= dict(zip(names, mono.tokens(*names), strict=True))

    def same(self, engine: Engine, *names: str, **more: object) -> None:
        """An engine answers about these photographs as mono does."""
        self.equal(engine, list(names), engine.tokens(*names, **more))

    def equal(self, engine: Engine, names: list[str], tokens: list[list[int]]) -> None:
        expected = [self._reference[name] for name in names]
        if tokens != expected:
            raise CaseError(f"{engine.name} on {names}: expected {expected}, got {tokens}")


def expect(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise CaseError(f"{what}: expected {expected}, got {found}")


@contextlib.contextmanager
def kept(bench: Bench, pool_bytes: int = POOL_BYTES) -> Iterator[BlockPool]:
    """A pool that this process keeps, and finds in order and without leases at the end."""
    config = ConnectorConfig.of({"pool_bytes": pool_bytes, "block_bytes": 4096})
    name = bench.pool()
    with BlockPool.create(name, config.pool_config(), role="cases", prefault="off") as pool:
        yield pool
        pool.reap()
        expect("check()", pool.check(), [])
        expect("leases at the end", pool.stats().leases, 0)
        expect("participants at the end", len(pool.participants()), 1)
    expect("/dev/shm", leftovers(name), [])


class Served:
    """`shmblocks serve` of a pool, at a port of its own."""

    def __init__(self, pool: str) -> None:
        command = [sys.executable, "-m", "shmblocks.cli", "serve", pool, "--listen", "127.0.0.1:0"]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        said = self._process.stderr.readline() if self._process.stderr is not None else ""
        self.address = said.rpartition(" at ")[2].strip()
        if not self.address:
            self.kill()
            raise CaseError(f"shmblocks serve {pool} said {said!r}")

    def kill(self) -> None:
        """Idempotent."""
        self._process.kill()
        self._process.wait()
        if self._process.stderr is not None:
            self._process.stderr.close()


@contextlib.contextmanager
def served(pool: str) -> Iterator[Served]:
    """Serve a pool to other nodes."""
    server = Served(pool)
    try:
        yield server
    finally:
        server.kill()


def announced(engine: Engine, *names: str) -> list[list[Any]]:
    """Let an encoder encode; for each photograph what its client is told."""
    answers = engine.do(ask=[[name] for name in names])["answers"]
    for answer in answers:
        ((_, item),) = answer["parameters"].items()
        if not item["metadata"]:
            raise CaseError(f"{engine.name} announced no metadata: {answer}")
    return [[name, answer["parameters"]] for name, answer in zip(names, answers, strict=True)]


# ---- cases -------------------------------------------------------------------------------------


def producer_and_consumers(bench: Bench) -> None:
    """Consumer first; then a producer; pixels, metadata, a second consumer; nobody has it."""
    names, size = list(photos.NAMES), {"pool_bytes": POOL_BYTES}
    with kept(bench) as pool, contextlib.ExitStack() as stack:
        first = stack.enter_context(
            bench.start("consumer", transfer("ec_consumer", pool.name, **size))
        )
        producer = stack.enter_context(
            bench.start("producer", transfer("ec_producer", pool.name, **size))
        )
        second = stack.enter_context(
            bench.start("consumer-2", transfer("ec_consumer", pool.name, **size))
        )
        first.ready()
        bench.same(first, "grace")
        expect("alone", first.counted("misses", "hits"), {"misses": 1, "hits": 0})

        told = announced(producer.ready(), *names)
        expect("saved", producer.counted("misses", "saves"), {"misses": 3, "saves": 3})
        producer.do(ask=[[name] for name in names])
        expect("its own cache", producer.counted("misses", "saves"), {"misses": 3, "saves": 3})

        bench.same(first, *names[1:])
        expect("pixels", first.counted("hits", "loads"), {"hits": 2, "loads": 2})
        answers = second.ready().do(metadata=told)["answers"]
        bench.equal(second, names, [answer["tokens"] for answer in answers])
        expect("metadata", second.counted("hits", "misses"), {"hits": 3, "misses": 0})

        ((_, item),) = told[0][1].items()
        result = second.do(metadata=[["grace", {"f" * 64: item}]])
        expect("nobody has it", [each["finish"] for each in result["answers"]], ["error"])
        expect("requests left in the engine", result["left"], 0)
        bench.same(second, *names)  # and it lives


def encoder_killed_while_a_consumer_waits(bench: Bench) -> None:
    """The one who waits answers soon after the kill, by its own encoder; a new one takes over."""
    with kept(bench) as pool, contextlib.ExitStack() as stack:
        settings = {"pool_bytes": POOL_BYTES, "wait_seconds": 20.0}
        producer = bench.start("dying", transfer("ec_producer", pool.name, **settings))
        stack.callback(producer.kill)
        consumer = stack.enter_context(
            bench.start("waiting", transfer("ec_consumer", pool.name, **settings))
        )
        producer.ready().do(slow_saves=600.0)
        consumer.ready()
        bench.same(consumer, "grace")  # warm: what follows measures answers
        began = time.monotonic()
        bench.same(consumer, "flower")
        ordinary = time.monotonic() - began
        producer.send(ask=[["china"]])
        producer.until("saving")
        consumer.send(ask=[["china"]])
        consumer.until("waits")
        killed = time.monotonic()
        producer.kill()
        ended = time.monotonic()
        answers = consumer.result()["answers"]
        answered = time.monotonic()
        print(
            f"    answer {answered - killed:.3f} s after SIGKILL, {answered - ended:.3f} s after "
            f"the process had ended; an ordinary one takes {ordinary:.3f} s",
            flush=True,
        )
        bench.equal(consumer, ["china"], [answers[0]["tokens"]])
        expect("encoded itself", consumer.counted("hits", "misses"), {"hits": 0, "misses": 3})
        if answered - ended > AFTER_A_DEATH + ordinary:
            raise CaseError(f"the answer came {answered - ended:.3f} s after the encoder's end")


def consumer_killed_with_leases(bench: Bench) -> None:
    """In place, an engine holds leases for long; killed, they come back."""
    with kept(bench) as pool, contextlib.ExitStack() as stack:
        both = stack.enter_context(
            bench.start("both", transfer("ec_both", pool.name, pool_bytes=POOL_BYTES))
        )
        holder = bench.start(
            "holder", transfer("ec_consumer", pool.name, pool_bytes=POOL_BYTES, in_place=True)
        )
        stack.callback(holder.kill)
        bench.same(both.ready(), *photos.NAMES)
        bench.same(holder.ready(), *photos.NAMES)
        expect("leases in place", pool.stats().leases, 3)
        holder.kill()
        pool.reap()
        expect("leases after its death", pool.stats().leases, 0)
        bench.same(both, *photos.NAMES)


def replicas(bench: Bench) -> None:
    """Two `ec_both`: the second encodes nothing that the first has; then the weights change."""
    with kept(bench) as pool, contextlib.ExitStack() as stack:
        config = transfer("ec_both", pool.name, pool_bytes=POOL_BYTES)
        first = stack.enter_context(bench.start("replica-1", config))
        second = stack.enter_context(bench.start("replica-2", config))
        bench.same(first.ready(), *photos.NAMES)
        bench.same(second.ready(), *photos.NAMES)
        bench.same(second, *photos.NAMES, serial=False)
        expect("the second", second.counted("hits", "misses"), {"hits": 3, "misses": 0})
        first.do(ask=[["china:1"]], uuid="a-uuid")
        bench.same(second, "grace", uuid="a-uuid")  # of another size: noticed, and encoded
        counts = second.counted("mismatches", "misses")
        expect("a reused uuid", counts, {"mismatches": 1, "misses": 1})
        second.do(bump=True)
        bench.same(second, "china")
        expect("a new epoch", second.counted("misses"), {"misses": 2})


def pools_that_are_too_small(bench: Bench) -> None:
    """Room for half of what is asked; for one photograph; for none; in place."""
    names = photos.variants(8)
    # An item of 56 rows of 128 or 256 fp32 takes up to 56 KiB.
    for room, pool_bytes, in_place in (
        ("half", 4 * 60 << 10, False),
        ("one", 60 << 10, False),
        ("none", 8 << 10, False),
        ("in place", 4 * 60 << 10, True),
    ):
        with kept(bench, pool_bytes) as pool:
            config = transfer("ec_both", pool.name, pool_bytes=pool_bytes, in_place=in_place)
            with bench.start(f"small-{room[:4]}", config, **SMALL_CACHE).ready() as engine:
                for serial in (True, False):
                    bench.same(engine, *names, serial=serial)
                counts = engine.counted("hits", "misses", "no_room")
                print(f"    room for {room}: {counts}", flush=True)
                if room == "none":
                    expect("no room", counts["no_room"], counts["misses"])


def numbered_items_are_refused(bench: Bench) -> None:
    """At start, with a sentence that says what to do."""
    name = bench.pool()
    config = transfer("ec_both", name, pool_bytes=POOL_BYTES)
    engine = bench.start("numbered", config, mm_processor_cache_gb=0, enable_prefix_caching=False)
    try:
        engine.ready()
    except CaseError:
        said = engine.log.read_text()
        if "needs content hashes" not in said:
            raise CaseError(f"it did not say why: see {engine.log}") from None
    else:
        raise CaseError("an engine whose items are numbered was started")
    finally:
        engine.kill()
    expect("/dev/shm", leftovers(name), [])


def nodes(bench: Bench) -> None:
    """Two pools as two nodes: the second fetches what the first has encoded; the first dies."""
    with contextlib.ExitStack() as stack:
        there, here = (stack.enter_context(kept(bench)) for _ in range(2))
        node = stack.enter_context(served(there.name))
        settings = {"pool_bytes": POOL_BYTES, "nodes": [node.address]}
        first, second = (
            stack.enter_context(bench.start(name, transfer("ec_both", pool.name, **settings)))
            for name, pool in (("node-1", there), ("node-2", here))
        )
        bench.same(first.ready(), *photos.NAMES)
        bench.same(second.ready(), *photos.NAMES)
        expect("encoded", first.counted("misses", "fetches"), {"misses": 3, "fetches": 0})
        expect("fetched", second.counted("misses", "fetches"), {"misses": 0, "fetches": 3})
        names = ("fetch_misses", "fetch_failures", "misses")
        bench.same(second, "grace:1")
        expect("nobody has it", list(second.counted(*names).values()), [1, 0, 1])
        node.kill()
        bench.same(second, "china:1", "flower:1")
        expect("the node is dead", list(second.counted(*names).values()), [1, 1, 3])


def without_a_keeper(bench: Bench) -> None:
    """The last engine that leaves in an orderly way removes the pool."""
    name = bench.pool()
    with bench.start("alone", transfer("ec_both", name, pool_bytes=POOL_BYTES)).ready() as engine:
        bench.same(engine, "china")
        expect("/dev/shm", leftovers(name), [name])
    expect("/dev/shm", leftovers(name), [])


Case = Callable[[Bench], None]

CASES: tuple[Case, ...] = (
    producer_and_consumers,
    encoder_killed_while_a_consumer_waits,
    consumer_killed_with_leases,
    replicas,
    pools_that_are_too_small,
    numbered_items_are_refused,
    nodes,
    without_a_keeper,
)
SHORT: tuple[Case, ...] = (producer_and_consumers, encoder_killed_while_a_consumer_waits)
# What the cases above ask about.
ASKED = [*photos.NAMES, *photos.variants(8)]


def prefix() -> str:
    """Of the names of this run's pools."""
    return f"vllm-cases-{os.getpid()}"
