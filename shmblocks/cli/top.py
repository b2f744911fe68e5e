"""`shmblocks top`: a live picture of this node's pools in the terminal.

Each refresh reads every pool once, without joining it, and writes one frame: for each pool its
use, what the cache saves, who waits for blocks, and its blocks in one row (the marks of `map`).
Plain ANSI; where there is no terminal, or one that knows no ANSI (TERM=dumb), frames follow each
other as plain text.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import termios
import time
import tty
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import msgspec

from shmblocks._state.info import CounterValues, PoolSnapshot, PoolStats, WaiterInfo
from shmblocks._words import bytes_text, count_text
from shmblocks.cli.commands import Answer, Command, pool_name
from shmblocks.cli.map import Span, draw, merged
from shmblocks.cli.render import (
    Document,
    Line,
    Text,
    age_text,
    clipped,
    joined,
    line,
    line_text,
    participant_text,
    share_text,
    state_text,
    wants_colours,
    write_text,
)
from shmblocks.errors import (
    DamagedPoolError,
    IncompatiblePoolError,
    PoolNotFoundError,
    ShmBlocksError,
)
from shmblocks.inspector import PoolInspector, pool_names

# Seconds that a refresh waits for the lock of each pool, as in `metrics`.
LOCK_TIMEOUT = 0.25
# Waiters named for each pool. Smaller: one sees less of who waits. Larger: fewer pools fit.
MOST_WAITERS = 3

_ENTER = "\x1b[?1049h\x1b[?25l"  # the alternate screen, no cursor
_LEAVE = "\x1b[?25h\x1b[?1049l"
_HOME, _REST_OF_LINE, _REST_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


class TopPool(msgspec.Struct, frozen=True, kw_only=True):
    """One pool in `shmblocks top`. `state` is `locked` when a stopped process holds its lock;
    `snapshot` is null when it cannot be read, `problem` says why."""

    name: str
    state: Literal["alive", "dead", "locked", "incompatible"]
    snapshot: PoolSnapshot | None = None
    problem: str = ""


class TopReport(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `shmblocks top --once`: every pool, by name."""

    pools: list[TopPool]


class Frame(NamedTuple):
    """What one refresh has read, and when (monotonic, seconds)."""

    report: TopReport
    moment: float

    def counters(self, name: str, pool_id: int) -> CounterValues | None:
        """Of a pool that was there; None for another one of that name."""
        for pool in self.report.pools:
            if pool.name == name and pool.snapshot and pool.snapshot.stats.pool_id == pool_id:
                return pool.snapshot.stats.counters
        return None


# ---- reading -----------------------------------------------------------------------------------


def read_frame(names: Sequence[str]) -> Frame:
    """All pools of this node, or those of these names that there are."""
    pools = []
    for name in names or pool_names():
        with contextlib.suppress(PoolNotFoundError):
            pools.append(_read(name))
    return Frame(TopReport(pools=pools), time.monotonic())


def _read(name: str) -> TopPool:
    try:
        with PoolInspector(name, LOCK_TIMEOUT) as pool:
            state: Literal["alive", "dead"] = "alive" if pool.is_alive else "dead"
            return TopPool(name=name, state=state, snapshot=pool.snapshot())
    except PoolNotFoundError:
        raise
    except (IncompatiblePoolError, DamagedPoolError) as error:
        return TopPool(name=name, state="incompatible", problem=str(error))
    except ShmBlocksError as error:
        return TopPool(name=name, state="locked", problem=str(error))


# ---- drawing -----------------------------------------------------------------------------------


def show(frame: Frame, before: Frame | None, columns: int) -> Document:
    """A frame for people; rates are those since the frame before."""
    pools = frame.report.pools
    if not pools:
        return [line(Text("no pools on this node", "dim"))]
    return joined(*(_show_pool(pool, frame, before, columns) for pool in pools))


