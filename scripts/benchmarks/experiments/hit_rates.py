"""Hit rates of the content cache against an ideal LRU, on traces of images of real sizes.

The pool is a real one (a byte pool without its bytes), and so is everything that runs: `touch` for
a lookup, `reserve` and `publish` for a miss, and the eviction inside. One process asks, so that a
trace gives the same rates each time.

The ideal keeps the most recently used items that fit its *bytes*: it knows no blocks, no rounding
and no fragmentation. A cache of consecutive blocks loses against it by all three, and may win where
least recently used is not the best order to evict in (a cyclic trace: there it is the worst).

Between the two stands a *paged* cache: least recently used over blocks that need not be in a row.
It rounds to blocks and knows no fragmentation, so that what it is ahead of the pool by is the most
that moving entries together could win. How often moving alone would have made room without an
eviction (enough blocks were free, but not in a row) is counted, too.

    sizes    64 to 16,384 tokens of 7,168 bytes (3,584 x bf16), lognormal with a median of 800
    zipf     popularity of item n: 1 / n**s, in random order
    cyclic   all items in turn, again and again
    scan     zipf 0.9; every fifth request is for an item that never comes again
"""

from __future__ import annotations

import itertools
import random
import secrets
from collections import OrderedDict
from typing import NamedTuple

from benchmarks.report import Experiment
from shmblocks import UNBOUNDED, BlockPool, PoolConfig, content_key
from shmblocks.config import Allocation

TOKEN_BYTES = 7168
BLOCK_BYTES = 64 * 1024
MEDIAN_TOKENS, SPREAD = 800, 1.1
LEAST_TOKENS, MOST_TOKENS = 64, 16_384
# A pool of so many parts of the bytes of all items that a trace asks for.
SHARES = {"1/10": 1 / 10, "1/6": 1 / 6, "1/2": 1 / 2}
POLICIES: tuple[Allocation, ...] = ("next fit", "first fit")


class Trace(NamedTuple):
    """Items that are asked for, in order; and the bytes of each."""

    requests: list[int]
    sizes: dict[int, int]


class Rate(NamedTuple):
    """Of the requests after the first ones: how many were hits, and how many of their bytes."""

    items: float
    bytes: float


def traces(items: int, requests: int, seed: int) -> dict[str, Trace]:
    """Those of the table."""
    chooser = random.Random(seed)
    sizes = {item: _size(chooser) for item in range(items)}
    made = {
        f"zipf {exponent}": Trace(_zipf(items, requests, exponent, chooser), sizes)
        for exponent in (0.6, 0.9, 1.1)
    }
    made["cyclic"] = Trace([number % items for number in range(requests)], sizes)
    fresh = itertools.count(items)
    scanned = [
        next(fresh) if number % 5 == 4 else item
        for number, item in enumerate(_zipf(items, requests, 0.9, chooser))
    ]
    more = {item: _size(chooser) for item in scanned if item >= items}
    made["scan"] = Trace(scanned, {**sizes, **more})
    return made


def _size(chooser: random.Random) -> int:
    tokens = MEDIAN_TOKENS * 2.718281828 ** chooser.gauss(0, SPREAD)
    return TOKEN_BYTES * int(min(max(tokens, LEAST_TOKENS), MOST_TOKENS))


def _zipf(items: int, requests: int, exponent: float, chooser: random.Random) -> list[int]:
    order = list(range(items))
    chooser.shuffle(order)
    weights = [1 / rank**exponent for rank in range(1, items + 1)]
    return chooser.choices(order, weights, k=requests)


def ideal(trace: Trace, capacity: int) -> Rate:
    """Least recently used of so many bytes, wherever they lie."""
    return _rate(trace, _least_recently_used(trace.requests, trace.sizes, capacity))


def _least_recently_used(requests: list[int], sizes: dict[int, int], capacity: int) -> list[bool]:
    """Which requests are hits."""
    there: OrderedDict[int, int] = OrderedDict()
    used = 0
    hits = []
    for item in requests:
        size = sizes[item]
        hits.append(item in there)
        if item in there:
            there.move_to_end(item)
        elif size <= capacity:
            while used + size > capacity:
                used -= there.popitem(last=False)[1]
            there[item] = size
            used += size
    return hits


