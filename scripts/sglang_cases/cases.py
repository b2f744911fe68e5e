"""What must hold with the real SGLang. Each case is a function of a `Run`, which starts servers.

Everywhere: the answers are those of servers without the plug-in, token for token and log
probability for log probability; each rank extracts the bytes that the encoder sent; afterwards the
pool's invariants hold and nobody holds a block.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType

from sglang_cases import watching
from sglang_cases.model import build
from sglang_cases.servers import (
    SIZES,
    Answer,
    Background,
    Server,
    abort,
    ask,
    ask_all,
    picture,
)

# Seconds after which what a dead process held has to be free, if a rank of the language model
# lives: each looks once a second. (What the documents state, and time for two loaded cores.)
DEAD_COMES_BACK = 1.0 + 4.0
# Seconds after which what was announced and never sent comes back, in these cases.
UNCLAIMED = 8.0
POOL_MB = 64
NOTHING: Mapping[str, str] = MappingProxyType({})
# Where the encoder is killed.
POINTS = ("reserved", "copied", "published", "sent")


class FailedError(Exception):
    """A case that did not hold."""


class Run:
    """Servers, the lab and what was found so far."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.pool = name
        self.model = build(folder / "model")
        self.lab = watching.Lab(folder / "lab")
        self._count = 0

    @contextmanager
    def server(
        self, name: str, arguments: str = "", environment: Mapping[str, str] = NOTHING
    ) -> Iterator[Server]:
        """One server, started and not waited for; killed at the end."""
        self._count += 1
        log = self.folder / f"{self._count:02d}-{name.replace(' ', '-')}.log"
        server = Server(name, self.model, log, arguments, environment)
        try:
            yield server
        finally:
            server.kill()

    def plugged(self, **more: str) -> dict[str, str]:
        """The variables of a process with the plug-in."""
        return {
            "SHMBLOCKS_SGLANG_POOL": self.pool,
            "SHMBLOCKS_SGLANG_POOL_MB": str(POOL_MB),
            # The tiny model's embeddings are some KiB.
            "SHMBLOCKS_SGLANG_MIN_BYTES": "0",
            "SHMBLOCKS_SGLANG_UNCLAIMED_TIMEOUT": str(UNCLAIMED),
            "SHMBLOCKS_LAB": str(self.lab.folder),
        } | more

    @contextmanager
    def encoder(self, environment: Mapping[str, str] = NOTHING) -> Iterator[Server]:
        with self.server("encoder", "--encoder-only", environment) as server:
            yield server

    @contextmanager
    def language(
        self,
        *encoders: Server,
        ranks: int = 1,
        environment: Mapping[str, str] = NOTHING,
    ) -> Iterator[Server]:
        urls = " ".join(each.url for each in encoders)
        arguments = f"--language-only --encoder-urls {urls} --tp {ranks}"
        with self.server(f"language of {ranks}", arguments, environment) as server:
            yield server

    @contextmanager
    def both(self, ranks: int = 1, encoders: int = 1, **more: str) -> Iterator[list[Server]]:
        """The language model's server, then the encoders, all healthy, with the plug-in."""
        with ExitStack() as stack:
            environment = self.plugged(**more)
            found = [stack.enter_context(self.encoder(environment)) for _ in range(encoders)]
            language = stack.enter_context(
                self.language(*found, ranks=ranks, environment=environment)
            )
            for server in (*found, language):
                server.wait_until_healthy()
            yield [language, *found]
        watching.remove(self.pool)

    # ---- what must hold ----------------------------------------------------------------------

    def require(self, holds: bool, what: str) -> None:
        if not holds:
            raise FailedError(what)

    def require_same(self, answers: list[Answer], expected: list[Answer], what: str) -> None:
        wrong = [
            number
            for number, (answer, other) in enumerate(zip(answers, expected, strict=True))
            if not answer.is_like(other)
        ]
        errors = [answers[number].error for number in wrong]
        self.require(not wrong, f"{what}: answers {wrong} differ {errors}")

    def require_events(self, expected: dict[str, int], what: str) -> None:
        """What was extracted since the last call, and that it is what was sent."""
        events = self.lab.events()
        wrong = watching.differing(events)
        self.require(not wrong, f"{what}: other bytes than were sent: {wrong}")
        counts = watching.count(events)
        self.require(counts == expected, f"{what}: expected {expected}, got {counts}")

    def require_empty(self, within: float, what: str) -> float:
        seconds = watching.seconds_until_empty(self.pool, within)
        held = watching.holders(self.pool)
        self.require(seconds >= 0, f"{what}: after {within:g} s still held: {held}")
        wrong = watching.violations(self.pool)
        self.require(not wrong, f"{what}: {wrong}")
        return seconds


