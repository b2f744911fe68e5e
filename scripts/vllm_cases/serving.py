"""`vllm serve` as an operator starts it: an encoder, a language instance, a router, signals."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_cases import photos
from vllm_cases.cases import POOL_BYTES, Bench, expect, kept
from vllm_cases.engines import ENVIRONMENT, START_PATIENCE, CaseError, transfer
from vllm_cases.router import COMPLETIONS, Router, as_metadata, post

# Seconds. vLLM gives its own processes ten of them here.
STOP_PATIENCE = 60.0
NAMES = photos.NAMES


class Server:
    """One `vllm serve`; ended by a signal to its process group."""

    def __init__(self, name: str, model: Path, logs: Path, *options: str) -> None:
        self.name = name
        self.log = logs / f"served-{name}.log"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [
            str(Path(sys.executable).with_name("vllm")),
            *("serve", str(model), "--port", str(self.port), "--served-model-name", "tiny"),
            *("--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "4"),
            *("--dtype", "float32", "--kv-cache-memory-bytes", str(64 << 20)),
            *("--limit-mm-per-prompt", '{"image": 2, "video": 0}', "--shutdown-timeout", "10"),
            *options,
        ]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | ENVIRONMENT,
                start_new_session=True,
            )

    def ready(self) -> Server:
        """Wait until it serves."""
        end = time.monotonic() + START_PATIENCE
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise CaseError(f"{self.name} ended with {self._process.returncode}: {self.log}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health"):
                return self
            time.sleep(0.5)
        raise CaseError(f"{self.name} did not serve within {START_PATIENCE:g} s: {self.log}")

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Send a signal to all of it (SIGTERM: to the server, as systemd with KillMode=mixed)."""
        if self._process.poll() is None:
            if number == signal.SIGTERM:
                self._process.terminate()
            else:
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_PATIENCE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def metrics(self) -> dict[str, float]:
        """Its connector's counters at /metrics, by name."""
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        found = [line.rpartition(" ") for line in lines if line.startswith("vllm:ec_shmblocks_")]
        return {
            name.split("{")[0].removeprefix("vllm:ec_shmblocks_").removesuffix("_total"): float(
                value
            )
            for name, _, value in found
            if "_created" not in name
        }


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def chat(url: str, *names: str) -> tuple[int, Any]:
    """Ask about photographs: status and tokens."""
    content: list[dict[str, Any]] = []
    for name in names:
        data = base64.b64encode(photos.path(name).read_bytes()).decode()
        content.append(
            {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}
        )
    status, answer = post(url + COMPLETIONS, body(content))
    return status, answer["choices"][0]["token_ids"] if status == 200 else answer


def body(content: list[dict[str, Any]]) -> dict[str, Any]:
    text = {"type": "text", "text": "Describe the image in a few words."}
    return {
        "model": "tiny",
        "temperature": 0,
        "max_tokens": 8,
        "ignore_eos": True,
        "return_token_ids": True,
        "messages": [{"role": "user", "content": [*content, text]}],
    }


@contextlib.contextmanager
def serving(servers: list[Server]) -> Iterator[None]:
    try:
        for server in servers:
            server.ready()
        yield
    finally:
        for server in servers:
            server.stop(signal.SIGKILL)


def served(bench: Bench, logs: Path) -> None:
    """An encoder and a language instance behind a router, then deaths; and orderly stops."""
    mono = Server("mono", bench.model, logs)
    with serving([mono]):
        expected = {name: chat(mono.url, name) for name in NAMES}
        expected["two"] = chat(mono.url, "grace", "flower")
    expect("mono", {status for status, _ in expected.values()}, {200})
    with kept(bench) as pool:
        _encoder_and_language(bench, logs, pool.name, expected, pool.drop_all)


def _encoder_and_language(
    bench: Bench,
    logs: Path,
    pool: str,
    expected: dict[str, Any],
    evict: Any,  # noqa: ANN401
) -> None:
    def option(role: str) -> str:
        return json.dumps(transfer(role, pool, pool_bytes=POOL_BYTES))

    encoder = Server(
        "encoder",
        bench.model,
        logs,
        *("--ec-transfer-config", option("ec_producer")),
        *("--no-enable-prefix-caching", "--max-num-batched-tokens", "4096"),
    )
    language = Server("language", bench.model, logs, "--ec-transfer-config", option("ec_consumer"))
    with serving([encoder, language]):
        router = Router(free_port(), encoder.url, language.url)
        url = f"http://127.0.0.1:{router._server.server_port}"
        try:
            for name in NAMES:
                expect(name, chat(url, name), expected[name])
            expect("two pictures", chat(url, "grace", "flower"), expected["two"])
            expect("rewritten, retried", (router.rewritten, router.retried), (5, 0))
            counts = language.metrics()
            expect("hits at /metrics", (counts["hits"], counts["misses"]), (3, 0))

            evict()  # the encoder has them in its own cache, and publishes them again
            expect("evicted", chat(url, "grace", "flower"), expected["two"])
            expect("rewritten, retried", (router.rewritten, router.retried), (7, 0))

            evict()
            status, _ = _ask_for_what_nobody_has(language)
            expect("metadata of what nobody has", status, 500)
            expect("the language instance lives", chat(language.url, "china"), expected["china"])
            expect("lost at /metrics", language.metrics()["lost"], 1)

            encoder.stop(signal.SIGKILL)
            expect("the encoder is dead", chat(language.url, "flower"), expected["flower"])
        finally:
            router.close()
        language.stop(signal.SIGTERM)


def _ask_for_what_nobody_has(language: Server) -> tuple[int, Any]:
    item = {"item_indices": [0], "metadata": {"image_grid_thw": [1, 12, 18]}}
    asked = body([as_metadata("0" * 64, item)])
    return post(language.url + COMPLETIONS, {**asked, "ec_transfer_params": {"0" * 64: item}})