def paged(trace: Trace, capacity: int) -> Rate:
    """Least recently used of so many bytes, in blocks that may lie anywhere."""
    rounded = {item: -(-size // BLOCK_BYTES) * BLOCK_BYTES for item, size in trace.sizes.items()}
    return _rate(trace, _least_recently_used(trace.requests, rounded, capacity))


class Cached(NamedTuple):
    """What the pool's own code came to."""

    rate: Rate
    # Of the misses: those for which enough blocks were free, but not in a row.
    scattered: float


def cached(trace: Trace, capacity: int, allocation: Allocation) -> Cached:
    """The pool's own code."""
    blocks = capacity // BLOCK_BYTES
    config = PoolConfig(
        total_tokens=blocks, block_size=1, default_num_blocks=1, allocation=allocation
    )
    name = f"bench-hits-{secrets.token_hex(4)}"
    hits = []
    misses = scattered = 0
    with BlockPool.create(name, config, prefault="off") as pool:
        for item in trace.requests:
            key = content_key(b"trace", str(item))
            is_hit = pool.touch(key)
            hits.append(is_hit)
            size = -(-trace.sizes[item] // BLOCK_BYTES)
            if is_hit or size > blocks:
                continue
            stats = pool.stats()
            misses += 1
            scattered += stats.free_blocks >= size > stats.largest_free_run
            reservation = pool.reserve_now(size)
            if reservation is not None:
                with reservation:
                    reservation.publish(readers=UNBOUNDED, key=key)
    return Cached(_rate(trace, hits), scattered / max(misses, 1))


def _rate(trace: Trace, hits: list[bool]) -> Rate:
    """Without the first tenth, in which everything is new."""
    first = len(hits) // 10
    counted = list(zip(trace.requests[first:], hits[first:], strict=True))
    total = sum(trace.sizes[item] for item, _ in counted)
    found = sum(trace.sizes[item] for item, is_hit in counted if is_hit)
    return Rate(sum(is_hit for _, is_hit in counted) / len(counted), found / total)


def hit_rates(items: int, requests: int, seed: int) -> Experiment:
    rows, numbers = [], {}
    worst: dict[str, float] = {}
    for name, trace in traces(items, requests, seed).items():
        whole = sum(trace.sizes[item] for item in range(items))
        for share, part in SHARES.items():
            capacity = int(whole * part) // BLOCK_BYTES * BLOCK_BYTES
            best, in_pages = ideal(trace, capacity), paged(trace, capacity)
            row = [name, share]
            row += [f"{part:.1%}" for part in (*best, *in_pages)]
            for policy in POLICIES:
                rate, scattered = cached(trace, capacity, policy)
                row += [f"{part:.1%}" for part in (*rate, scattered)]
                numbers[f"{name} {share} {policy} scattered"] = scattered
                for what, got, most in zip(("items", "bytes"), rate, best, strict=True):
                    key = f"{policy}, {what}: least part of the ideal's"
                    numbers[f"{name} {share} {policy} {what}"] = got
                    if most:
                        worst[key] = min(worst.get(key, 9.0), got / most)
            rows.append(row)
    return Experiment(
        name="hit_rates",
        title=f"Hit rates of {requests:,} requests for {items:,} images, items and bytes",
        note="Sizes lognormal, 64 to 16,384 tokens; a pool of that part of the bytes of all items; "
        "the ideal is a least-recently-used cache over bytes, without blocks and fragmentation; "
        "paged: over blocks that need not be in a row; scattered: the misses for which enough "
        "blocks were free, but not in a row. "
        + "; ".join(f"{key}: {value:.1%}" for key, value in worst.items()),
        header=[
            *("trace", "pool", "ideal", "", "paged", ""),
            *itertools.chain(*((policy, "", "scattered") for policy in POLICIES)),
        ],
        rows=rows,
        numbers={**numbers, **worst},
    )