def one_rank(run: Run) -> None:
    """Mono, then encoder and language model: the same answers, handles, two pictures, a full pool,
    an abort."""
    with run.server("mono") as mono:
        mono.wait_until_healthy()
        expected = ask_all(mono.url)
    run.require(all(each.tokens for each in expected), f"mono: {[e.error for e in expected]}")
    with run.both() as (language, _):
        run.lab.events()
        run.require_same(ask_all(language.url), expected, "encoder and language model")
        run.require_events({"handle 0": 4}, "encoder and language model")
        run.require_empty(DEAD_COMES_BACK, "encoder and language model")
        _full_pool(run, language, expected)
        _aborted(run, language, expected)


def _full_pool(run: Run, language: Server, expected: list[Answer]) -> None:
    hog = watching.Hog(run.pool)
    try:
        run.require_same(ask_all(language.url), expected, "full pool")
        run.require_events({"bytes 0": 4}, "full pool")
    finally:
        hog.release()
    run.require_same(ask_all(language.url), expected, "after a full pool")
    run.require_events({"handle 0": 4}, "after a full pool")


def _aborted(run: Run, language: Server, expected: list[Answer]) -> None:
    """The message comes when nobody waits for it any more."""
    run.lab.set("send: sleep 3")
    waiting = Background(lambda: ask(language.url, picture(*SIZES[0], 0), rid="to-be-aborted"))
    time.sleep(1)
    abort(language.url, "to-be-aborted")
    answer = waiting.result()
    run.lab.set()
    run.require(answer.error.startswith("400"), f"aborted: {answer}")
    time.sleep(3)
    run.require_empty(DEAD_COMES_BACK, "aborted")
    run.require_events({"given back": 1}, "aborted")
    run.require_same(ask_all(language.url), expected, "after an abort")
    run.require(language.is_running, "the language server has ended after an abort")
    run.lab.events()


def encoder_killed(run: Run, points: tuple[str, ...] = POINTS) -> None:
    """The encoder is killed at a point; the language model lives, blocks come back in time, and a
    new encoder goes on."""
    environment = run.plugged()
    with run.encoder(environment) as first, ExitStack() as stack:
        language = stack.enter_context(run.language(first, environment=environment))
        first.wait_until_healthy()
        language.wait_until_healthy()
        expected = ask_all(language.url)
        run.require(all(each.tokens for each in expected), f"{[e.error for e in expected]}")
        port = first.port
        first.kill()
        for point in points:
            with run.server("encoder", f"--encoder-only --port {port}", environment) as encoder:
                encoder.port = port
                encoder.wait_until_healthy()
                run.require_same(ask_all(language.url), expected, f"before {point}")
                run.lab.set(f"{point}: once kill")
                answer = ask(language.url, picture(*SIZES[0], 0), timeout=60)
                encoder.wait_for_end()
                run.lab.set()
                _judge_encoder(run, point, answer, expected[0])
                run.require(language.is_running, f"{point}: the language server has ended")
        run.lab.events()
    watching.remove(run.pool)


def _judge_encoder(run: Run, point: str, answer: Answer, expected: Answer) -> None:
    if point == "sent":
        # The message had left, and its claim is the rank's own.
        run.require(answer.is_like(expected), f"encoder killed when sent: {answer}")
    else:
        run.require(answer.error.startswith("502"), f"encoder killed when {point}: {answer}")
    # What was announced to a living rank, and never sent, has a deadline; all else goes at once.
    longest = UNCLAIMED if point == "published" else 0.0
    seconds = run.require_empty(longest + DEAD_COMES_BACK, f"encoder killed when {point}")
    print(f"    encoder killed when {point}: all blocks free after {seconds:.1f} s")


