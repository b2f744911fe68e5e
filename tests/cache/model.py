"""What the cache of a pool must answer, on top of `tests/core/model.py`: keys, claims, tickets.

The model compares all windows to find the best one: it knows nothing of runs and deques.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from shmblocks import UNBOUNDED, State
from tests.core.model import Allocation, Claim, Model


@dataclass(eq=False)
class Entry:
    """An allocation under a key, and when it was last used."""

    allocation: Allocation
    used: int
    is_held: bool = False


class Item(NamedTuple):
    """Blocks that are free (`used` -1), of an entry that may go, or (no blocks) of another one."""

    start: int
    blocks: int
    used: int
    key: int | None


class CacheModel(Model):
    """A pool with a content cache."""

    def __init__(self, total: int, block_size: int) -> None:
        super().__init__(total, block_size)
        self.entries: dict[int, Entry] = {}  # by key
        self.claims: dict[int, str] = {}  # owners, by key
        self.clock = 0
        self.evicted = 0

    def now(self) -> int:
        self.clock += 1
        return self.clock

    # ---- keys --------------------------------------------------------------------------------

    def entry(self, key: int) -> Entry | None:
        """Of those that are there still: what was freed is under no key."""
        found = self.entries.get(key)
        if found is None:
            return None
        allocation = found.allocation
        is_live = self.live.get(allocation.generation) is allocation
        if not is_live or allocation.state not in (State.PUBLISHED, State.LEASED):
            del self.entries[key]
            return None
        return found

    def publish_under(
        self, allocation: Allocation, tokens: int, readers: int, key: int, is_held: bool
    ) -> Allocation | None:
        """The allocation that the key has already, or None when this one has it now."""
        self.claims.pop(key, None)
        there = self.entry(key)
        if there is not None:
            self.free(allocation)
            return there.allocation
        self.publish(allocation, tokens, readers)
        self.entries[key] = Entry(allocation, self.now(), is_held)
        return None

    def get(self, key: int, claims: list[Claim]) -> Allocation | None:
        there = self.entry(key)
        if there is None or there.allocation.readers_left < len(claims):
            return None
        for claim in claims:
            self.claim(there.allocation, claim)
        there.used = self.now()
        return there.allocation

    def claim(self, allocation: Allocation, claim: Claim) -> None:
        super().claim(allocation, claim)
        if claim.reads and allocation.readers_left >= UNBOUNDED - 1:
            allocation.readers_left = UNBOUNDED

    # ---- eviction ----------------------------------------------------------------------------

    def alloc(self, blocks: int, tokens: int, owner: str) -> Allocation | None:
        made = super().alloc(blocks, tokens, owner)
        if made is not None:
            return made
        window = self.best_window(blocks)
        if window is None:
            return None
        start, victims = window
        for key in victims:
            self.evicted += 1
            self.free(self.entries.pop(key).allocation)
        self.cursor = start
        return super().alloc(blocks, tokens, owner)

    def evictable(self) -> dict[int, tuple[int, Entry]]:
        """By start block: the key and the entry."""
        found = {}
        for key in list(self.entries):
            entry = self.entry(key)
            if (
                entry is not None
                and entry.allocation.readers_left >= UNBOUNDED
                and not entry.allocation.claims
                and not entry.is_held
            ):
                found[entry.allocation.start] = (key, entry)
        return found

    def items(self) -> list[Item]:
        """All blocks, by position."""
        items: list[Item] = []
        at = 0
        others = {each.start: each for each in self.live.values()}
        evictable = self.evictable()
        while at < self.total:
            if at in evictable:
                key, entry = evictable[at]
                items.append(Item(at, entry.allocation.blocks, entry.used, key))
                at += entry.allocation.blocks
            elif at in others:
                items.append(Item(at, 0, 0, None))
                at += others[at].blocks
            else:
                end = at
                while end < self.total and end not in others:
                    end += 1
                items.append(Item(at, end - at, -1, None))
                at = end
        return items

    def best_window(self, blocks: int) -> tuple[int, list[int]] | None:
        """Of all runs of items that hold so many blocks: the one whose youngest victim is the
        oldest; of equal ones the shortest that ends first."""
        items = self.items()
        best: tuple[int, int, int] | None = None
        for last in range(len(items)):
            size, first = 0, last
            while first >= 0 and items[first].blocks:
                size += items[first].blocks
                if size >= blocks:
                    break
                first -= 1
            if first < 0 or size < blocks or not items[first].blocks:
                continue
            youngest = max(item.used for item in items[first : last + 1])
            if best is None or youngest < best[0]:
                best = (youngest, first, last)
        if best is None:
            return None
        window = items[best[1] : best[2] + 1]
        return window[0].start, [item.key for item in window if item.key is not None]

    # ---- claims ------------------------------------------------------------------------------

    def want(self, key: int, who: str) -> str:
        if self.entry(key) is not None:
            return "ready"
        owner = self.claims.get(key)
        if owner is not None and owner not in self.dead:
            return "busy"
        self.claims[key] = who
        return "mine"

    # ---- deaths ------------------------------------------------------------------------------

    def leave(self, who: str) -> None:
        super().leave(who)
        for key in [key for key, owner in self.claims.items() if owner == who]:
            del self.claims[key]
