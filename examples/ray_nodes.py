"""Ray places and supervises, shmblocks carries: two Ray nodes, an encoder killed in the middle.

    pip install 'shmblocks[peers]'            brings Ray
    python examples/ray_nodes.py [--images 12] [--tokens 500]

    Ray node 1                                    Ray node 2
    Keeper: pool A, NodeServer ===== TCP ====>    Keeper: pool B
    Encoder --publish--> pool A                   Language: fetch into pool B, read in place

Two Ray nodes on this machine (`ray.cluster_utils`); on a real cluster only `cluster_of_two` would
go. A Keeper on each node makes the pool and serves it, so that what is in it outlives encoders. An
Encoder attaches to its node's pool by name. Handles are results and arguments of calls, some 40
bytes each; embeddings go from pool to pool and never through Ray's object store.

The Encoder is killed with a reservation in its hands. Ray starts it again and repeats the call; the
pool takes the dead one's blocks back. Exit code 1 when an image differs or a block is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import ray

from shmblocks import BlockHandle, BlockPool, PoolConfig, multimodal_fields
from shmblocks.nodes import NodeServer, RemotePool

if TYPE_CHECKING:
    import torch

HIDDEN = 1024
CONFIG = PoolConfig(total_tokens=128 * 128, fields=multimodal_fields(HIDDEN), block_size=128)
# Seconds for anything that Ray does. Longer: a cluster that hangs is noticed later.
PATIENCE = 120.0


def embeddings_of(image: int, tokens: int) -> torch.Tensor:
    """What a vision encoder would compute; the language actor computes it again to compare."""
    import torch

    random = torch.Generator().manual_seed(image)
    return torch.randn(tokens, HIDDEN, generator=random).to(torch.bfloat16)


class Keeper:
    """One on each node: keeps the pool, and serves it to the other nodes."""

    def __init__(self, name: str, key: bytes) -> None:
        self._pool = BlockPool.ensure(name, CONFIG, role="keeper")
        # On a cluster of machines: ray.util.get_node_ip_address().
        self._server = NodeServer(self._pool, ("127.0.0.1", 0), key=key)

    def address(self) -> tuple[str, int]:
        return self._server.address

    def reserved_blocks(self) -> int:
        return self._pool.stats().reserved_blocks

    def free_blocks(self) -> int:
        """With what the dead held given back."""
        self._pool.reap()
        return self._pool.available_blocks()


class Encoder:
    """Encodes into its node's pool."""

    def __init__(self, name: str) -> None:
        self._pool = BlockPool.attach(name, timeout=PATIENCE, role="encoder")

    def pid(self) -> int:
        return os.getpid()

    def encode(self, image: int, tokens: int, is_slow: bool) -> bytes:
        """A handle. `is_slow`: stop with the blocks reserved, unless Ray has restarted us."""
        with self._pool.reserve(tokens, req_id=f"image {image}") as reservation:
            reservation["input_embeddings"].copy_(embeddings_of(image, tokens))
            reservation["fill_ids"].fill_(image)
            reservation["mrope_positions"].zero_()
            if is_slow and not ray.get_runtime_context().was_current_actor_reconstructed:
                time.sleep(PATIENCE)
            return reservation.publish().encode()


class Language:
    """Fetches from the other node, and reads in place."""

    def __init__(self, name: str, address: tuple[str, int], key: bytes) -> None:
        self._pool = BlockPool.attach(name, timeout=PATIENCE, role="language")
        self._node1 = RemotePool(self._pool, address, key=key)

    def is_same(self, handle: bytes, image: int) -> bool:
        """Whether the image arrived as it was encoded, bit for bit."""
        import torch

        local = self._node1.fetch(BlockHandle.decode(handle), req_id=f"image {image}")
        with self._pool.open(local) as lease:
            got = lease["input_embeddings"]
            return torch.equal(got, embeddings_of(image, len(got)))


@contextlib.contextmanager
def cluster_of_two() -> Iterator[None]:
    """Two Ray nodes on this machine, `node1` and `node2`; this process is their driver."""
    from ray.cluster_utils import Cluster

    quiet = {"include_dashboard": False, "num_cpus": 4, "object_store_memory": 100 << 20}
    cluster: Any = Cluster(
        initialize_head=True, head_node_args={**quiet, "resources": {"node1": 1.0}}
    )
    try:
        cluster.add_node(num_cpus=4, object_store_memory=100 << 20, resources={"node2": 1.0})
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def on(node: str, what: type, *arguments: object, **options: object) -> Any:  # noqa: ANN401 - Ray
    """An actor on a node. It needs little of it."""
    actor: Any = ray.remote(what)
    placed = actor.options(num_cpus=0.1, resources={node: 0.01}, **options)
    return placed.remote(*arguments)


def run(images: int, tokens: int) -> bool:
    """Whether every image arrived as it was, and every block came back."""
    name, key = f"ray-nodes-{os.getpid()}", secrets.token_bytes(32)
    keepers = [on(node, Keeper, f"{name}-{node}", key) for node in ("node1", "node2")]
    address = wait(keepers[0].address.remote())
    encoder = on("node1", Encoder, f"{name}-node1", max_restarts=-1, max_task_retries=-1)
    language = on("node2", Language, f"{name}-node2", address, key)
    same = 0
    for image in range(images):
        is_slow = image == images // 2
        pid = wait(encoder.pid.remote())
        handle = encoder.encode.remote(image, tokens, is_slow)
        if is_slow:
            kill_when_reserved(keepers[0], pid, image)
        same += wait(language.is_same.remote(handle, image))
    restarted = wait(encoder.pid.remote())
    free = [wait(keeper.free_blocks.remote()) for keeper in keepers]
    print(f"{same} of {images} images of {tokens} tokens are the same on node 2, bit for bit")
    print(f"the encoder is process {restarted} now; free blocks: {free} of {CONFIG.total_blocks}")
    return same == images and free == [CONFIG.total_blocks] * 2


def kill_when_reserved(keeper: Any, pid: int, image: int) -> None:  # noqa: ANN401 - an actor
    while not wait(keeper.reserved_blocks.remote()):
        time.sleep(0.02)
    print(f"image {image}: its encoder (pid {pid}) is killed with the blocks reserved", flush=True)
    os.kill(pid, signal.SIGKILL)


def wait(result: Any) -> Any:  # noqa: ANN401 - whatever the call gave
    return ray.get(result, timeout=PATIENCE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=500)
    options = parser.parse_args()
    with cluster_of_two():
        return 0 if run(options.images, options.tokens) else 1


if __name__ == "__main__":
    sys.exit(main())