def one_encoder_killed(run: Run) -> None:
    """Mono, encoder and language model, one kill: the short form of all."""
    encoder_killed(run, ("copied",))


def rank_killed(run: Run) -> None:
    """A rank is killed before and after it opens; the encoder lives, and blocks come back as soon
    as somebody looks: the next language model, or the encoder's next request."""
    environment = run.plugged()
    with run.encoder(environment) as encoder:
        encoder.wait_until_healthy()
        for point in ("extract", "opened"):
            with run.language(encoder, environment=environment) as language:
                language.wait_until_healthy()
                run.lab.set(f"{point}: once kill")
                ask(language.url, picture(*SIZES[0], 0), timeout=60)
                language.wait_for_end()
                run.lab.set()
            run.require(encoder.is_running, f"rank killed at {point}: the encoder has ended")
            with run.language(encoder, environment=environment) as language:
                language.wait_until_healthy()
                seconds = run.require_empty(DEAD_COMES_BACK, f"rank killed at {point}")
                print(f"    rank killed at {point}: free {seconds:.1f} s after the next is healthy")
                answers = ask_all(language.url)
                run.require(all(each.tokens for each in answers), f"after {point}: {answers}")
    watching.remove(run.pool)


def others(run: Run) -> None:
    """Bytes to a language model of another protocol, and to one without the plug-in; both sides
    killed, and started again."""
    with run.encoder(run.plugged()) as encoder:
        encoder.wait_until_healthy()
        with run.language(encoder) as plain:
            plain.wait_until_healthy()
            expected = ask_all(plain.url)
            run.require(all(each.tokens for each in expected), f"{[e.error for e in expected]}")
        run.lab.set("protocol: yes")
        with run.language(encoder, environment=run.plugged()) as other:
            other.wait_until_healthy()
            run.lab.set()
            run.lab.events()
            run.require_same(ask_all(other.url), expected, "another protocol")
            run.require_events({"bytes 0": 4}, "another protocol")
        with run.language(encoder, environment=run.plugged()) as language:
            language.wait_until_healthy()
            run.require_same(ask_all(language.url), expected, "the same protocol again")
            run.require_events({"handle 0": 4}, "the same protocol again")
    run.require(bool(watching.segments(run.pool)), "both were killed, and left no segment")
    with run.both() as (language, _):
        run.require_same(ask_all(language.url), expected, "started again")
        run.require_empty(DEAD_COMES_BACK, "started again")


def two_ranks(run: Run) -> None:
    """Each rank gets a handle of its own; one that is not attached gets bytes; one is killed while
    it has a lease."""
    with run.encoder() as encoder, run.language(encoder, ranks=2) as plain:
        encoder.wait_until_healthy()
        plain.wait_until_healthy()
        expected = ask_all(plain.url)
        run.require(all(each.tokens for each in expected), f"{[e.error for e in expected]}")
    with run.both(ranks=2) as (language, _):
        run.lab.events()
        run.require_same(ask_all(language.url), expected, "two ranks")
        run.require_events({"handle 0": 4, "handle 1": 4}, "two ranks")
        run.lab.set("bytes: yes")
        run.require_same(ask_all(language.url), expected, "two ranks, by bytes")
        run.require_events({"bytes 0": 4, "bytes 1": 4}, "two ranks, by bytes")
        run.require_empty(DEAD_COMES_BACK, "two ranks")
        run.lab.set("opened: once kill")
        ask(language.url, picture(*SIZES[0], 0), timeout=60)
        language.wait_for_end()
        run.lab.set()
        # Nobody who looks lives but this process: a reap says what would be free.
        watching.reap(run.pool)
        run.require_empty(DEAD_COMES_BACK, "one of two ranks was killed")
    run.lab.set("attach: rank 1")
    with run.both(ranks=2) as (language, _):
        run.lab.set()
        run.lab.events()
        run.require_same(ask_all(language.url), expected, "one of two attached")
        run.require_events({"handle 0": 4, "bytes 1": 4}, "one of two attached")
        run.require_empty(DEAD_COMES_BACK, "one of two attached")


