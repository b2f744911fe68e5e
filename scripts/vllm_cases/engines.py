"""Starts engines (`actor.py`), asks them, counts what their connectors tell, and kills them.

It ends only processes that it has started, by their process groups.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

# Seconds. vLLM imports for half a minute on a cold and busy machine. Smaller: a slow machine fails.
START_PATIENCE = 420.0
PATIENCE = 180.0

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
}


class CaseError(Exception):
    """A case does not hold."""


class Engine:
    """One engine in a process of its own."""

    def __init__(self, name: str, settings: dict[str, Any], logs: Path) -> None:
        self.name = name
        self.log = logs / f"{name}.log"
        # What its connector counted, by name; and when a thing was first counted.
        self.counts: Counter[str] = Counter()
        self._results: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._news = threading.Condition()
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm_cases.actor", json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            if not line.startswith("{"):
                continue
            said = json.loads(line)
            with self._news:
                if "event" in said:
                    self.counts[said["event"]] += said["amount"]
                else:
                    self._results.put(said)
                self._news.notify_all()
        self._results.put({"dead": True})

    def result(self, timeout: float = PATIENCE) -> dict[str, Any]:
        """What it says next; `CaseError` when it says nothing in time, dies, or tells an error."""
        try:
            said = self._results.get(timeout=timeout)
        except queue.Empty:
            raise CaseError(f"{self.name} said nothing for {timeout:g} s: see {self.log}") from None
        if "dead" in said or "error" in said:
            why = said.get("error") or f"exit code {self._process.wait()}"
            raise CaseError(f"{self.name} failed ({why}): see {self.log}")
        return said

    def ready(self) -> Engine:
        """Wait until it can be asked."""
        self.result(START_PATIENCE)
        return self

    def send(self, **command: object) -> None:
        """Ask, without waiting for the answer."""
        if self._process.stdin is not None:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()

    def do(self, **command: object) -> dict[str, Any]:
        """Ask, and wait for the answer."""
        self.send(**command)
        return self.result()

    def tokens(self, *names: str, **more: object) -> list[list[int]]:
        """The tokens of its answers about these photographs, one request each."""
        answers = self.do(ask=[[name] for name in names], **more)["answers"]
        return [answer["tokens"] for answer in answers]

    def until(self, event: str, at_least: float = 1, timeout: float = PATIENCE) -> None:
        """Wait until its connector has counted that much."""
        with self._news:
            if not self._news.wait_for(lambda: self.counts[event] >= at_least, timeout):
                raise CaseError(f"{self.name} did not count {event} within {timeout:g} s")

    def counted(self, *names: str) -> dict[str, int]:
        """Some of its counts, as whole numbers."""
        with self._news:
            return {name: int(self.counts[name]) for name in names}

    def kill(self) -> None:
        """SIGKILL, to it and whatever it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(PATIENCE)

    def quit(self) -> None:
        """Let it end in an orderly way."""
        if self._process.poll() is None:
            with contextlib.suppress(BrokenPipeError):
                self.send(quit=True)
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self.kill()
        self._reader.join(PATIENCE)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.quit() if kind is None else self.kill()


def transfer(role: str, pool: str, **extra: object) -> dict[str, Any]:
    """The value of `--ec-transfer-config`."""
    return {
        "ec_connector": "ShmBlocksECConnector",
        "ec_role": role,
        "ec_connector_extra_config": {"pool": pool, "block_bytes": 4096, **extra},
    }


def wait_until(what: str, holds: Any, timeout: float = PATIENCE) -> None:  # noqa: ANN401
    """Poll a function until it is true."""
    end = time.monotonic() + timeout
    while not holds():
        if time.monotonic() > end:
            raise CaseError(f"{what}: not within {timeout:g} s")
        time.sleep(0.02)


def leftovers(prefix: str) -> list[str]:
    """Segments of that prefix in /dev/shm."""
    return sorted(name for name in os.listdir("/dev/shm") if name.startswith(prefix))


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Say how long it took."""
    began = time.monotonic()
    yield
    print(f"    {what}: {time.monotonic() - began:.1f} s", flush=True)