def _show_pool(pool: TopPool, frame: Frame, before: Frame | None, columns: int) -> Document:
    title = line(Text(pool.name, "title"), "  ", state_text(pool.state))
    if pool.snapshot is None:
        return [title, line("  ", Text(pool.problem, "fail"))]
    stats = pool.snapshot.stats
    earlier = before.counters(pool.name, stats.pool_id) if before else None
    seconds = frame.moment - before.moment if before else 0.0
    document = [
        (*title, *_memory(stats)),
        line("  ", *_map_row(pool.snapshot, columns - 2)),
        line("  ", _activity(stats.counters, earlier, seconds)),
    ]
    if stats.counters.lookups or stats.entries:
        document.append(line("  ", _cache(stats, earlier)))
    if stats.node_peers or stats.counters.node_reads or stats.counters.node_fetches:
        document.append(line("  ", _nodes(stats, earlier, seconds)))
    waiters = pool.snapshot.waiters
    document += [_waiter(number, each) for number, each in enumerate(waiters[:MOST_WAITERS], 1)]
    if len(waiters) > MOST_WAITERS:
        document.append(line(f"  and {len(waiters) - MOST_WAITERS} more"))
    return document


def _memory(stats: PoolStats) -> Line:
    used = stats.total_blocks - stats.free_blocks
    run = bytes_text(stats.largest_free_run * stats.block_bytes)
    dead = f" + {stats.dead_participants} dead" if stats.dead_participants else ""
    waiting = f"{stats.waiters} waiting"
    return line(
        f"  {bytes_text(stats.total_blocks * stats.block_bytes)}, "
        f"{share_text(used, stats.total_blocks)} used, largest free run {run}, "
        f"{stats.participants} attached",
        Text(dead, "dead"),
        ", ",
        Text(waiting, "warn" if stats.waiters else ""),
    )


def _map_row(snapshot: PoolSnapshot, columns: int) -> Iterator[Text]:
    spans = [
        Span(each.start_block, each.num_blocks, str(each.state), "-")
        for each in snapshot.allocations
    ]
    picture = draw(snapshot.stats.total_blocks, spans, columns, rows=1)
    return merged([Text(cell.mark, cell.state) for cell in picture.cells])


def _activity(now: CounterValues, before: CounterValues | None, seconds: float) -> str:
    if before is None or seconds <= 0:
        return (
            f"since it was made: {count_text(now.allocations, 'allocation')}, "
            f"{count_text(now.publishes, 'publish', 'publishes')}, {count_text(now.opens, 'open')}"
        )
    rates = [
        f"{(getattr(now, name) - getattr(before, name)) / seconds:.0f} {name}"
        for name in ("allocations", "publishes", "opens", "evictions")
    ]
    return f"per second: {', '.join(rates)}"


def _cache(stats: PoolStats, before: CounterValues | None) -> str:
    now = stats.counters
    size = bytes_text(stats.entry_blocks * stats.block_bytes)
    pinned = bytes_text(stats.pinned_entry_blocks * stats.block_bytes)
    text = (
        f"cache: {count_text(stats.entries, 'entry', 'entries')} in {size} ({pinned} pinned), "
        f"hit rate {share_text(now.hits, now.lookups)}"
    )
    if before is None:
        return text
    lately = share_text(now.hits - before.hits, now.lookups - before.lookups)
    return f"{text}, now {lately}"


def _nodes(stats: PoolStats, before: CounterValues | None, seconds: float) -> str:
    """What crosses between nodes: all of it, or each second."""
    now, per = stats.counters, ""
    sent, received = now.node_sent_bytes, now.node_received_bytes
    if before is not None and seconds > 0:
        per = "/s"
        sent = int((sent - before.node_sent_bytes) / seconds)
        received = int((received - before.node_received_bytes) / seconds)
    return (
        f"nodes: {count_text(stats.node_peers, 'peer')}, {bytes_text(sent)}{per} out, "
        f"{bytes_text(received)}{per} in, {now.node_refusals} refused, {now.node_given_back} given "
        f"back, {now.node_failures} failed, {now.node_quarantined} blocks quarantined"
    )


