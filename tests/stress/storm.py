"""What one worker does to the pool: everything, at random, and believing nothing that it reads.

Every row of a payload carries a stamp that no other allocation ever has: the allocation's
generation. Who gets a handle, from whomever, checks every row before it lets go; who lets go spoils
every row first, so that a reader of freed blocks sees it.
"""

from __future__ import annotations

import random
import threading

from shmblocks import BlockHandle, BlockPool, InvalidStateError, Lease, StaleHandleError
from tests.stress.arena import BLOCK_SIZE, STAMP, Box

# Allocations that one storm keeps at most, so that all of them together find room.
KEEPS = 6


class Payload:
    """The stamps of one allocation, in place; without torch, so that workers start at once."""

    def __init__(self, pool: BlockPool, handle: BlockHandle) -> None:
        segment, layout = pool.state.segment, pool.state.layout
        first = layout.fields[STAMP.name] // 8 + handle.start_block * BLOCK_SIZE
        self._words = segment.words[first : first + handle.num_tokens]
        self._handle = handle

    def write(self, stamp: int) -> None:
        self._words[:] = memoryview(stamp.to_bytes(8, "little") * len(self._words)).cast("Q")

    def require(self, stamp: int) -> None:
        seen = set(self._words.tolist())
        assert seen == {stamp}, f"{self._handle}: expected only {stamp} in it, got {seen}"


class Storm:
    """One thread's or process's share."""

    def __init__(self, pool: BlockPool, box: Box, seed: str) -> None:
        self.pool = pool
        self.box = box
        self.random = random.Random(seed)
        self.mine: list[BlockHandle] = []
        self.leases: list[Lease] = []
        self.counts = {"made": 0, "read": 0, "freed for others": 0, "refused": 0}

    def run(self, steps: int) -> dict[str, int]:
        acts = (self.make, self.make, self.grow, self.give, self.take, self.take, self.read_own,
                self.release, self.free, self.misuse)  # fmt: skip
        for _ in range(steps):
            self.random.choice(acts)()
        self.stop()
        return self.counts

    def stop(self) -> None:
        """Give back everything that is ours."""
        while self.leases:
            self.release()
        while self.mine:
            self.free()

    def pick(self) -> BlockHandle:
        return self.mine.pop(self.random.randrange(len(self.mine)))

    # ---- what it does ------------------------------------------------------------------------

    def make(self) -> None:
        """Reserve and stamp."""
        if len(self.mine) >= KEEPS:
            self.free()
        size = self.random.choice((1, 7, BLOCK_SIZE, 40, 100, self.random.randint(1, 300)))
        how = self.random.random()
        handle = self.pool.alloc_default("stress") if how < 0.2 else self.pool.alloc(size, "stress")
        if handle is None:
            self.counts["refused"] += 1
            return
        Payload(self.pool, handle).write(handle.generation)
        self.mine.append(handle)
        self.counts["made"] += 1

    def grow(self) -> None:
        """In place; what was written must still be there."""
        if not self.mine:
            return
        handle = self.pick()
        grown = self.pool.grow(handle, handle.num_tokens + self.random.randint(0, 30))
        Payload(self.pool, handle).require(handle.generation)
        self.mine.append(grown or handle)
        Payload(self.pool, self.mine[-1]).write(handle.generation)

    def give(self) -> None:
        """Publish for somebody else, with a lease more than there are readers, or one reader."""
        if not self.mine:
            return
        handle = self.pool.publish(self.pick(), readers=self.random.choice((1, 1, 2)))
        if not self.box.put(handle):
            self.spoil_and_free(handle)

    def take(self) -> None:
        """Read what somebody gave away; sometimes free it unread, though another allocated it."""
        handle = self.box.take()
        if handle is None:
            return
        if self.random.random() < 0.3:
            self.counts["freed for others"] += 1
            self.spoil_and_free(handle)
            return
        lease = self.pool.open(handle)
        Payload(self.pool, handle).require(handle.generation)
        self.leases.append(lease)
        self.counts["read"] += 1

    def read_own(self) -> None:
        """Publish and read at once, as a whole request in one process."""
        if not self.mine:
            return
        handle = self.pool.publish(self.pick())
        with self.pool.open(handle):
            Payload(self.pool, handle).require(handle.generation)
            Payload(self.pool, handle).write(0)

    def release(self) -> None:
        """Let go of something read; of what had two readers the second may come or not."""
        if not self.leases:
            return
        lease = self.leases.pop(self.random.randrange(len(self.leases)))
        Payload(self.pool, lease.handle).require(lease.handle.generation)
        lease.release()
        try:
            self.pool.free(lease.handle)  # it had a second reader
        except StaleHandleError:
            pass

    def free(self) -> None:
        """What was never published."""
        if not self.mine:
            return
        handle = self.pick()
        Payload(self.pool, handle).require(handle.generation)
        self.spoil_and_free(handle)

    def spoil_and_free(self, handle: BlockHandle) -> None:
        Payload(self.pool, handle).write(0)
        self.pool.free(handle)

    def misuse(self) -> None:
        """What is refused must change nothing for those who do it right."""
        if not self.mine:
            return
        handle = self.mine[-1]
        for change in (1, 2**40):
            forged = BlockHandle(
                handle.start_block, handle.num_blocks, handle.num_tokens,
                handle.generation + change, handle.pool_id,
            )  # fmt: skip
            try:
                self.pool.free(forged)
            except StaleHandleError:
                continue
            raise AssertionError(f"{forged} was freed")
        try:
            self.pool.open(handle).release()
        except InvalidStateError:
            return
        raise AssertionError(f"{handle} was read before it was published")


def storm_in_threads(pool: BlockPool, box: Box, seed: str, steps: int, count: int) -> None:
    """Several storms in one process; the first error of any is raised here."""
    errors: list[BaseException] = []

    def body(number: int) -> None:
        try:
            Storm(pool, box, f"{seed}-{number}").run(steps)
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=body, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
