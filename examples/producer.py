"""The embedding side of a pool, in one terminal. It creates the pool and fills it.

    python examples/producer.py --name demo      in one terminal
    python examples/consumer.py --name demo      in another; either may start first

It makes random "image features" of different lengths, projects them straight into shared memory
and sends each through a channel of the pool. There is no model here: examples/launch.py has one.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time

import torch

from shmblocks import (
    BlockHandle,
    BlockPool,
    PoolConfig,
    PoolTimeoutError,
    Reservation,
    ShmBlocksError,
    multimodal_fields,
)

HIDDEN = 3584  # of Qwen2.5-VL-7B
FEATURES = 16
POLL_SECONDS = 0.05  # smaller: a busier wait for blocks; larger: a lost consumer is noticed later
LAST = b"last"  # the message of the last request; without it the producer went away early
LENGTHS = (256, 976, 64, 2000, 1024)  # tokens, one request after the other


def main() -> int:
    args = parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` ends it like Ctrl-C
    config = PoolConfig(total_tokens=8192, fields=multimodal_fields(HIDDEN))
    try:
        with BlockPool.create(args.name, config, role="producer") as pool:
            print(f"pool {args.name!r}: {config.total_blocks} blocks; waiting for a consumer ...")
            wait_for_consumer(pool, args.name, args.timeout)
            serve(pool, args.requests, args.timeout)
    except KeyboardInterrupt:
        print("producer: stopped")
        return 130
    except BrokenPipeError:
        print("producer: the consumer went away before it was done", file=sys.stderr)
        return 1
    except (ShmBlocksError, OSError) as error:  # a TimeoutError is an OSError
        print(f"producer: {error}", file=sys.stderr)
        return 1
    return 0


def wait_for_consumer(pool: BlockPool, name: str, timeout: float) -> None:
    """Until a process has attached with that role."""
    deadline = time.monotonic() + timeout
    while pool.find_participant("consumer") is None:
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"no consumer came within {timeout:g} s; start one: "
                f"python examples/consumer.py --name {name}"
            )
        time.sleep(POLL_SECONDS)


def serve(pool: BlockPool, requests: int, timeout: float) -> None:
    projection = torch.randn(FEATURES, HIDDEN).bfloat16()
    channel = pool.channel("requests")
    for request in range(requests):
        num_tokens = LENGTHS[request % len(LENGTHS)]
        with reserve(pool, num_tokens, timeout) as reserved:
            started = time.perf_counter()
            embed(reserved, num_tokens, request, projection)
            milliseconds = (time.perf_counter() - started) * 1e3
            # Published and announced in one step; from here on we may not write.
            message = LAST if request == requests - 1 else b""
            channel.send(reserved, message=message, timeout=timeout)
        print(row(request, reserved.handle, milliseconds), flush=True)
    total = pool.config.total_blocks
    while pool.available_blocks() < total:  # until the consumer has read everything
        require_consumer(pool)
        time.sleep(POLL_SECONDS)
    print(f"{requests} sent; {pool.available_blocks()} of {total} blocks free")


def reserve(pool: BlockPool, num_tokens: int, timeout: float) -> Reservation:
    """Blocks that are ours until they are sent, or freed at the end of the `with`.

    While the pool is full, `reserve` waits until the consumer releases something. Here the only
    consumer may go away, and then no wait would ever end: so it waits for short times.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            return pool.reserve(num_tokens, timeout=POLL_SECONDS)
        except PoolTimeoutError:
            if time.monotonic() > deadline:
                raise
            require_consumer(pool)


def require_consumer(pool: BlockPool) -> None:
    if pool.find_participant("consumer") is None:
        raise BrokenPipeError


def embed(reserved: Reservation, num_tokens: int, request: int, projection: torch.Tensor) -> None:
    """One request's embeddings, computed where the consumer will read them."""
    features = torch.randn(num_tokens, FEATURES).bfloat16()
    embeddings = reserved["input_embeddings"]  # a tensor over the shared memory
    torch.mm(features, projection, out=embeddings)  # no copy: this is the pool
    reserved["fill_ids"].fill_(request)
    reserved["mrope_positions"].copy_(torch.arange(num_tokens).expand(3, -1))
    reserved.aux[2] = checksum(embeddings)  # words 0 and 1 have meanings, 2 has none


def checksum(embeddings: torch.Tensor) -> int:
    return int(embeddings.view(torch.int16).sum(dtype=torch.int32))


def row(request: int, handle: BlockHandle, milliseconds: float) -> str:
    last = handle.start_block + handle.num_blocks - 1
    return (
        f"request {request:3}  {handle.num_tokens:5} tokens  blocks {handle.start_block:2} to"
        f" {last:2}  made in {milliseconds:7.2f} ms"
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", default="demo", help="the pool's name, the same on both sides")
    parser.add_argument("--requests", type=int, default=12, help="how many to send")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for the other")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
