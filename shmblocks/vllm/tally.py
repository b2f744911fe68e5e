"""Counts of one side of a connector: what they are, and how they are collected."""

from __future__ import annotations

# Name and meaning of each; in Prometheus `vllm:ec_shmblocks_NAME_total`.
COUNTS = {
    "hits": "items that were in the pool, and were not encoded",
    "misses": "items that had to be encoded here",
    "waits": "requests that waited for another instance that encoded their item, or for a node",
    "wait_seconds": "seconds that those requests waited",
    "lost": "requests without media that failed, since their item is not in the pool any more",
    "mismatches": "items in the pool of another size than expected: a reused uuid",
    "loads": "items that workers loaded from the pool, by each rank",
    "load_bytes": "bytes of those",
    "load_seconds": "seconds that workers spent on loading (CUDA: on enqueuing it)",
    "saves": "items that workers put into the pool",
    "save_bytes": "bytes of those",
    "save_seconds": "seconds that workers spent on saving (CUDA: on enqueuing it)",
    "fetches": "items that were fetched from another node, and were not encoded",
    "fetch_bytes": "bytes of those",
    "fetch_seconds": "seconds that those took",
    "fetch_misses": "items that were asked of the node that owns them, which had not got them",
    "fetch_failures": "fetches that failed: the owner is dead, slow, or not one of ours",
    "no_room": "items that were not put into the pool, since nothing could be evicted",
    "lock_timeouts": "lookups given up, since another process held the pool's lock too long",
}


class Tally:
    """Counts since the last `drain`, and since the start."""

    def __init__(self) -> None:
        self.totals: dict[str, float] = {}
        self._since: dict[str, float] = {}

    def add(self, name: str, amount: float = 1) -> None:
        """`name`: one of `COUNTS`."""
        self.totals[name] = self.totals.get(name, 0) + amount
        self._since[name] = self._since.get(name, 0) + amount

    def drain(self) -> dict[str, float]:
        """What was counted since the last call; empty: nothing."""
        since, self._since = self._since, {}
        return since


def add_up(into: dict[str, float], other: dict[str, float]) -> None:
    """Add the counts of `other` to `into`."""
    for name, amount in other.items():
        into[name] = into.get(name, 0) + amount
