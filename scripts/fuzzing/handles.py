"""Mutated handles against a pool with allocations in every state.

Right is: an error of ours, or an answer about exactly the allocation that the bytes name. The stamp
in every row shows whose memory a view gives.
"""

from __future__ import annotations

import random

from fuzzing.mutate import mutated
from shmblocks import (
    BlockHandle,
    BlockPool,
    Field,
    MalformedHandleError,
    PoolConfig,
    ShmBlocksError,
)

CONFIG = PoolConfig(
    total_tokens=64 * 4, fields=(Field("stamp", (), "int64"),), block_size=4, max_leases=64
)


def fuzz_handles(name: str, inputs: int, chooser: random.Random) -> dict[str, int]:
    """Counts of what came out. Raises AssertionError on a wrong answer."""
    counts = {"malformed": 0, "refused": 0, "answered": 0}
    with BlockPool.create(name, CONFIG, prefault="off") as pool:
        scene = Scene(pool)
        for _ in range(inputs):
            data = mutated(chooser.choice(scene.encoded), chooser, scene.encoded)
            try:
                handle = BlockHandle.decode(data)
            except MalformedHandleError:
                counts["malformed"] += 1
                continue
            counts["answered" if scene.use(handle, chooser) else "refused"] += 1
        violations = pool.check()
        if violations:
            raise AssertionError(f"after {inputs} handles: {violations}")
    return counts


class Scene:
    """Allocations in every state, made anew when a lucky mutation has changed one."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._leases: list[object] = []
        self.encoded: list[bytes] = []
        self._by_generation: dict[int, BlockHandle] = {}
        self._set()

    def _set(self) -> None:
        pool = self._pool
        handles = []
        for number in range(6):
            handle = pool.alloc(5 + number)
            if handle is None:
                raise AssertionError("blocks are lost")
            pool.view(handle)["stamp"].fill_(handle.generation)
            handles.append(handle)
        for handle in handles[2:]:
            pool.publish(handle, readers=3)
        self._leases = [pool.open(handle) for handle in handles[4:]]
        pool.free(handles[5])
        pool.free(handles[1])
        self.encoded = [handle.encode() for handle in handles]
        self._by_generation = {handle.generation: handle for handle in handles}

    def use(self, handle: BlockHandle, chooser: random.Random) -> bool:
        """Whether the pool answered; the answer is checked."""
        try:
            operation = chooser.randrange(4)
            if operation == 0:
                self._check(self._pool.view(handle)["stamp"].tolist(), handle)
            elif operation == 1:
                with self._pool.open(handle) as lease:
                    self._check(lease["stamp"].tolist(), handle)
            elif operation == 2:
                self._pool.grow(handle, handle.num_tokens)
            else:
                self._pool.free(handle)
        except (ShmBlocksError, ValueError):
            return False
        if not handle.is_fake:
            self._reset()
        return True

    def _check(self, stamps: list[int], handle: BlockHandle) -> None:
        true = self._by_generation.get(handle.generation)
        if handle != true or stamps != [handle.generation] * handle.num_tokens:
            raise AssertionError(f"a wrong view: {handle} gave {stamps}, {true} is there")

    def _reset(self) -> None:
        """Everything back, and the scene anew."""
        self._leases.clear()
        self._pool.available_blocks()
        for allocation in self._pool.allocations():
            self._pool.free(self._pool.handle_at(allocation.start_block))
        self._set()
