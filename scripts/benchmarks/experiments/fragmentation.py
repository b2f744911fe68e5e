"""How full a pool gets before it refuses a request, for three ways to choose among free runs.

The trace is a recording made here: images of RESOLUTIONS, drawn evenly, become as many tokens as
Qwen2.5-VL's image processor makes of them; each request stays for a random time, exponential with
a mean that grows slowly, so that ever more of them are there together. Every policy gets the same
trace. Measured at its *first refusal*: how many of the pool's blocks were in use.

What no allocator that keeps a request in consecutive blocks can do better than, whatever it knows
of the future: to refuse nothing until a request comes for which fewer blocks are free in all. That
moment (`bound`) is the same for all; a policy is compared with it by how many blocks were in use.

Source of the token counts: `smart_resize` of the Qwen2-VL image processor in transformers (patches
of 14 pixels merged 2 x 2, both sides rounded to multiples of 28, at most 12,845,056 pixels).
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.experiments.internals import find_zeros
from benchmarks.report import Experiment

FACTOR = 28
MOST_PIXELS = 12_845_056
LEAST_PIXELS = 3_136
BLOCK_SIZE = 128
# Width and height in pixels: thumbnails, web images, screens, phone photographs, scanned pages.
RESOLUTIONS = (
    (224, 224), (336, 336), (512, 512), (640, 480), (800, 600), (1024, 768), (1024, 1024),
    (1280, 720), (1600, 1200), (1920, 1080), (1654, 2339), (2048, 1536), (2560, 1440),
    (3024, 4032), (2480, 3508),
)  # fmt: skip

# Position of `count` free blocks, given the bitmap, its width and where the last search ended.
Policy = Callable[[int, int, int, int], int]


class Request(NamedTuple):
    """A request of the trace: it needs so many blocks, until so many requests have come."""

    blocks: int
    until: float


def image_tokens(width: int, height: int) -> int:
    """Tokens that Qwen2.5-VL makes of an image."""
    w, h = (max(FACTOR, round(side / FACTOR) * FACTOR) for side in (width, height))
    if w * h > MOST_PIXELS:
        shrink = (width * height / MOST_PIXELS) ** 0.5
        w, h = (int(side / shrink / FACTOR) * FACTOR for side in (width, height))
    elif w * h < LEAST_PIXELS:
        grow = (LEAST_PIXELS / (width * height)) ** 0.5
        w, h = (-int(-side * grow // FACTOR) * FACTOR for side in (width, height))
    return (w // FACTOR) * (h // FACTOR)


def trace(seed: int, pool_blocks: int) -> list[Request]:
    """Requests in the order of their coming, until the pool is overloaded for certain."""
    chooser = random.Random(seed)
    sizes = [-(-image_tokens(*size) // BLOCK_SIZE) for size in RESOLUTIONS]
    mean = statistics.mean(sizes)
    requests: list[Request] = []
    load = 0.3  # of the pool, on average; grows to 1.5
    while load < 1.5:
        lifetime = chooser.expovariate(1 / (load * pool_blocks / mean))
        requests.append(Request(chooser.choice(sizes), len(requests) + lifetime))
        load += 0.0002
    return requests


def next_fit(used: int, width: int, count: int, cursor: int) -> int:
    found = find_zeros(used >> cursor, width - cursor, count)
    return cursor + found if found >= 0 else find_zeros(used, width, count)


def first_fit(used: int, width: int, count: int, cursor: int) -> int:
    return find_zeros(used, width, count)


def best_fit(used: int, width: int, count: int, cursor: int) -> int:
    """The start of the shortest free run that is long enough; the lowest of several."""
    best, best_length = -1, width + 1
    start = 0
    while start < width:
        free = ~(used >> start)
        start += (free & -free).bit_length() - 1
        if start >= width:
            break
        rest = used >> start
        length = (rest & -rest).bit_length() - 1 if rest else width - start
        if count <= length < best_length:
            best, best_length = start, length
        start += length
    return best


POLICIES: dict[str, Policy] = {
    "next fit (used)": next_fit,
    "first fit": first_fit,
    "best fit": best_fit,
}


class Outcome(NamedTuple):
    """At the first refusal: blocks in use; and the median rest of blocks before their reuse."""

    in_use: int
    rest: float


def play(requests: list[Request], policy: Policy, width: int) -> Outcome:
    """Serve the trace until a request is refused."""
    used = cursor = 0
    there: list[tuple[float, int, int]] = []
    freed_at = [-1] * width
    rests: list[int] = []
    for now, request in enumerate(requests):
        for until, start, blocks in [entry for entry in there if entry[0] <= now]:
            used &= ~(((1 << blocks) - 1) << start)
            freed_at[start : start + blocks] = [now] * blocks
            there.remove((until, start, blocks))
        start = policy(used, width, request.blocks, cursor)
        if start < 0:
            return Outcome(used.bit_count(), statistics.median(rests or [0]))
        used |= ((1 << request.blocks) - 1) << start
        cursor = (start + request.blocks) % width
        there.append((request.until, start, request.blocks))
        rests += [now - then for then in freed_at[start : start + request.blocks] if then >= 0]
    return Outcome(used.bit_count(), statistics.median(rests or [0]))


def bound(requests: list[Request], width: int) -> int:
    """Blocks in use when fewer are free in all than a request needs: nobody can serve it."""
    there: list[Request] = []
    for now, request in enumerate(requests):
        there = [one for one in there if one.until > now]
        in_use = sum(one.blocks for one in there)
        if in_use + request.blocks > width:
            return in_use
        there.append(request)
    return sum(one.blocks for one in there)


def fragmentation(pool_blocks: int, seeds: int) -> Experiment:
    traces = [trace(seed, pool_blocks) for seed in range(seeds)]
    best = [bound(requests, pool_blocks) for requests in traces]
    rows, numbers = [], {}
    for name, policy in POLICIES.items():
        outcomes = [play(requests, policy, pool_blocks) for requests in traces]
        full = statistics.median(outcome.in_use / pool_blocks for outcome in outcomes)
        against = statistics.median(
            outcome.in_use / most for outcome, most in zip(outcomes, best, strict=True)
        )
        rest = statistics.median(outcome.rest for outcome in outcomes)
        numbers[f"{name}: in use at the first refusal"] = full
        rows.append([name, f"{full:.1%}", f"{against:.1%}", f"{rest:.0f}"])
    most = statistics.median(blocks / pool_blocks for blocks in best)
    rows.append(["no contiguous allocator can beat", f"{most:.1%}", "100.0%", ""])
    sizes = sorted(image_tokens(*size) for size in RESOLUTIONS)
    return Experiment(
        name="fragmentation",
        title=f"How full a pool of {pool_blocks} blocks is at its first refusal",
        note=f"Medians of {seeds} traces of images of {sizes[0]} to {sizes[-1]:,} tokens "
        f"(median {statistics.median(sizes):,.0f}), {len(RESOLUTIONS)} resolutions drawn evenly, "
        "tokens as Qwen2.5-VL's image processor makes them. Rest: how many requests come before a "
        "freed block is used again, which is how long a late reader's bug can show.",
        header=["", "in use", "of the bound", "rest"],
        rows=rows,
        numbers=numbers,
    )
