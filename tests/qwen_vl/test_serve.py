"""The server as a user starts it: answers, refusals, killed processes under load, both ends."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import urllib.error
import urllib.request

import msgspec
import pytest

from tests.examples.terminal import Terminal
from tests.support.children import wait_until

pytest.importorskip("transformers", reason="the extra `qwen` is not installed")
pytest.importorskip("aiohttp", reason="the extra `qwen` is not installed")

from qwen_vl import chat, load
from qwen_vl.cases import cases
from qwen_vl.halves import Whole
from qwen_vl.models import ModelSettings
from qwen_vl.prompts import Prompt, prompt_of
from qwen_vl.sizes import Family

PROMPTS = cases(shrink=8)


class Server(Terminal):
    """A server of a tiny model on a free port."""

    def __init__(self, name: str, family: Family, *arguments: str) -> None:
        model = ("--family", family, "--size", "tiny", "--name", name, "--port", "0")
        super().__init__("qwen_vl/serve.py", *model, *arguments)

    def __enter__(self) -> Server:
        super().__enter__()
        return self

    def url(self) -> str:
        return self.wait_for("serving on").rpartition(" ")[2]


def post(url: str, body: bytes) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(f"{url}/v1/chat/completions", data=body) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def answer(url: str, prompt: Prompt, count: int) -> list[int]:
    status, data = post(url, chat.body_of(prompt, count, stream=False))
    assert status == 200, data
    tokens = msgspec.json.decode(data)["choices"][0]["message"]["token_ids"]
    return [int(token) for token in tokens]


def pid_of(url: str, process: str) -> int | None:
    with urllib.request.urlopen(f"{url}/health") as response:
        pid = msgspec.json.decode(response.read())["processes"][process]["pid"]
    return None if pid is None else int(pid)


def test_under_load_a_twice_killed_embedding_process_costs_no_wrong_answer_and_no_block(
    pool_name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with Server(pool_name, "qwen2.5-vl") as server:
        url = server.url()
        wishes = argparse.Namespace(
            url=url,
            family="qwen2.5-vl",
            size="tiny",
            device="cpu",
            seed=0,
            clients=8,
            requests=200,
            kills=2,
            tokens=6,
        )
        assert asyncio.run(load.run(wishes)), capsys.readouterr().out
        server.send(signal.SIGTERM)
        assert server.wait() == 0
    assert server.lines[-1] == "serve: ended"
    assert "Traceback" not in server.text
    assert "embedding process killed 2 times" in capsys.readouterr().out


def test_bad_requests_and_a_killed_language_process_leave_the_next_answers_right(
    pool_name: str,
) -> None:
    prompt = PROMPTS["three images"]
    right = [step.token for step in Whole(ModelSettings("qwen3-vl", "tiny")).answer(prompt, 5)]
    with Server(pool_name, "qwen3-vl", "--way", "landing", "--readers", "1") as server:
        url = server.url()
        assert answer(url, prompt, 5) == right
        too_long = prompt_of("x" * 2000)
        for body, words in (
            (b"{}", b"messages"),
            (chat.body_of(too_long, 1, stream=True), b"more than the pool's 1024"),
        ):
            status, data = post(url, body)
            assert status == 400
            assert words in data
        killed = pid_of(url, "language 0")
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: pid_of(url, "language 0") != killed, "its death is seen")
        assert answer(url, prompt, 5) == right  # it waits for the next one
        server.press_ctrl_c()
        assert server.wait() == 0
    assert server.lines[-1] == "serve: ended"
    assert "Traceback" not in server.text
