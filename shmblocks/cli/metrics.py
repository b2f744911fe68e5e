"""`shmblocks metrics`: what Prometheus scrapes, served or printed once."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace

import msgspec

from shmblocks.cli.commands import Answer, Command, pool_name
from shmblocks.cli.render import line, write_text
from shmblocks.metrics import PORT, Metric, MetricsServer, metrics_text, read_metrics


class MetricsReport(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `shmblocks metrics --once`: every metric with its samples over all pools."""

    metrics: list[Metric]


def _metrics(arguments: Namespace) -> Answer:
    names = arguments.names or None
    if not (arguments.once or arguments.json):
        with MetricsServer(arguments.port, arguments.host, names=names) as server:
            write_text(f"serving {server.url}\n", sys.stdout)
            sys.stdout.flush()
            server.serve()
    report = MetricsReport(metrics=read_metrics(names))
    document = [line(text) for text in metrics_text(report.metrics).splitlines()]
    return Answer(report, document)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 1 << 16):
        raise ArgumentTypeError(f"expected a port, 0 to 65535 (0: any), got {text!r}")
    return int(text)


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "names", metavar="NAME", nargs="*", type=pool_name, help="pools (default: all of the node)"
    )
    parser.add_argument("--once", action="store_true", help="print them and stop")
    parser.add_argument(
        "--port", type=_port, default=PORT, help="where to listen (default: %(default)s)"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s; 0.0.0.0: all, readable for everyone)",
    )


METRICS = Command(
    name="metrics",
    summary="serve the metrics of all pools of this node to Prometheus, or print them",
    description=(
        "Serve the metrics of this node's pools over HTTP at /metrics, until it is stopped. Each\n"
        "scrape reads the pools anew, without joining them. The counters lie in the pools and\n"
        "count all processes, so one of these is enough for a node. A pool whose lock a stopped\n"
        "process holds is reported in the state `locked`. --json prints them once."
    ),
    examples=(
        ("shmblocks metrics", f"at http://127.0.0.1:{PORT}/metrics"),
        ("shmblocks metrics --once", "to standard output"),
        ("shmblocks metrics --once my-pool | grep cache", "of one pool"),
    ),
    reports=(MetricsReport,),
    run=_metrics,
    add_arguments=_add_arguments,
)
