"""`shmblocks keep NAME --bytes N`: keeps a byte pool while its users come and go.

    1 block SIGTERM, SIGINT     from here on they are waited for, and end nothing half way
    2 make or find the pool     as a participant like any other
    3 say that it is there      a line on standard output; READY=1 to systemd
    4 wait for a signal         meanwhile give back what the dead held
    5 wait for the others       `--grace` seconds, or until a second signal
    6 leave                     the last one to leave removes the pool

Killed by SIGKILL it is a participant that died: the others keep the pool, and the last one removes
it. If they are all dead as well, the next keeper of that name replaces the leftover.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace

import msgspec

from shmblocks._state.info import ParticipantInfo
from shmblocks._words import bytes_text
from shmblocks.cache import ROW_BYTES, byte_config
from shmblocks.cli.commands import Answer, Command, UsageError, add_name, count_argument
from shmblocks.cli.render import line, write_text
from shmblocks.config import PoolConfig
from shmblocks.pool import BlockPool

STOPS = (signal.SIGTERM, signal.SIGINT)
# Seconds between two looks for the dead, and for those who have left. Shorter: more work for
# nothing. Longer: what the dead held comes back later (an allocation that needs it does not wait).
POLL = 1.0
LEAVING_POLL = 0.05
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class KeepReport(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `shmblocks keep`, when it was told to stop. `removed`: nobody else was attached;
    else `participants` are, and the last of them removes the pool."""

    name: str
    removed: bool
    participants: list[ParticipantInfo]


def _keep(arguments: Namespace) -> Answer:
    try:
        config = byte_config(
            arguments.bytes,
            block_bytes=arguments.block_bytes,
            max_participants=arguments.max_participants,
            group=arguments.group,
        )
    except ValueError as error:
        raise UsageError(f"keep: {error}") from None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        return _kept(arguments.name, config, arguments.grace, is_quiet=arguments.json)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kept(name: str, config: PoolConfig, grace: float, *, is_quiet: bool) -> Answer:
    with BlockPool.ensure(name, config, role="keeper", prefault="off") as pool:
        if not is_quiet:
            memory = bytes_text(pool.stats().size_bytes)
            write_text(f"keeping {pool.name}, {memory}, until SIGTERM or SIGINT\n", sys.stdout)
            sys.stdout.flush()
        _tell_systemd("READY=1")
        while signal.sigtimedwait(STOPS, POLL) is None:
            pool.reap_if_due()
        _tell_systemd("STOPPING=1")
        deadline = time.monotonic() + grace
        while _others(pool) and time.monotonic() < deadline:
            if signal.sigtimedwait(STOPS, LEAVING_POLL) is not None:
                break
        others = _others(pool)
    report = KeepReport(name=pool.name, removed=not others, participants=others)
    if report.removed:
        return Answer(report, [line(f"removed {pool.name}")])
    users = [line(f"  still used by {info}") for info in others]
    return Answer(report, [line(f"left {pool.name}; the last of its users removes it"), *users])


def _others(pool: BlockPool) -> list[ParticipantInfo]:
    return [info for info in pool.participants() if info.is_alive and not info.is_self]


def _tell_systemd(state: str) -> None:
    """The protocol of sd_notify(3): nothing without a supervisor that asks for it."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect("\0" + address[1:] if address.startswith("@") else address)
        notify.sendall(state.encode())


def size(text: str) -> int:
    """`8G` -> 8 GiB; also K, M, T, and plain bytes."""
    number, unit = text.upper().removesuffix("IB").removesuffix("B"), ""
    if number and number[-1] in _UNITS:
        number, unit = number[:-1], number[-1]
    if not (number.isascii() and number.isdigit() and int(number)):
        raise ArgumentTypeError(f"expected a size like 8G, 512M or 1048576, got {text!r}")
    return int(number) * _UNITS[unit]


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise ArgumentTypeError(f"expected seconds, 0 or more, got {text!r}")
    return value


def _add_arguments(parser: ArgumentParser) -> None:
    add_name(parser)
    parser.add_argument(
        "--bytes", type=size, required=True, metavar="N", help="size of all blocks, for example 8G"
    )
    parser.add_argument(
        "--block-bytes",
        type=size,
        default=64 * 1024,
        metavar="N",
        help=f"size of a block, a multiple of {ROW_BYTES} (default: 64K)",
    )
    parser.add_argument(
        "--max-participants",
        type=count_argument,
        default=64,
        metavar="N",
        help="default: %(default)s",
    )
    parser.add_argument("--group", help="a Unix group that may use it (default: this user only)")
    parser.add_argument(
        "--grace",
        type=_seconds,
        default=5.0,
        metavar="S",
        help="seconds to wait for the others when it is stopped (default: %(default)g)",
    )


KEEP = Command(
    name="keep",
    summary="make or find a byte pool, keep it while others come and go, remove it at the end",
    description=(
        "Make the byte pool of that name (or find it: of the same size), and stay attached, so\n"
        "that it outlives its users. At SIGTERM or SIGINT it waits --grace seconds for the others\n"
        "to leave, or to die, then leaves. The last one to leave removes the pool: if others are\n"
        "still attached they keep it, and the last of them removes it. A second signal ends the\n"
        "waiting. Users attach with BlockPool.attach(NAME), or ensure(NAME, byte_config(N))."
    ),
    examples=(
        ("shmblocks keep vision --bytes 8G", "until it is told to stop"),
        ("shmblocks keep vision --bytes 8G --grace 30", "waits longer for the others at the end"),
    ),
    reports=(KeepReport,),
    run=_keep,
    add_arguments=_add_arguments,
)
