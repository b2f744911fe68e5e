"""Two encoders and three readers share one cache of embeddings: each photograph is encoded once.

    launcher --number of a photograph--> encoders --ticket--> launcher --ticket--> readers

Requests repeat photographs, as users do. An encoder looks each one up first: what somebody has
encoded is not encoded again, and when both want the same one at the same moment, one of them
encodes it and the other waits. What goes to a reader is a lease on the entry, as a ticket of some
50 bytes; the reader has the embeddings in place, without a copy, and nobody can evict them from
under it.

    python examples/cache.py                   40 requests, and how many encodes were saved
    python examples/cache.py --requests 100 --pool-mib 4     a pool too small for all of them
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import signal
import sys
from multiprocessing.connection import Connection

import torch

from _children import Child, ChildDiedError, Children
from _models import VisionConfig, VisionTransformer
from _photos import PHOTOS, Photo, PhotosMissingError, folder, load
from _processes import checksum, obeying_the_launcher, same_arithmetic_everywhere
from shmblocks import BlockPool, Namespace, PoolTimeoutError, ShmBlocksError
from shmblocks.cache import CacheLease, TensorCache, byte_config

SEED = 5
VISION = VisionConfig(width=64, heads=4, mlp=96, depth=2, out=256)
# What shapes an embedding besides the photograph: other weights, another namespace.
NAMESPACE = Namespace(model="seeded-vit", revision=str(SEED), dtype="bf16")
PATIENCE = 120.0  # seconds that anybody waits for anybody
READY = b"ready"
# How often an encoder tries to store what others need the room for.
ATTEMPTS = 5


def main() -> int:
    args = parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` ends it like Ctrl-C
    try:
        folder()
        config = byte_config(args.pool_mib << 20)
        with (
            BlockPool.create(args.name, config, role="launcher") as pool,
            Children(multiprocessing.get_context("spawn")) as children,
        ):
            return run(pool, children, args.requests)
    except KeyboardInterrupt:
        print("stopped")
        return 130
    except (ShmBlocksError, ChildDiedError, PhotosMissingError, TimeoutError) as error:
        print(f"cache.py: {error}", file=sys.stderr)
        return 1


def run(pool: BlockPool, children: Children, requests: int) -> int:
    """Serve the requests, and compare each result with the one-process run; 1 if any differs."""
    encoders = [children.start(f"encoder {i}", encoder, pool.name) for i in range(2)]
    readers = [children.start(f"reader {i}", reader, pool.name) for i in range(3)]
    for child in (*encoders, *readers):
        hear(child)
    expected = one_process_run()
    wanted = random.Random(SEED).choices(range(len(PHOTOS)), k=requests)
    identical = 0
    for first in range(0, requests, len(encoders)):
        pair = wanted[first : first + len(encoders)]
        for child, number in zip(encoders, pair, strict=False):
            children.send(child, number.to_bytes(4, "little"))
        tickets = [hear(child) for child in encoders[: len(pair)]]
        for number, ticket in zip(pair, tickets, strict=True):
            child = readers[number % len(readers)]
            children.send(child, ticket)
            answer = int.from_bytes(hear(child), "little", signed=True)
            identical += answer == expected[number]
    stats = pool.cache_stats()
    encodes = stats.puts + stats.duplicates + stats.skipped
    print(f"{requests} requests for {len(set(wanted))} photographs: {encodes} encodes")
    print(f"{requests - encodes} encodes saved ({1 - encodes / requests:.0%})")
    print(f"{stats.waits} waits for the other encoder, {stats.evictions} entries evicted")
    print(f"{identical} of {requests} results identical to the one-process run")
    print(f"{pool.stats().leases} leases left, {len(pool.check())} violations")
    return 0 if identical == requests else 1


def hear(child: Child) -> bytes:
    """The next message of a child."""
    try:
        if not child.control.poll(PATIENCE):
            raise TimeoutError(f"{child.name} said nothing for {PATIENCE:g} s")
        return child.control.recv_bytes()
    except (EOFError, ConnectionResetError):
        raise child.death from None


def encode(vision: VisionTransformer, photo: Photo) -> torch.Tensor:
    """Embeddings of a photograph, [tokens, VISION.out], bf16."""
    embeddings: torch.Tensor = vision(load(photo))
    return embeddings.to(torch.bfloat16)


def encoder(control: Connection[bytes, bytes], pool_name: str) -> None:
    """Gives a ticket for each photograph that it is asked for."""
    with obeying_the_launcher(), BlockPool.attach(pool_name, role="encoder") as pool:
        same_arithmetic_everywhere()
        vision = VisionTransformer.seeded(VISION, SEED)
        cache = TensorCache(pool)
        control.send_bytes(READY)
        with contextlib.suppress(EOFError):  # the launcher has closed the pipe
            while True:
                photo = PHOTOS[int.from_bytes(control.recv_bytes(), "little")]
                control.send_bytes(lease_on(cache, vision, photo).ticket())


def lease_on(cache: TensorCache, vision: VisionTransformer, photo: Photo) -> CacheLease:
    """The embeddings of a photograph, encoded here if nobody has."""
    key = NAMESPACE.key(photo.name, epoch=cache.pool.epoch)
    for _ in range(ATTEMPTS):
        found = cache.get_or_claim(key, timeout=PATIENCE)
        if isinstance(found, CacheLease):
            return found
        with found:
            found.put(encode(vision, photo))
        # Another one may need the room before we have the lease: then it is encoded again.
    raise PoolTimeoutError(f"no room for {photo.name}; use a larger --pool-mib")


def reader(control: Connection[bytes, bytes], pool_name: str) -> None:
    """Adopts each ticket, reads the embeddings in place, and says their checksum."""
    with obeying_the_launcher(), BlockPool.attach(pool_name, role="reader") as pool:
        cache = TensorCache(pool)
        control.send_bytes(READY)
        with contextlib.suppress(EOFError):
            while True:
                with cache.adopt(control.recv_bytes()) as lease:
                    answer = checksum(lease.tensor)
                control.send_bytes(answer.to_bytes(8, "little", signed=True))


def one_process_run() -> list[int]:
    """The checksum of every photograph, encoded here."""
    same_arithmetic_everywhere()
    vision = VisionTransformer.seeded(VISION, SEED)
    return [checksum(encode(vision, photo)) for photo in PHOTOS]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Two encoders and three readers share a cache.")
    parser.add_argument("--name", default=f"cache-{os.getpid()}", help="of the pool")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--pool-mib", type=int, default=64, help="size of the pool")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