def two_encoders(run: Run) -> None:
    """Requests in several parts; one encoder is killed in the middle of one."""
    with run.both(encoders=2) as (language, first, second):
        pictures = [picture(112, 112, seed) for seed in range(3)]
        run.lab.set("bytes: yes")
        expected = [*ask_all(language.url), ask(language.url, *pictures)]
        run.lab.set()
        run.lab.events()
        answers = [*ask_all(language.url), ask(language.url, *pictures)]
        run.require_same(answers, expected, "two encoders")
        run.require_events({"handle 0": 7}, "two encoders")
        run.require_empty(DEAD_COMES_BACK, "two encoders")
        run.lab.set("published: once kill")
        answer = ask(language.url, *pictures[:2], timeout=60)
        run.lab.set()
        run.require(answer.error.startswith("502"), f"one of two encoders killed: {answer}")
        running = [each.is_running for each in (first, second)]
        run.require(sorted(running) == [False, True], f"one of two encoders killed: {running}")
        run.require(language.is_running, "one of two encoders killed: the language server ended")
        run.require_empty(UNCLAIMED + DEAD_COMES_BACK, "one of two encoders killed")


def pixels(run: Run) -> None:
    """Pixels in the pool: the same answers; killed while they travel, nothing of ours is left,
    while stock SGLang leaves a segment for each."""
    stock_prefix = "sgl_shm_mm"
    before = set(watching.segments(stock_prefix))
    with run.server("mono") as mono:
        mono.wait_until_healthy()
        expected = ask_all(mono.url)
        _kill_while_pixels_travel(run, mono)
    left = [name for name in watching.segments(stock_prefix) if name not in before]
    for name in left:
        os.unlink(f"/dev/shm/{name}")
    run.require(bool(left), "stock SGLang left no segment: this case shows nothing")
    environment = run.plugged(SHMBLOCKS_SGLANG_PIXELS="1")
    with run.server("mono with pixels", environment=environment) as mono:
        mono.wait_until_healthy()
        run.lab.events()
        run.require_same(ask_all(mono.url), expected, "pixels in the pool")
        sent = [event.handle for event in run.lab.events() if event.what == "pixels"]
        run.require(len(sent) >= 5 and all(sent), f"pixels in the pool: {sent}")
        run.require_empty(DEAD_COMES_BACK, "pixels in the pool")
        _kill_while_pixels_travel(run, mono)
    ours = [name for name in watching.segments(stock_prefix) if name not in before]
    run.require(not ours, f"pixels in the pool: SGLang's segments are left: {ours}")
    with run.server("mono again", environment=environment) as mono:
        mono.wait_until_healthy()
        run.require_same(ask_all(mono.url), expected, "pixels, started again")
        run.require_empty(DEAD_COMES_BACK, "pixels, started again")
    watching.remove(run.pool)
    print(f"    killed with pixels on their way: stock left {len(left)} segments, the pool none")


def _kill_while_pixels_travel(run: Run, mono: Server) -> None:
    os.kill(mono.pid_of("sglang::scheduler"), signal.SIGSTOP)
    waiting = [
        Background(lambda seed=seed: ask(mono.url, picture(224, 168, seed), timeout=15))  # type: ignore[misc]
        for seed in range(50, 56)
    ]
    time.sleep(6)
    mono.kill()
    for each in waiting:
        each.result()
    run.lab.events()


def send_killed(run: Run) -> None:
    """Without servers: SGLang's own `_send` with the plug-in, killed at every line."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "sglang_cases.sending",
        str(run.model),
        run.pool,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    run.require(done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    print(f"    {done.stdout.splitlines()[-1]}")


Case = Callable[[Run], None]
SHORT: tuple[Case, ...] = (one_rank, one_encoder_killed)
ALL: tuple[Case, ...] = (
    one_rank,
    encoder_killed,
    rank_killed,
    others,
    two_ranks,
    two_encoders,
    pixels,
    send_killed,
)
