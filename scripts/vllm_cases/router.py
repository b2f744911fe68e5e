"""A small router before an encoder and a language instance, as an EPD proxy works.

    1  send each picture of a request to the encoder, which answers with what stands for it
    2  replace the pixels by that metadata, where there is any
    3  send the request to the language instance
    4  if that says 500 (the item is gone), once more, with the pixels

It is for the cases: one thread a request, no streaming. Use vLLM's own proxy in earnest.
"""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PATIENCE = 120.0
COMPLETIONS = "/v1/chat/completions"


def post(url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Status and JSON of an answer."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, {"error": error.read().decode(errors="replace")[:500]}


class Router:
    """Serves on a port of 127.0.0.1 until it is closed; counts what it did."""

    def __init__(self, port: int, encoder: str, language: str) -> None:
        self.encoder = encoder
        self.language = language
        self.rewritten = 0
        self.retried = 0
        router = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, answer = router.route(body)
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """It says nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def route(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """The answer to one request."""
        status, answer = post(self.language + COMPLETIONS, self._without_pixels(body))
        if status == 500:
            self.retried += 1
            status, answer = post(self.language + COMPLETIONS, body)
        return status, answer

    def _without_pixels(self, body: dict[str, Any]) -> dict[str, Any]:
        told: dict[str, Any] = {}
        messages = []
        for message in body["messages"]:
            content = [self._replaced(body, part, told) for part in message["content"]]
            messages.append({**message, "content": content})
        return {**body, "messages": messages, **({"ec_transfer_params": told} if told else {})}

    def _replaced(
        self, body: dict[str, Any], part: dict[str, Any], told: dict[str, Any]
    ) -> dict[str, Any]:
        if part["type"] != "image_url":
            return part
        encode = {
            "model": body["model"],
            "max_tokens": 1,
            "messages": [{"role": "user", "content": [part, {"type": "text", "text": ""}]}],
        }
        status, answer = post(self.encoder + COMPLETIONS, encode)
        items = answer.get("ec_transfer_params") or {}
        if status != 200 or len(items) != 1:
            return part
        ((identifier, item),) = items.items()
        if not item["metadata"]:
            return part  # it is not in the pool
        told[identifier] = item
        self.rewritten += 1
        return as_metadata(identifier, item)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def as_metadata(identifier: str, item: dict[str, Any]) -> dict[str, Any]:
    """The part of a message that stands for a picture whose pixels are not sent."""
    flat = {
        name: [number for row in value for number in (row if isinstance(row, list) else [row])]
        for name, value in item["metadata"].items()
    }
    return {"type": "image_embeds", "image_embeds": flat, "uuid": identifier}
