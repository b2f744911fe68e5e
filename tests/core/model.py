"""What a pool must answer, told in the plainest way: a list of blocks and a cursor.

The model knows no bitmap, journal, record or lock. It is wrong to make it faster or shorter than
the words of the behaviour that it stands for.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shmblocks import BlockHandle, State


@dataclass(eq=False)
class Claim:
    """One lease: who has it, and whether it reads or writes."""

    holder: str
    reads: bool


@dataclass(eq=False)
class Allocation:
    """One allocation that lives."""

    start: int
    blocks: int
    tokens: int
    generation: int
    owner: str
    state: State = State.RESERVED
    readers_left: int = 0
    claims: list[Claim] = field(default_factory=list)


class Model:
    """A pool of `total` blocks of `block_size` tokens."""

    def __init__(self, total: int, block_size: int) -> None:
        self.total = total
        self.block_size = block_size
        self.cursor = 0
        self.generation = 1
        self.live: dict[int, Allocation] = {}  # by generation
        self.dead: set[str] = set()

    # ---- blocks ------------------------------------------------------------------------------

    def is_free(self, block: int) -> bool:
        return not any(
            each.start <= block < each.start + each.blocks for each in self.live.values()
        )

    @property
    def free_blocks(self) -> int:
        return sum(self.is_free(block) for block in range(self.total))

    def find(self, blocks: int) -> int | None:
        """Next fit: from the cursor to the end, then from the beginning."""
        starts: list[int] = [*range(self.cursor, self.total), *range(self.cursor)]
        for start in starts:
            wanted = range(start, start + blocks)
            if start + blocks <= self.total and all(map(self.is_free, wanted)):
                return start
        return None

    def alloc(self, blocks: int, tokens: int, owner: str) -> Allocation | None:
        start = self.find(blocks)
        if start is None and self.dead:
            self.reap()
            start = self.find(blocks)
        if start is None:
            return None
        made = Allocation(start, blocks, tokens, self.generation, owner)
        self.live[made.generation] = made
        self.generation += 1
        self.cursor = (start + blocks) % self.total
        return made

    def grow(self, allocation: Allocation, tokens: int) -> bool:
        blocks = max(-(-tokens // self.block_size), allocation.blocks)
        old_end, new_end = allocation.start + allocation.blocks, allocation.start + blocks
        if new_end > self.total or not all(map(self.is_free, range(old_end, new_end))):
            return False
        allocation.blocks, allocation.tokens = blocks, tokens
        if old_end <= self.cursor < new_end:
            self.cursor = new_end % self.total
        return True

    # ---- states ------------------------------------------------------------------------------

    def knows(self, handle: BlockHandle, *, exactly: bool = True) -> Allocation | None:
        """The allocation that the handle names; None when the handle is stale."""
        found = self.live.get(handle.generation)
        if found is None or found.start != handle.start_block:
            return None
        sizes = (found.blocks, found.tokens)
        return found if not exactly or sizes == (handle.num_blocks, handle.num_tokens) else None

    def free(self, allocation: Allocation) -> None:
        if allocation.claims:
            allocation.state, allocation.readers_left = State.DRAINING, 0
        else:
            del self.live[allocation.generation]

    def publish(self, allocation: Allocation, tokens: int, readers: int) -> None:
        allocation.state = State.PUBLISHED
        allocation.tokens, allocation.readers_left = tokens, readers

    def can_open(self, allocation: Allocation) -> bool:
        return allocation.state in (State.PUBLISHED, State.LEASED) and allocation.readers_left > 0

    def claim(self, allocation: Allocation, claim: Claim) -> None:
        if claim.reads:
            allocation.state = State.LEASED
            allocation.readers_left -= 1
        allocation.claims.append(claim)

    def release(self, allocation: Allocation, claim: Claim) -> None:
        allocation.claims.remove(claim)
        if allocation.claims:
            return
        if allocation.state is State.LEASED and allocation.readers_left:
            allocation.state = State.PUBLISHED
        elif allocation.state in (State.LEASED, State.DRAINING):
            del self.live[allocation.generation]

    # ---- deaths ------------------------------------------------------------------------------

    def leave(self, who: str) -> None:
        """What `who` held comes back: an orderly end, or the reaping of the dead."""
        for allocation in list(self.live.values()):
            for claim in [each for each in allocation.claims if each.holder == who]:
                self.release(allocation, claim)
        for allocation in list(self.live.values()):
            if allocation.owner == who and allocation.state is State.RESERVED:
                self.free(allocation)

    def die(self, who: str) -> None:
        self.dead.add(who)

    def reap(self) -> None:
        for who in self.dead:
            self.leave(who)
        self.dead.clear()
