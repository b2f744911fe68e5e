"""One launcher, one embedding process, two language processes, and real photographs.

    python examples/launch.py                 some two minutes on two cores
    python examples/launch.py --small         the same with tiny models, seconds
    python examples/launch.py --mode push     one way only: landing, push or both in turn

Photographs go through a vision transformer in the embedding process; the embeddings go through
one pool; a language model in each language process reads them in place and generates tokens. All of
it is compared with the same models run in this one process: the same bytes and the same tokens, or
exit code 1.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
from types import FrameType

from _children import ChildDiedError, Children
from _models import LanguageConfig, VisionConfig
from _photos import PHOTOS, Photo, PhotosMissingError
from _processes import (
    Answer,
    Answerer,
    Encoder,
    Settings,
    Way,
    embedding_process,
    language_process,
    same_arithmetic_everywhere,
)
from _rows import HEADER, Report, Row, make_report
from _workers import Workers
from shmblocks import BlockPool, PoolConfig, ShmBlocksError, list_pools, multimodal_fields

READERS = 2  # language processes
SMALL_VISION = VisionConfig(width=64, heads=4, mlp=128, out=128)
SMALL_LANGUAGE = LanguageConfig(hidden=128, heads=2, kv_heads=1, head=32, mlp=128, vocab=512)


def main() -> int:
    args = parse_args()
    signal.signal(signal.SIGTERM, stop)
    try:
        with make_report() as report:
            return Launch(args, report).run()
    except KeyboardInterrupt:
        print("launch: stopped", file=sys.stderr)
        return 130
    except (ShmBlocksError, ChildDiedError, PhotosMissingError, OSError) as error:
        print(f"launch: {error}", file=sys.stderr)
        return 1


def stop(signum: int, _frame: FrameType | None) -> None:
    """SIGTERM: leave through every `with`, like Ctrl-C."""
    sys.exit(128 + signum)


class Launch:
    """One run, from the arguments to the exit code."""

    def __init__(self, args: argparse.Namespace, report: Report) -> None:
        small: bool = args.small
        self.name: str = args.name
        self.report = report
        self.photos = [photo.shrunk(by=4) for photo in PHOTOS] if small else list(PHOTOS)
        self.settings = Settings(
            pool_name=self.name,
            vision=SMALL_VISION if small else VisionConfig(),
            language=SMALL_LANGUAGE if small else LanguageConfig(),
            seed=args.seed,
            new_tokens=args.tokens,
            timeout=args.timeout,
        )
        # The landing allocation is the default number of blocks: 8 x 128 tokens, 4 x 16 when small.
        self.config = PoolConfig(
            total_tokens=1024 if small else 8192,
            fields=multimodal_fields(self.settings.language.hidden),
            block_size=16 if small else 128,
            default_num_blocks=4 if small else 8,
        )
        self.ways = plan(args.mode, args.requests)

    def run(self) -> int:
        expected = self.reference()
        rows: list[Row] = []
        with BlockPool.create(self.name, self.config, role="launcher") as pool:
            with Children(multiprocessing.get_context("spawn")) as children:
                workers = self.start(children)
                self.report.stage("requests", len(self.ways))
                self.report.say(HEADER)
                for row in workers.serve(self.jobs(), expected):
                    rows.append(row)
                    self.report.row(row)
            ok = self.summary(pool, rows)
        left = [summary.name for summary in list_pools() if summary.name == pool.name]
        self.report.say(f"segments left: {len(left)}")
        return 0 if ok and not left else 1

    def jobs(self) -> list[tuple[Photo, Way]]:
        """Every photograph in turn."""
        return [(self.photos[i % len(self.photos)], way) for i, way in enumerate(self.ways)]

    def reference(self) -> dict[Photo, Answer]:
        """The same models in this process, with no pool: what every request must give."""
        same_arithmetic_everywhere()
        photos = self.photos[: len(self.ways)]
        self.report.stage("one-process reference", len(photos))
        encode, answer = Encoder(self.settings), Answerer(self.settings)
        expected = {}
        for photo in photos:
            prompt = encode(photo)
            embeddings = prompt.input_embeddings.bfloat16()
            expected[photo] = answer(
                embeddings, prompt.mrope_positions, prompt.mrope_position_delta
            )
            self.report.step()
        return expected

    def start(self, children: Children) -> Workers:
        """Start the children, with two queues between each two that talk, and wait for them."""
        context = multiprocessing.get_context("spawn")
        queues = [(context.SimpleQueue(), context.SimpleQueue()) for _ in range(READERS)]
        self.report.stage("processes start", READERS + 1)
        embedding = children.start("embedding", embedding_process, self.settings, queues)
        languages = [
            children.start(f"language {i}", language_process, self.settings, back, out)
            for i, (out, back) in enumerate(queues)
        ]
        pids = ", ".join(f"{child.name} {child.process.pid}" for child in children.all)
        self.report.say(f"pool {self.name!r}; pids: launcher {os.getpid()}, {pids}")
        workers = Workers(children, embedding, languages, self.settings.timeout)
        for _ in workers.wait_ready():
            self.report.step()
        return workers

    def summary(self, pool: BlockPool, rows: list[Row]) -> bool:
        """Say how it went; False if anything was not as it must be."""
        same = sum(row.is_same for row in rows)
        resumed = sum(row.answered.rounds > 1 for row in rows)
        in_place = sum(row.answered.is_zero_copy for row in rows)
        mebibytes = sum(row.answered.num_bytes for row in rows) / 2**20
        violations = pool.check()
        free, total = pool.available_blocks(), pool.config.total_blocks
        self.report.say(
            f"{len(rows)} requests, {same} identical to the one-process run, {resumed} resumed,"
            f" {in_place} read without a copy, {mebibytes:.1f} MiB through the pool\n"
            f"pool after: {free} of {total} blocks free, {len(violations)} violations by check()"
        )
        for violation in violations:
            self.report.say(f"  {violation.message}")
        return same == len(self.ways) and free == total and not violations


def plan(mode: str, requests: int) -> list[Way]:
    """The way of each request: in turn, and the other way round when the photographs come again."""
    if mode == "landing":
        return ["landing"] * requests
    if mode == "push":
        return ["push"] * requests
    both: tuple[Way, Way] = ("landing", "push")
    return [both[(i + i // len(PHOTOS)) % 2] for i in range(requests)]


def at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=at_least_one, default=12, help="how many (default 12)")
    parser.add_argument(
        "--tokens", type=at_least_one, default=16, help="to generate for each (default 16)"
    )
    parser.add_argument("--mode", choices=("landing", "push", "both"), default="both")
    parser.add_argument("--seed", type=int, default=0, help="of the models' weights")
    parser.add_argument("--small", action="store_true", help="tiny models and pictures")
    parser.add_argument("--name", default=f"launch-{os.getpid()}", help="the pool's name")
    parser.add_argument(
        "--timeout", type=float, default=120.0, help="seconds to wait for any process"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
