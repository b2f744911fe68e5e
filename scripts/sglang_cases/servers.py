"""SGLang's servers as processes, and requests to them."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
# Seconds until a server must be healthy. Two loaded cores take up to 80 for a model of two ranks.
PATIENCE = 400.0
# Of the images of the cases, in pixels.
SIZES = ((112, 112), (224, 168), (196, 280))


class Answer(NamedTuple):
    """What a server said: tokens with their log probabilities, or an error."""

    tokens: tuple[tuple[str, float], ...]
    error: str
    seconds: float

    def is_like(self, other: Answer) -> bool:
        """The same tokens with the same log probabilities, and no error."""
        return bool(self.tokens) and self.tokens == other.tokens


def environment() -> dict[str, str]:
    """What every server gets."""
    found = {name: value for name, value in os.environ.items() if not name.startswith("SHMBLOCKS_")}
    return found | {
        "PYTHONPATH": f"{HERE / 'stubs'}{os.pathsep}{HERE / 'lab'}",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "SGLANG_USE_CPU_ENGINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "SGLANG_HOST_IP": "127.0.0.1",
        # Else the first request waits 40 s for a compiler.
        "TORCHDYNAMO_DISABLE": "1",
        "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
        # A slow encode would be called unhealthy, and the next request go around the encoder.
        "SGLANG_ENCODER_BOOTSTRAP_HEALTH_CHECK_INTERVAL": "0",
    }


def free_port() -> int:
    """A port that nobody listens on now, and that the kernel gives to nobody for a connection."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class Server:
    """One server with all its processes; killed at the end."""

    def __init__(
        self, name: str, model: Path, log: Path, arguments: str, more: Mapping[str, str]
    ) -> None:
        self.name, self.log, self.port = name, log, free_port()
        self._started = time.monotonic()
        command = (
            f"-m sglang.launch_server --device cpu --model-path {model} --dtype bfloat16 "
            f"--host 127.0.0.1 --port {self.port} --max-total-tokens 4096 --skip-server-warmup "
            f"--encoder-transfer-backend zmq_to_scheduler {arguments}"
        )
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", *command.split()],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**environment(), **more},
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def wait_until_healthy(self) -> None:
        """Until it answers; RuntimeError with the end of its log when it does not."""
        while time.monotonic() < self._started + PATIENCE:
            if not self.is_running:
                raise RuntimeError(f"{self.name} has ended: {self.tail()}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except (OSError, http.client.HTTPException):
                time.sleep(0.5)
        raise RuntimeError(f"{self.name} is not healthy after {PATIENCE:g} s: {self.tail()}")

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-1500:]

    def wait_for_end(self, timeout: float = 60.0) -> int:
        """Its exit code."""
        return self.process.wait(timeout)

    def pids(self) -> list[int]:
        """Of its group, the launcher first."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == self.process.pid:
                found.append(int(path.parent.name))
        return sorted(found)

    def pid_of(self, what: str) -> int:
        """The process whose title has these words."""
        for pid in self.pids():
            try:
                if what in Path(f"/proc/{pid}/cmdline").read_text():
                    return pid
            except OSError:
                continue
        raise RuntimeError(f"{self.name} has no process {what!r}")

    def kill(self) -> None:
        """SIGKILL to all of it."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        deadline = time.monotonic() + 20
        while self.pids() and time.monotonic() < deadline:
            time.sleep(0.05)


def picture(width: int, height: int, seed: int) -> str:
    """Noise, as a data URL."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def ask(url: str, *pictures: str, timeout: float = 300.0, rid: str | None = None) -> Answer:
    """One chat request about some pictures."""
    content: list[dict[str, object]] = [
        {"type": "image_url", "image_url": {"url": each}} for each in pictures
    ]
    content.append({"type": "text", "text": "What is in this picture?"})
    body: dict[str, object] = {
        "model": "m",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 8,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 1,
        "ignore_eos": True,
    }
    if rid is not None:
        body["rid"] = rid
    started = time.monotonic()
    try:
        data = _post(f"{url}/v1/chat/completions", body, timeout)
        found = json.loads(data)["choices"][0]["logprobs"]["content"]
        tokens = tuple((each["token"], each["logprob"]) for each in found)
        error = ""
    except urllib.error.HTTPError as refusal:
        tokens, error = (), f"{refusal.code} {refusal.read().decode()[:200]}"
    except (OSError, http.client.HTTPException) as failure:
        tokens, error = (), repr(failure)[:200]
    return Answer(tokens, error, time.monotonic() - started)


def abort(url: str, rid: str) -> None:
    """Tell a server to abort a request."""
    _post(f"{url}/abort_request", {"rid": rid}, 20.0)


def _post(url: str, body: dict[str, object], timeout: float) -> bytes:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        data: bytes = answer.read()
        return data


def ask_all(url: str) -> list[Answer]:
    """Four requests; the last one has two pictures."""
    answers = [ask(url, picture(*size, seed)) for seed, size in enumerate(SIZES)]
    return [*answers, ask(url, picture(140, 140, 7), picture(112, 224, 8))]


class Background:
    """A call in a thread; `result` waits for it."""

    def __init__(self, call: Callable[[], Answer]) -> None:
        self._answers: list[Answer] = []
        self._thread = threading.Thread(target=lambda: self._answers.append(call()))
        self._thread.start()

    def result(self) -> Answer:
        self._thread.join()
        return self._answers[0]
