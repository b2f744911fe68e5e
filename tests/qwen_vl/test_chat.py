"""Bodies of the server: what they mean, and what is said of those that mean nothing."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers", reason="the extra `qwen` is not installed")

from qwen_vl import chat
from qwen_vl.prompts import Image, PromptError, Video, prompt_of

PROMPT = prompt_of("Look: ", Image(b"\xff\xd8 a"), Video((b"one", b"two"), fps=4.0), "What?")


def body_with_image(url: str) -> bytes:
    content = [{"type": "image_url", "image_url": {"url": url}}]
    return json.dumps({"messages": [{"role": "user", "content": content}]}).encode()


def test_a_prompt_comes_through_a_body_unchanged() -> None:
    wish = chat.parse(chat.body_of(PROMPT, 7, stream=True))
    assert wish == chat.Wish(PROMPT, 7, is_streamed=True)


def test_a_message_may_be_a_string() -> None:
    body = {"messages": [{"role": "user", "content": "Hello."}]}
    wish = chat.parse(json.dumps(body).encode())
    assert wish.prompt == prompt_of("Hello.")
    assert not wish.is_streamed


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "truncated"),
        (b'{"messages": []}', "length >= 1"),
        (b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 0}', "int. >= 1"),
        (b'{"messages": [{"role": "robot", "content": "a"}]}', "robot"),
        (body_with_image("http://x/y.png"), "expected a URL data:"),
        (body_with_image("data:image/png;base64,@"), "base64 is damaged"),
    ],
)
def test_a_body_that_cannot_be_used_says_why(body: bytes, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        chat.parse(body)
