"""`shmblocks serve NAME --listen HOST:PORT`: a process that gives a pool's blocks to other nodes.

It takes part in the pool as any process does, so that the pool outlives the engines that use it:
those attach with `BlockPool.ensure`. It ends at SIGTERM or Ctrl-C, gives back what it holds, and
says what it did.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from shmblocks._words import bytes_text, count_text
from shmblocks.cli.commands import Answer, Command, UsageError, pool_name
from shmblocks.cli.render import line, write_text

if TYPE_CHECKING:
    import ssl

    from shmblocks.nodes import NodeServer

ROLE = "node server"
_ENDINGS = (signal.SIGTERM, signal.SIGINT)


class ServeReport(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `shmblocks serve`, when it ends: counts since its start.

    `fetched`: confirmed by their readers; `given_back`: begun, and left to be fetched again;
    `refused`: answered with an error; `strangers`: connections that did not prove the key;
    `turned_away`: connections beyond --max-connections; `sent_bytes`: of all fetches.
    """

    pools: list[str]
    address: str
    fetched: int
    given_back: int
    refused: int
    strangers: int
    turned_away: int
    sent_bytes: int


def _serve(arguments: Namespace) -> Answer:
    # Here: no other command needs it.
    from shmblocks.nodes import NodeServer
    from shmblocks.pool import BlockPool

    key = arguments.key_file.read_bytes() if arguments.key_file else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(_until_told_to_end())
        pools = [
            stack.enter_context(
                BlockPool.attach(name, timeout=arguments.wait, role=ROLE, prefault="off")
            )
            for name in arguments.names
        ]
        try:
            server = stack.enter_context(
                NodeServer(
                    pools,
                    arguments.listen,
                    key=key,
                    tls=_tls(arguments),
                    patience=arguments.patience,
                    max_connections=arguments.max_connections,
                    nixl=arguments.nixl,
                )
            )
        except (ImportError, ValueError) as error:
            raise UsageError(f"serve: {error}") from None
        _say(server)
        signal.sigwait(_ENDINGS)
        report = _report(server)
    told = (
        f"served {count_text(report.fetched, 'fetch', 'fetches')}, {bytes_text(report.sent_bytes)}"
    )
    return Answer(report, [line(told)])


@contextlib.contextmanager
def _until_told_to_end() -> Iterator[None]:
    """The signals that end it stay pending for `sigwait`, in the threads of the server too."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDINGS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _say(server: NodeServer) -> None:
    """One line on standard error, as soon as it listens: for those who wait for it."""
    stats = server.stats()
    write_text(f"shmblocks: serving {', '.join(stats.pools)} at {stats.address}\n", sys.stderr)
    sys.stderr.flush()


def _report(server: NodeServer) -> ServeReport:
    stats = server.stats()
    return ServeReport(
        pools=list(stats.pools),
        address=stats.address,
        fetched=stats.fetched,
        given_back=stats.given_back,
        refused=stats.refused,
        strangers=stats.strangers,
        turned_away=stats.turned_away,
        sent_bytes=stats.sent_bytes,
    )


def _tls(arguments: Namespace) -> ssl.SSLContext | None:
    if arguments.tls_certificate is None:
        return None
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(arguments.tls_certificate, arguments.tls_key)
    return context


def _add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("names", metavar="NAME", nargs="+", type=pool_name, help="pools to serve, up to 8")
    add("--listen", metavar="HOST:PORT", type=_address, required=True, help="port 0: any")
    add(
        "--key-file",
        metavar="FILE",
        type=Path,
        help="its bytes (at least 16) are the key, the same on all nodes; keep its mode at 0600",
    )
    add("--tls-certificate", metavar="FILE", help="serve under TLS, with this certificate chain")
    add("--tls-key", metavar="FILE", help="its private key, if it is not in the same file")
    add("--wait", metavar="SECONDS", type=float, default=0.0, help="for the pools to appear")
    add(
        "--patience",
        metavar="SECONDS",
        type=float,
        default=3.0,
        help="for one megabyte, after which a reader's connection is lost (3)",
    )
    add("--max-connections", metavar="N", type=int, default=64, help="of readers, at once (64)")
    add("--nixl", action="store_true", help="also let agents of NIXL read (experimental)")


def _address(text: str) -> tuple[str, int]:
    from shmblocks.nodes.address import parse_address

    try:
        return parse_address(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


SERVE = Command(
    name="serve",
    summary="give the blocks of a pool to other nodes, until it is told to end",
    description=(
        "Attach to one pool or a few and serve their blocks to `RemotePool`s of other nodes, over\n"
        "TCP. Without --key-file only on loopback. It says on standard error when it listens, and\n"
        "whom it turned away. It ends at SIGTERM or Ctrl-C with exit code 0, and says what it did."
    ),
    examples=(
        ("shmblocks serve vision --listen 10.0.0.1:7400 --key-file key", "a sidecar"),
        ("shmblocks serve vision --listen 127.0.0.1:0", "to try it on one machine"),
    ),
    reports=(ServeReport,),
    run=_serve,
    add_arguments=_add_arguments,
)
