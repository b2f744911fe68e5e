"""The language side of a pool, in another terminal. It reads what producer.py made, in place.

    python examples/producer.py --name demo      in one terminal
    python examples/consumer.py --name demo      in another; either may start first

It attaches by the pool's name alone: sizes and fields stand in the pool. What it receives from the
channel is a lease: it checks every value against the producer's checksum, and releases the blocks.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time

import torch

from shmblocks import (
    BlockPool,
    Channel,
    Lease,
    PoolNotFoundError,
    PoolTimeoutError,
    ShmBlocksError,
)

LAST = b"last"  # the producer's last message, as producer.py has it
POLL_SECONDS = 0.5  # smaller: a busier wait; larger: a lost producer is noticed later


def main() -> int:
    args = parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` ends it like Ctrl-C
    try:
        print(f"waiting for the pool {args.name!r} ...", flush=True)
        with BlockPool.attach(args.name, timeout=args.timeout, role="consumer") as pool:
            return consume(pool)
    except KeyboardInterrupt:
        print("consumer: stopped")
        return 130
    except PoolNotFoundError as error:
        start = f"python examples/producer.py --name {args.name}"
        print(f"consumer: {error}; start a producer: {start}", file=sys.stderr)
        return 1
    except (ShmBlocksError, OSError) as error:  # a TimeoutError is an OSError
        print(f"consumer: {error}", file=sys.stderr)
        return 1


def consume(pool: BlockPool) -> int:
    """Read until the producer ends; 1 if anything was not as it was written."""
    channel = pool.channel("requests")
    count = wrong = 0
    message = b""
    while message != LAST:
        with receive(pool, channel) as lease:  # the last reader's release frees the blocks
            message = lease.message
            count += 1
            wrong += not read(lease)
    print(f"{count} read, {count - wrong} right, {wrong} wrong")
    return 1 if wrong else 0


def receive(pool: BlockPool, channel: Channel) -> Lease:
    """The next request's blocks; what a producer that went away has sent is still there."""
    while True:
        try:
            return channel.receive(timeout=POLL_SECONDS)
        except PoolTimeoutError:
            if pool.find_participant("producer") is None:
                raise ConnectionError("the producer went away before it was done") from None


def read(lease: Lease) -> bool:
    """Read one request in place."""
    started = time.perf_counter()
    embeddings = lease["input_embeddings"]  # a torch tensor over the shared memory
    microseconds = (time.perf_counter() - started) * 1e6
    request = int(lease["fill_ids"][0])
    right = checksum(embeddings) == int(lease.aux[2])
    print(row(request, embeddings, microseconds, right), flush=True)
    return right


def checksum(embeddings: torch.Tensor) -> int:
    return int(embeddings.view(torch.int16).sum(dtype=torch.int32))


def row(request: int, embeddings: torch.Tensor, microseconds: float, right: bool) -> str:
    mebibytes = embeddings.numel() * embeddings.element_size() / 2**20
    return (
        f"request {request:3}  {len(embeddings):5} tokens  {mebibytes:6.2f} MiB"
        f"  opened in {microseconds:7.1f} us  {'right' if right else 'WRONG'}"
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", default="demo", help="the pool's name, the same on both sides")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for the other")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
