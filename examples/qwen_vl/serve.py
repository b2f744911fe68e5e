r"""A server of one model: an embedding process, language processes, and HTTP in front of them.

    python -m qwen_vl.serve --family qwen3-vl --size small --port 8000
    curl -s localhost:8000/v1/chat/completions \
        -d '{"messages": [{"role": "user", "content": "Hello"}]}'

    POST /v1/chat/completions   a body as in chat.py; streamed as server-sent events if it says so
    GET  /health                processes, how often each was started, blocks, violations

- A process that dies is started again; requests wait for it, or are tried again (engine.py).
- An answer that cannot be given is 400 (the request is to blame) or 503 (it is not), with the
  reason; one that breaks off is ended by an event with the reason.
- SIGTERM and Ctrl-C end it: no new requests, the processes, the pool; the exit code is 0.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, get_args

import msgspec
from aiohttp import web

from qwen_vl import chat
from qwen_vl.children import ChildError
from qwen_vl.engine import Engine, NoAnswerError
from qwen_vl.handoff import PoolTransport
from qwen_vl.messages import Way
from qwen_vl.models import ModelSettings
from qwen_vl.prompts import PromptError
from qwen_vl.sizes import FAMILIES, SIZE_NAMES
from shmblocks import BlockPool, ShmBlocksError

LARGEST_BODY = 64 * 2**20  # bytes
# Seconds that requests have to end by themselves when the server is told to end.
GRACE = 2.0


class Server:
    """HTTP in front of one engine."""

    def __init__(self, engine: Engine, pool: BlockPool, settings: ModelSettings) -> None:
        self._engine, self._pool, self._tokens = engine, pool, settings.tokens

    def app(self) -> web.Application:
        """The routes."""
        app = web.Application(client_max_size=LARGEST_BODY)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_get("/health", self._health)
        return app

    async def broken(self) -> None:
        """Until a process cannot be kept running; raises `ChildError`."""
        await self._engine.wait_broken()

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        try:
            wish = chat.parse(await request.read())
            tokens = self._engine.generate(wish.prompt, wish.count)
            async with contextlib.aclosing(tokens):
                first = await anext(tokens)  # what can go wrong mostly does so before it
                if wish.is_streamed:
                    return await self._stream(request, first, tokens)
                answer = [first, *[token async for token in tokens]]
        except PromptError as error:
            return _json(chat.error_of(str(error), "invalid_request_error"), 400)
        except NoAnswerError as error:
            return _json(chat.error_of(str(error), "unavailable"), 503)
        return _json(chat.completion(self._tokens.decode(answer), answer))

    async def _stream(
        self, request: web.Request, first: int, tokens: AsyncIterator[int]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await _event(response, chat.chunk(self._tokens.decode([first]), [first]))
        try:
            async for token in tokens:
                await _event(response, chat.chunk(self._tokens.decode([token]), [token]))
            await _event(response, chat.chunk("", [], is_last=True))
        except NoAnswerError as error:
            await _event(response, chat.error_of(str(error), "unavailable"))
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def _health(self, _request: web.Request) -> web.Response:
        children = {
            child.name: {"pid": child.pid, "starts": child.starts}
            for child in self._engine.children
        }
        blocks = {"free": self._pool.available_blocks(), "total": self._pool.config.total_blocks}
        violations = [violation.message for violation in self._pool.check()]
        return _json(
            {
                "processes": children,
                "rooms": self._engine.num_rooms,
                "blocks": blocks,
                "violations": violations,
            }
        )


def _json(content: object, status: int = 200) -> web.Response:
    data = msgspec.json.encode(content)
    return web.Response(body=data, status=status, content_type="application/json")


async def _event(response: web.StreamResponse, content: object) -> None:
    await response.write(b"data: " + msgspec.json.encode(content) + b"\n\n")


async def serve(args: argparse.Namespace, say: Callable[[str], None] = print) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    settings = ModelSettings(args.family, args.size, args.seed, args.device, args.exact)
    transport = PoolTransport(args.name, args.readers)
    with transport.created(settings) as pool:
        async with Engine(settings, transport, args.readers, args.way) as engine:
            if await _unless(stop, engine.wait_ready()):
                await _listen(Server(engine, pool, settings), args, stop, say)
    say("serve: ended")


async def _listen(
    server: Server, args: argparse.Namespace, stop: asyncio.Event, say: Callable[[str], None]
) -> None:
    runner = web.AppRunner(server.app(), access_log=None, shutdown_timeout=GRACE)
    await runner.setup()
    try:
        await web.TCPSite(runner, args.host, args.port).start()
        host, port = runner.addresses[0][:2]
        say(f"serving on http://{host}:{port}")
        await _unless(stop, server.broken())
    finally:
        await runner.cleanup()


async def _unless(stop: asyncio.Event, wanted: Coroutine[Any, Any, object]) -> bool:
    """Wait for something, or for the end; whether it came to pass. Its error is raised."""
    tasks = {asyncio.create_task(wanted), asyncio.create_task(stop.wait())}
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        return not stop.is_set()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def main() -> int:
    args = parse_args()
    try:
        asyncio.run(serve(args, lambda line: print(line, flush=True)))
    except (ShmBlocksError, ChildError, OSError) as error:
        print(f"serve: {error}", file=sys.stderr)
        return 1
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=FAMILIES, default="qwen2.5-vl")
    parser.add_argument("--size", choices=SIZE_NAMES, default="small")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N; the pool lies there too")
    parser.add_argument("--way", choices=get_args(Way), default="push")
    parser.add_argument("--readers", type=int, default=2, help="language processes (default 2)")
    parser.add_argument(
        "--exact", action="store_true", help="on a GPU: kernels that give the same bits each time"
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--seed", type=int, default=0, help="of the models' weights")
    parser.add_argument("--name", default=f"qwen-{os.getpid()}", help="the pool's name")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
