"""Load for `serve`: clients that send prompts with images while the embedding process is killed.

    python -m qwen_vl.load --url http://127.0.0.1:8000 --size small --requests 200

- Every answer is compared with the unsplit model's, which this process holds: right, or a clear
  error (503, or an event with the reason); anything else ends this with exit code 1.
- The embedding process is killed (SIGKILL) when so many requests are done; at the end /health must
  show every block free, and no violation.
- On a GPU start the server with --exact: what fast kernels answer differs from run to run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from qwen_vl import chat
from qwen_vl.cases import cases
from qwen_vl.halves import Whole, return_memory, same_arithmetic_everywhere
from qwen_vl.models import ModelSettings
from qwen_vl.sizes import FAMILIES, SIZE_NAMES

# Seconds for one request. Smaller: a request that waits for a restart on a busy machine is called
# lost. Larger: a lost one is noticed later.
PATIENCE = 120.0


@dataclass
class Tally:
    """How the requests ended."""

    outcomes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    first_token_ms: list[float] = field(default_factory=list)
    killed: list[int] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Requests that have ended, one way or the other."""
        return self.outcomes.total()


class Load:
    """Clients of one server."""

    def __init__(self, args: argparse.Namespace, session: aiohttp.ClientSession) -> None:
        self._args, self._session = args, session
        self.tally = Tally()
        self._bodies: list[tuple[str, bytes, list[int]]] = []

    def prepare(self) -> None:
        """The prompts, and what the unsplit model answers them."""
        args = self._args
        settings = ModelSettings(args.family, args.size, args.seed, args.device, is_exact=True)
        same_arithmetic_everywhere(settings)
        whole = Whole(settings)
        for name, prompt in cases(8 if args.size == "tiny" else 1).items():
            wanted = [step.token for step in whole.answer(prompt, args.tokens)]
            self._bodies.append((name, chat.body_of(prompt, args.tokens, stream=True), wanted))
        del whole
        return_memory(settings)

    async def run(self) -> None:
        """All requests, from all clients, with all kills."""
        numbers = iter(range(self._args.requests))
        clients = [self._client(numbers) for _ in range(self._args.clients)]
        await asyncio.gather(*clients, self._killer())

    async def _client(self, numbers: Any) -> None:  # noqa: ANN401
        for number in numbers:
            name, body, wanted = self._bodies[number % len(self._bodies)]
            try:
                outcome = await asyncio.wait_for(self._request(body, wanted), PATIENCE)
            except (asyncio.TimeoutError, aiohttp.ClientError) as error:
                outcome = f"LOST ({error!r})"
            self.tally.outcomes[outcome.partition(" (")[0]] += 1
            if outcome != "right":
                self.tally.problems.append(f"request {number} ({name}): {outcome}")

    async def _request(self, body: bytes, wanted: list[int]) -> str:
        started = time.perf_counter()
        got: list[int] = []
        url = f"{self._args.url}/v1/chat/completions"
        async with self._session.post(url, data=body) as response:
            if response.status != 200:
                error = msgspec.json.decode(await response.read())["error"]["message"]
                return f"clear error ({response.status}: {error})"
            async for event in _events(response):
                if "error" in event:
                    return f"clear error (broke off: {event['error']['message']})"
                if not got:
                    self.tally.first_token_ms.append((time.perf_counter() - started) * 1e3)
                got += event["choices"][0]["delta"]["token_ids"]
        return "right" if got == wanted else f"WRONG (expected {wanted}, got {got})"

    async def _killer(self) -> None:
        """Kill the embedding process when 1/(n+1), 2/(n+1), ... of the requests are done."""
        kills = self._args.kills
        for kill in range(1, kills + 1):
            while self.tally.done < self._args.requests * kill // (kills + 1):
                await asyncio.sleep(0.01)
            while (pid := (await self.health())["processes"]["embedding"]["pid"]) is None:
                await asyncio.sleep(0.05)
            os.kill(pid, signal.SIGKILL)
            self.tally.killed.append(pid)

    async def health(self) -> dict[str, Any]:
        """What the server says of itself."""
        async with self._session.get(f"{self._args.url}/health") as response:
            got: dict[str, Any] = msgspec.json.decode(await response.read())
            return got

    async def rest(self) -> dict[str, Any]:
        """Its health when nothing is going on any more, at the latest after some seconds."""
        deadline = time.monotonic() + 10.0
        while True:
            health = await self.health()
            blocks = health["blocks"]
            is_at_rest = health["rooms"] == 0 and blocks["free"] == blocks["total"]
            if is_at_rest or time.monotonic() > deadline:
                return health
            await asyncio.sleep(0.1)


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The server-sent events, up to [DONE]; one that does not end so is an error."""
    async for line in response.content:
        data = line.removeprefix(b"data: ").strip()
        if data == b"[DONE]":
            return
        if data:
            yield msgspec.json.decode(data)
    raise aiohttp.ClientPayloadError("the answer ended without [DONE]")


async def run(args: argparse.Namespace) -> bool:
    """Send the load, print how it went; whether every request was right or a clear error."""
    async with aiohttp.ClientSession() as session:
        load = Load(args, session)
        load.prepare()
        started = time.perf_counter()
        await load.run()
        seconds = time.perf_counter() - started
        health = await load.rest()
    tally, blocks = load.tally, health["blocks"]
    for problem in tally.problems:
        print(problem)
    median = sorted(tally.first_token_ms)[len(tally.first_token_ms) // 2]
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(tally.outcomes.items()))
    print(
        f"{tally.done} requests of {args.clients} clients in {seconds:.1f} s: {counts}\n"
        f"embedding process killed {len(tally.killed)} times (pids {tally.killed}),"
        f" started {health['processes']['embedding']['starts']} times;"
        f" first token after {median:.0f} ms (median)\n"
        f"blocks after: {blocks['free']} of {blocks['total']} free,"
        f" {len(health['violations'])} violations by check()"
    )
    fine = {"right", "clear error"}
    return (
        tally.done == args.requests
        and tally.outcomes["right"] > 0
        and set(tally.outcomes) <= fine
        and blocks["free"] == blocks["total"]
        and not health["violations"]
        and health["processes"]["embedding"]["starts"] == 1 + args.kills
    )


def main() -> int:
    args = parse_args()
    try:
        return 0 if asyncio.run(run(args)) else 1
    except KeyboardInterrupt:
        print("load: stopped", file=sys.stderr)
        return 130
    except (aiohttp.ClientError, OSError) as error:
        print(f"load: {error}", file=sys.stderr)
        return 1


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--family", choices=FAMILIES, default="qwen2.5-vl", help="as of the server")
    parser.add_argument("--size", choices=SIZE_NAMES, default="small", help="as of the server")
    parser.add_argument("--seed", type=int, default=0, help="as of the server")
    parser.add_argument(
        "--device", default="cpu", help="as of the server, which must be --exact on a GPU"
    )
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--kills", type=int, default=2, help="of the embedding process")
    parser.add_argument("--tokens", type=int, default=8, help="of each answer (default 8)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
