"""Photographs encoded on one node, tokens generated on another, an encoder killed in the middle.

    python examples/launch_nodes.py               some two minutes on two cores
    python examples/launch_nodes.py --small       the same with tiny models, seconds

    node 1                                                node 2
    encoder --publish--> pool                             pool --in place--> language model
                          |                                ^
                    shmblocks serve ======= TCP =======> fetch

Two nodes on one machine: network, mount, pid and ipc namespaces with their own /dev/shm, a veth
pair between them. Where that is not allowed: one namespace and two pool names. The programs are the
same in both cases, and would be the same on two machines.

Twice the encoder is killed: once when it has just published (the blocks outlive it, since the
sidecar keeps the pool), and once in the middle of encoding (the image is encoded again). All tokens
are compared with those of the same models in this one process; exit code 1 when one differs, or a
block is missing on either node.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import msgspec

from _node_programs import BLOCKS, Options, Told
from _photos import PHOTOS, PhotosMissingError
from _processes import Answer, Answerer, Encoder, same_arithmetic_everywhere
from _two_nodes import NodesError, children_of, two_nodes, why_not

HERE = Path(__file__).resolve().parent
SHM_BYTES = 512 << 20
PORT = 7400
# Seconds for the last confirmation to come through.
SETTLED_WITHIN = 10.0


class ProgramEndedError(Exception):
    """A program ended before it was told to."""


class Place(NamedTuple):
    """Where a node's programs run: in namespaces of its own, or not."""

    prefix: tuple[str, ...]
    pool: str
    is_namespace: bool