def _waiter(number: int, info: WaiterInfo) -> Line:
    request = f", request {info.req_id}" if info.req_id else ""
    blocks = count_text(info.num_blocks, "block")
    return line(
        Text(f"  {number}. waits {age_text(info.age_seconds)} for {blocks}{request}: ", "warn"),
        participant_text(info.participant_id, info.participant),
    )


# ---- the command -------------------------------------------------------------------------------


def _top(arguments: Namespace) -> Answer:
    if arguments.once or arguments.json:
        frame = read_frame(arguments.names)
        return Answer(frame.report, show(frame, None, shutil.get_terminal_size().columns))
    return Answer(_live(arguments.names, arguments.interval).report, [])


def _live(names: Sequence[str], interval: float) -> Frame:
    """Frame after frame, until q or Ctrl-C."""
    before = None
    with _screen() as has_ansi:
        while True:
            frame = read_frame(names)
            _write(show(frame, before, shutil.get_terminal_size().columns), interval, has_ansi)
            before = frame
            if _is_told_to_stop(interval):
                return frame


def _write(document: Document, interval: float, has_ansi: bool) -> None:
    if not has_ansi:
        write_text("".join(f"{line_text(parts, False)}\n" for parts in [*document, ()]), sys.stdout)
    else:
        columns, rows = shutil.get_terminal_size()
        colours = wants_colours(sys.stdout)
        head = line(Text(f"shmblocks top, every {interval:g} s; q ends", "dim"))
        shown = [clipped(parts, columns) for parts in [head, (), *document][:rows]]
        lines = [f"{line_text(parts, colours)}{_REST_OF_LINE}" for parts in shown]
        write_text(_HOME + "\r\n".join(lines) + _REST_OF_SCREEN, sys.stdout)
    sys.stdout.flush()


@contextlib.contextmanager
def _screen() -> Iterator[bool]:
    """The terminal as a screen, put back at the end; False: standard output is none."""
    has_ansi = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    saved = termios.tcgetattr(sys.stdin) if sys.stdin.isatty() else None
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if saved is not None:
            tty.setcbreak(sys.stdin)  # q without Enter
        if has_ansi:
            write_text(_ENTER, sys.stdout)
        yield has_ansi
    finally:
        signal.signal(signal.SIGTERM, before)
        if saved is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, saved)
        if has_ansi:
            write_text(_LEAVE, sys.stdout)
            sys.stdout.flush()


def _is_told_to_stop(seconds: float) -> bool:
    """Wait for the next refresh; True: q was pressed, or nobody is there any more to press it."""
    if not sys.stdin.isatty():
        time.sleep(seconds)
        return False
    if not select.select([sys.stdin], [], [], seconds)[0]:
        return False
    keys = os.read(sys.stdin.fileno(), 64)
    return not keys or b"q" in keys.lower()


def _interval(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 3600:
        raise ArgumentTypeError(f"expected seconds, 0.1 to 3600, got {text!r}")
    return value


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "names", metavar="NAME", nargs="*", type=pool_name, help="pools (default: all of the node)"
    )
    parser.add_argument("--once", action="store_true", help="print one frame and stop")
    parser.add_argument(
        "--interval",
        type=_interval,
        default=1.0,
        metavar="S",
        help="seconds between two frames (default: %(default)g)",
    )


TOP = Command(
    name="top",
    summary="a live picture of the pools: use, hit rate, who waits, the blocks",
    description=(
        "Show all pools of this node, or those named, refreshed each second: their use, the\n"
        "largest free run, what they do, the hit rate of the cache, who waits for blocks, and the\n"
        "blocks in one row (R reserved, P published, L leased, D draining, S settling; a small\n"
        "letter: partly free; . free). q or Ctrl-C ends it. --json prints one frame."
    ),
    examples=(
        ("shmblocks top", "all pools of this node"),
        ("shmblocks top my-pool --interval 0.2", "one, five times a second"),
        ("shmblocks top --once", "one frame, for a log"),
    ),
    reports=(TopReport,),
    run=_top,
    add_arguments=_add_arguments,
)
