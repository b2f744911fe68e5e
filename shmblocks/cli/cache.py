"""`shmblocks cache stat|bump|clear NAME`: the content cache of a pool."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import msgspec

from shmblocks._state.info import CacheStats, EntryInfo
from shmblocks._words import bytes_text, count_text
from shmblocks.cli.commands import Answer, Command, add_name
from shmblocks.cli.render import (
    Document,
    Line,
    Text,
    age_text,
    facts,
    joined,
    line,
    share_text,
    table,
)
from shmblocks.inspector import PoolInspector

# Rows of entries. Smaller: less of a cache is seen. Larger: the facts scroll away. JSON has all.
MOST_ENTRIES = 20
_ENTRIES = "key | >blocks | >tokens | >leases | >hits | >age | >unused for | "


class CacheReport(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `shmblocks cache`: the cache at the end of the command.

    `entries`: the one that was used the longest ago first; `cleared`: how many were dropped.
    """

    name: str
    stats: CacheStats
    entries: list[EntryInfo]
    cleared: int = 0


def _cache(arguments: Namespace) -> Answer:
    cleared = 0
    with PoolInspector(arguments.name) as pool:
        if arguments.action == "bump":
            pool.bump_epoch()
        elif arguments.action == "clear":
            cleared = pool.drop_all()
        report = CacheReport(
            name=pool.name, stats=pool.cache_stats(), entries=pool.entries(), cleared=cleared
        )
    if arguments.action == "bump":
        return Answer(report, [line(f"{report.name}: keys are made in epoch {report.stats.epoch}")])
    if arguments.action == "clear":
        return Answer(report, [_cleared(report)])
    return Answer(report, _show(report))


def _cleared(report: CacheReport) -> Line:
    dropped = count_text(report.cleared, "entry", "entries")
    return line(f"{report.name}: dropped {dropped}; leased ones go when they are released")


def _show(report: CacheReport) -> Document:
    rows = [_entry(each) for each in report.entries[:MOST_ENTRIES]]
    left_out = len(report.entries) - len(rows)
    more = [line(Text(f"  and {left_out} more (--json has all)", "dim"))] if left_out else []
    title = "entries, the one that was used the longest ago first"
    return joined(
        facts(report.name, _facts(report.stats)),
        [*table(title, _ENTRIES, rows, "none"), *more],
    )


def _facts(stats: CacheStats) -> list[tuple[str, Line]]:
    entries = f"{stats.entries} in {bytes_text(stats.bytes_in_entries)}"
    busy = f"{stats.leased_entries} leased, {stats.held_entries} held"
    lookups = f"{stats.lookups}: {stats.hits} hits, {stats.misses} misses"
    rate = share_text(stats.hits, stats.lookups)
    puts = f"{stats.puts}, {stats.duplicates} duplicates, {stats.skipped} without room"
    claims = f"{stats.claims} open, {stats.takeovers} taken over, {stats.waits} waits"
    return [
        ("epoch", line(str(stats.epoch))),
        ("entries", line(f"{entries}: {busy}")),
        ("lookups", line(f"{lookups}, {stats.mismatches} mismatches; hit rate {rate}")),
        ("puts", line(puts)),
        ("evictions", line(f"{stats.evictions}, {bytes_text(stats.evicted_bytes)}")),
        ("claims", line(claims)),
    ]


def _entry(info: EntryInfo) -> Line:
    held = f"held for {age_text(info.hold_seconds)}" if info.hold_seconds else ""
    return (
        Text(_key_text(info.key)),
        Text(str(info.num_blocks)),
        Text(str(info.num_tokens)),
        Text(str(info.leases)),
        Text(str(info.hits)),
        Text(age_text(info.age_seconds)),
        Text(age_text(info.unused_seconds)),
        Text(held, "dim"),
    )


def _key_text(key: bytes) -> str:
    """A key of 16 bytes stands there with as many zeros behind it."""
    half = len(key) // 2
    return (key if any(key[half:]) else key[:half]).hex()


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=("stat", "bump", "clear"),
        help="show it; raise the epoch of its keys; drop all entries",
    )
    add_name(parser)


CACHE = Command(
    name="cache",
    summary="the content cache of a pool: show it, raise its epoch, drop its entries",
    description=(
        "stat   hits, puts, evictions and the entries, the next victims first\n"
        "bump   raise the epoch: keys that are made from now on reach nothing older. For weights\n"
        "       that were changed: pause the encoders, bump, resume\n"
        "clear  drop every entry; one that is leased goes with its last lease"
    ),
    examples=(
        ("shmblocks cache stat my-pool", "what it holds, and what it has saved"),
        ("shmblocks cache bump my-pool", "after the weights were changed"),
        ("shmblocks cache stat my-pool --json | jq .stats.hits", "for scripts"),
    ),
    reports=(CacheReport,),
    run=_cache,
    add_arguments=_add_arguments,
)