class Program:
    """A program of a node that is told lines and tells lines, each one JSON value."""

    def __init__(self, place: Place, *command: str) -> None:
        self._is_inside = place.is_namespace
        self._process = subprocess.Popen(
            [*place.prefix, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def say(self, value: object) -> None:
        if self._process.stdin is not None:
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()

    def hear(self) -> object:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            raise ProgramEndedError(f"a program ended with {self._process.wait()}")
        value: object = json.loads(line)
        return value

    def ask(self, value: object) -> object:
        self.say(value)
        return self.hear()

    def kill(self) -> None:
        """SIGKILL, to the program itself: `nsenter` is its parent, and ends by itself then."""
        self._signal(signal.SIGKILL)
        self._let_go()

    def end(self) -> None:
        """Say no more, and wait."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._let_go()

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)
        self._let_go()

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            pids = children_of(self._process.pid) if self._is_inside else [self._process.pid]
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def _let_go(self) -> None:
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class Run:
    """The two nodes, their programs, and what came out."""

    def __init__(self, options: Options, first: Place, second: Place, address: str) -> None:
        self._options = options
        self._first, self._second = first, second
        self._encoder = self._start_encoder()
        self._sidecar = Program(
            first,
            *(sys.executable, "-m", "shmblocks.cli", "serve", first.pool, "--wait", "60"),
            *("--listen", address, "--key-file", options.key_file),
        )
        self._language = Program(
            second,
            *(sys.executable, str(HERE / "_node_programs.py"), "language", second.pool, address),
            msgspec.json.encode(options).decode(),
        )
        self._language.hear()

    def _start_encoder(self) -> Program:
        program = Program(
            self._first,
            *(sys.executable, str(HERE / "_node_programs.py"), "encoder", self._first.pool),
            msgspec.json.encode(self._options).decode(),
        )
        program.hear()
        return program

    def serve(self, images: int, expected: Sequence[Answer]) -> int:
        """All images in turn; how many came out as in one process."""
        after_publish, while_encoding = images // 3, 2 * images // 3
        same = 0
        print("image  photograph     tokens    MiB  encode ms  fetch ms  same  first tokens")
        for number in range(images):
            if number == while_encoding:
                self._encoder.ask(number)  # it begins
                self._replace_encoder(f"image {number}: its encoder is killed while it encodes")
            self._encoder.ask(number)  # it begins
            handle, encode_ms = cast("tuple[str, float]", self._encoder.hear())
            if number == after_publish:
                self._replace_encoder(f"image {number}: published, and its encoder is killed")
            told = msgspec.convert(self._language.ask(handle), Told)
            answer = expected[number % len(expected)]
            is_same = (told.tokens, told.checksum) == (answer.tokens, answer.checksum)
            same += is_same
            first = " ".join(map(str, told.tokens[:4]))
            print(
                f"{number:5}  {self._options.photo(number).name:13}{told.num_tokens:7}"
                f"{told.num_bytes / 2**20:7.2f}{encode_ms:11.0f}{told.fetch_ms:10.2f}"
                f"  {'yes ' if is_same else 'NO  '}  {first} ...",
                flush=True,
            )
        return same

    def _replace_encoder(self, why: str) -> None:
        print(f"--- {why}; another one starts", flush=True)
        self._encoder.kill()
        self._encoder = self._start_encoder()

    def all_free(self) -> bool:
        """Whether every block of both pools is free (the last `Done` may still be on its way)."""
        total = self._options.config().total_blocks
        deadline = time.monotonic() + SETTLED_WITHIN
        while True:
            free = self._encoder.ask(BLOCKS), self._language.ask(BLOCKS)
            if free == (total, total) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        print(f"free blocks: {free[0]} of {total} on node 1, {free[1]} of {total} on node 2")
        return free == (total, total)

    def close(self) -> None:
        """End all programs."""
        for program in (self._encoder, self._language):
            program.end()
        self._sidecar.terminate()


def reference(options: Options, images: int) -> list[Answer]:
    """The same models in this process, with no pool: what every image must give."""
    same_arithmetic_everywhere()
    encode, answer = Encoder(options.settings("")), Answerer(options.settings(""))
    expected = []
    for number in range(min(images, len(PHOTOS))):
        prompt = encode(options.photo(number))
        expected.append(
            answer(
                prompt.input_embeddings.bfloat16(),
                prompt.mrope_positions,
                prompt.mrope_position_delta,
            )
        )
    return expected


@contextlib.contextmanager
def places(*, one_namespace: bool) -> Iterator[tuple[Place, Place, str]]:
    """Node 1, node 2, and the address that node 1 serves at."""
    name = f"launch-nodes-{os.getpid()}"
    reason = "as asked for" if one_namespace else why_not()
    if reason:
        print(f"one namespace and two pools: {reason}", flush=True)
        port = free_port()
        yield Place((), f"{name}-1", False), Place((), f"{name}-2", False), f"127.0.0.1:{port}"
        return
    with two_nodes(SHM_BYTES) as nodes:
        print(f"two nodes in namespaces of their own: {nodes[0].address}, {nodes[1].address}")
        first, second = (Place(tuple(node.inside()), name, True) for node in nodes)
        yield first, second, f"{nodes[0].address}:{PORT}"


def free_port() -> int:
    """A port of loopback that nobody has just now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def run(args: argparse.Namespace) -> int:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        key_file = Path(folder) / "key"
        key_file.write_bytes(secrets.token_bytes(32))
        key_file.chmod(0o600)
        options = Options(args.small, args.seed, args.tokens, str(key_file), args.timeout)
        print(
            f"one-process reference of {min(args.images, len(PHOTOS))} photographs ...", flush=True
        )
        expected = reference(options, args.images)
        with places(one_namespace=args.one_namespace) as (first, second, address):
            running = Run(options, first, second, address)
            try:
                same = running.serve(args.images, expected)
                is_free = running.all_free()
            finally:
                running.close()
    print(
        f"{same} of {args.images} images gave the tokens of the one-process run; "
        f"{time.monotonic() - began:.0f} s"
    )
    return 0 if same == args.images and is_free else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images", type=at_least_three, default=6, help="how many (default 6)")
    add("--tokens", type=int, default=16, help="to generate for each (default 16)")
    add("--seed", type=int, default=0, help="of the models' weights")
    add("--small", action="store_true", help="tiny models and pictures")
    add("--one-namespace", action="store_true", help="two pools of this namespace, as a fallback")
    add("--timeout", type=float, default=60.0, help="seconds for one fetch")
    args = parser.parse_args()
    try:
        return run(args)
    except KeyboardInterrupt:
        print("launch_nodes: stopped", file=sys.stderr)
        return 130
    except (NodesError, PhotosMissingError, ProgramEndedError, OSError) as error:
        print(f"launch_nodes: {error}", file=sys.stderr)
        return 1


def at_least_three(text: str) -> int:
    number = int(text)
    if number < 3:
        raise argparse.ArgumentTypeError(f"expected 3 or more (two kill an encoder), got {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
