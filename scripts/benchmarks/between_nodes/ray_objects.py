"""Ray's object transfer: two Ray nodes on this machine, each with its own object store.

The source puts a numpy array of the payload's size on node 1; the reader, on node 2, gets it: Ray
moves it from store to store. The array that it gives lies in the store and is read-only: it is not
copied into the pool, which is to Ray's advantage. Raylets and stores do the work, so that the CPU
of all processes of a Ray node is counted for its half.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from benchmarks.between_nodes.kit import NotHereError, size_of

STORE_BYTES = 1 << 30


class RayPair:
    """Both halves: Ray has one driver, and its nodes are its own processes."""

    def __init__(self, stack: contextlib.ExitStack, most: int) -> None:
        try:
            import ray
            from ray.cluster_utils import Cluster
        except ImportError:
            raise NotHereError("Ray is not installed (the extra `peers`)") from None
        self._ray = ray
        quiet = {"include_dashboard": False, "object_store_memory": STORE_BYTES, "num_cpus": 2}
        cluster = Cluster(
            initialize_head=True,
            head_node_args={**quiet, "resources": {"source": 1.0}},
        )
        stack.callback(cluster.shutdown)
        second = cluster.add_node(
            object_store_memory=STORE_BYTES, num_cpus=2, resources={"reader": 1.0}
        )
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        stack.callback(ray.shutdown)
        actor: Any = ray.remote(_Half)
        self._source: Any = actor.options(resources={"source": 0.1}).remote(most)
        self._reader: Any = actor.options(resources={"reader": 0.1}).remote(most)
        for half in (self._source, self._reader):
            ray.get(half.pid.remote())
        self._reader_roots = {info.process.pid for info in _processes(second)}
        self._source_roots = {info.process.pid for info in _processes(cluster.head_node)}

    def prepare(self, tokens: int) -> object:
        return self._ray.get(self._source.put.remote(size_of(tokens)))

    def carry(self, prepared: object) -> float:
        """Seconds that the reader's `ray.get` took."""
        seconds: float = self._ray.get(self._reader.get.remote(prepared))
        return seconds

    def cpu(self) -> tuple[float, float]:
        """Seconds of the reader's node and of the source's, with everything that they started."""
        return cpu_of(self._reader_roots), cpu_of(self._source_roots)


def _processes(node: Any) -> list[Any]:  # noqa: ANN401 - ray.node.Node
    return [info for infos in node.all_processes.values() for info in infos]


class _Half:
    """An actor on one of the two nodes."""

    def __init__(self, most: int) -> None:
        import numpy as np

        self._payload = np.frombuffer(os.urandom(1 << 20) * ((size_of(most) >> 20) + 1), "u1")

    def pid(self) -> int:
        return os.getpid()

    def put(self, count: int) -> list[object]:
        """In a list, a reference stays one."""
        import ray

        return [ray.put(self._payload[:count])]

    def get(self, boxed: list[Any]) -> float:
        import time

        import ray

        start = time.perf_counter()
        ray.get(boxed[0])
        return time.perf_counter() - start


def cpu_of(roots: set[int]) -> float:
    """Seconds of CPU of these processes and all their descendants, those that ended among them."""
    parents: dict[int, list[int]] = {}
    seconds: dict[int, float] = {}
    tick = os.sysconf("SC_CLK_TCK")
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents.setdefault(int(fields[1]), []).append(int(entry.name))
                seconds[int(entry.name)] = sum(map(int, fields[11:15])) / tick
    waiting, found = list(roots), 0.0
    while waiting:
        pid = waiting.pop()
        found += seconds.get(pid, 0.0)
        waiting += parents.get(pid, [])
    return found
