"""Two nodes on one machine: encoded on one, read on the other, an encoder killed in the middle.

    python examples/nodes_demo.py [--images 12] [--tokens 500]

    node 1                                        node 2
    encoder --publish--> pool A                   pool B --open--> language process
                           |                         ^
                        sidecar ======= TCP ======> fetch

Four processes: this launcher, the sidecar that serves pool A, the encoder, and the language process
with pool B. On two machines only the address would be another. Handles travel by the launcher's
pipes. The encoder is killed once; what it had published is still fetched, since the sidecar keeps
the pool.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import secrets
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from shmblocks import BlockHandle, BlockPool, PoolConfig, multimodal_fields
from shmblocks.nodes import NodeServer, RemotePool

if TYPE_CHECKING:
    import torch

HIDDEN = 1024
CONFIG = PoolConfig(total_tokens=128 * 128, fields=multimodal_fields(HIDDEN), block_size=128)
_spawning = multiprocessing.get_context("spawn")


def embeddings_of(image: int, tokens: int) -> torch.Tensor:
    """What a vision encoder would compute; the language process computes it again to compare."""
    import torch

    random = torch.Generator().manual_seed(image)
    return torch.randn(tokens, HIDDEN, generator=random).to(torch.bfloat16)


# ---- node 1 ------------------------------------------------------------------------------------


def sidecar(launcher: Connection, name: str, key: bytes) -> None:
    """Keeps pool A and serves it, until the launcher hangs up (as `shmblocks serve` does)."""
    with (
        BlockPool.ensure(name, CONFIG, role="sidecar") as pool,
        NodeServer(pool, ("127.0.0.1", 0), key=key) as server,
    ):
        launcher.send(server.address)
        while launcher.poll(None) and launcher.recv() == "blocks":
            launcher.send(pool.available_blocks())


def encoder(launcher: Connection, name: str, tokens: int) -> None:
    """Encodes the images that it is told, and answers with handles."""
    with BlockPool.attach(name, role="encoder") as pool:
        launcher.send("ready")
        while (image := launcher.recv()) is not None:
            with pool.reserve(tokens, req_id=f"image {image}") as reservation:
                reservation["input_embeddings"].copy_(embeddings_of(image, tokens))
                reservation["fill_ids"].fill_(image)
                reservation["mrope_positions"].zero_()
                reservation.aux[0] = tokens
                launcher.send(reservation.publish().encode())


# ---- node 2 ------------------------------------------------------------------------------------


def language(launcher: Connection, name: str, address: tuple[str, int], key: bytes) -> None:
    """Fetches each image and says whether it is what was encoded, bit for bit."""
    import torch

    with (
        BlockPool.create(name, CONFIG, role="language") as pool,
        RemotePool(pool, address, key=key) as node1,
    ):
        launcher.send("ready")
        while (told := launcher.recv()) is not None:
            image, handle = told
            local = node1.fetch(BlockHandle.decode(handle), req_id=f"image {image}")
            with pool.open(local) as lease:
                got = lease["input_embeddings"]
                launcher.send(torch.equal(got, embeddings_of(image, len(got))))
        launcher.send(pool.available_blocks())


# ---- the launcher ------------------------------------------------------------------------------


class Process:
    """One process and the launcher's end of its pipe."""

    def __init__(self, body: Callable[..., None], *arguments: object) -> None:
        self.pipe, theirs = _spawning.Pipe()
        self._process = _spawning.Process(target=body, args=(theirs, *arguments))
        self._process.start()
        theirs.close()

    def ask(self, question: object) -> object:
        self.pipe.send(question)
        answer: object = self.pipe.recv()
        return answer

    def kill(self) -> None:
        self._process.kill()
        self.end(None)

    def end(self, word: object) -> None:
        """Tell it to end, and wait."""
        if self._process.is_alive():
            self.pipe.send(word)
        self._process.join()
        self.pipe.close()


def run(images: int, tokens: int) -> bool:
    """Whether every image arrived as it was, and every block came back."""
    name, key = f"nodes-demo-{os.getpid()}", secrets.token_bytes(32)
    serving = Process(sidecar, f"{name}-a", key)
    address = serving.pipe.recv()
    encoding = Process(encoder, f"{name}-a", tokens)
    reading = Process(language, f"{name}-b", address, key)
    encoding.pipe.recv()
    reading.pipe.recv()
    same = 0
    for image in range(images):
        handle = encoding.ask(image)
        if image == images // 2:
            encoding.kill()
            print(f"image {image}: encoded, and its encoder killed", flush=True)
            encoding = Process(encoder, f"{name}-a", tokens)
            encoding.pipe.recv()
        same += bool(reading.ask((image, handle)))
    encoding.end(None)
    left_1 = serving.ask("blocks")
    left_2 = reading.ask(None)
    reading.end(None)
    serving.end("end")
    print(f"{same} of {images} images of {tokens} tokens are the same on node 2, bit for bit")
    print(f"free blocks: {left_1} of {CONFIG.total_blocks} on node 1, {left_2} on node 2")
    return same == images and left_1 == left_2 == CONFIG.total_blocks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=500)
    options = parser.parse_args()
    return 0 if run(options.images, options.tokens) else 1


if __name__ == "__main__":
    sys.exit(main())
