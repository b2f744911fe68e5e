"""Mutated transfer messages against both endpoints with rooms in the middle of their work.

Right is: no exception out of `poll`, no block lost, and a transfer that succeeds afterwards is
right.
"""

from __future__ import annotations

import queue
import random

import torch

from fuzzing.mutate import mutated
from shmblocks import BlockPool, Field, PoolConfig
from shmblocks.transfer import EmbeddingEndpoint, LanguageEndpoint

# Messages to one pair of endpoints before it is made anew.
PER_PAIR = 400


class Recording(queue.SimpleQueue):  # type: ignore[type-arg]
    """A queue that remembers what went through it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bytes] = []

    def put(self, item: bytes, block: bool = True, timeout: float | None = None) -> None:
        self.seen.append(item)
        super().put(item)

    def put_nowait(self, item: bytes) -> None:
        self.put(item)


def fuzz_messages(name: str, inputs: int, chooser: random.Random) -> dict[str, int]:
    """Counts of messages and pairs. Raises on anything that is wrong."""
    config = PoolConfig(
        total_tokens=64 * 4,
        fields=(Field("stamp", (), "int64"),),
        block_size=4,
        default_num_blocks=2,
    )
    counts = {"messages": 0, "pairs": 0, "transfers": 0}
    with BlockPool.create(name, config, prefault="off") as pool:
        while counts["messages"] < inputs:
            counts["transfers"] += _one_pair(pool, chooser)
            counts["messages"] += PER_PAIR
            counts["pairs"] += 1
            if pool.available_blocks() != config.total_blocks or pool.check():
                raise AssertionError(f"blocks are lost: {pool.allocations()} {pool.check()}")
    return counts


def _one_pair(pool: BlockPool, chooser: random.Random) -> int:
    there, back = Recording(), Recording()
    data = {"stamp": torch.arange(30, dtype=torch.int64)}
    right = 0
    with (
        EmbeddingEndpoint(pool, there, back) as sending,
        LanguageEndpoint(pool, back, there) as receiving,
    ):
        for room in range(1, 5):
            receiver = receiving.receive(room, mode="landing" if room % 2 else "push")
            sending.send(room, data)
            for _ in range(PER_PAIR // 4):
                known = there.seen + back.seen
                connection = chooser.choice((there, back))
                queue.SimpleQueue.put(connection, mutated(chooser.choice(known), chooser, known))
                if chooser.random() < 0.3:
                    chooser.choice((sending, receiving)).poll()
            for _ in range(20):
                sending.poll()
                receiving.poll()
            result = receiver.result
            if result is not None:
                right += 1
                if not torch.equal(result["stamp"], data["stamp"]):
                    raise AssertionError(f"room {room} gave {result['stamp']}")
                result.release()
    return right
