"""The bodies of /v1/chat/completions, as far as they are served here: in, out, and streamed.

    {"messages": [{"role": "user", "content": [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,..."}},
        {"type": "video", "video": ["data:image/jpeg;base64,...", ...], "fps": 2.0}]}],
     "max_tokens": 16, "stream": true}

Images and frames are data URLs; nothing is fetched. The models have learned nothing, so an answer
carries its token ids beside the text.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from qwen_vl.prompts import Image, Prompt, PromptError, Text, Video

MOST_TOKENS = 1024  # of an answer


class TextItem(msgspec.Struct, tag="text", tag_field="type"):
    text: str


class Url(msgspec.Struct):
    url: str


class ImageItem(msgspec.Struct, tag="image_url", tag_field="type"):
    image_url: Url


class VideoItem(msgspec.Struct, tag="video", tag_field="type"):
    video: list[str]
    fps: float = 2.0


class Message(msgspec.Struct):
    role: Literal["user"]
    content: str | list[TextItem | ImageItem | VideoItem]


class Body(msgspec.Struct):
    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=MOST_TOKENS)] = 16
    stream: bool = False
    model: str = ""  # there is one only


@dataclass(frozen=True)
class Wish:
    """What a body asks for."""

    prompt: Prompt
    count: int
    is_streamed: bool


def parse(data: bytes) -> Wish:
    """A body's wish; `PromptError` says what is wrong with it."""
    try:
        body = msgspec.json.decode(data, type=Body)
    except msgspec.DecodeError as error:
        raise PromptError(f"body: {error}") from error
    parts: list[Text | Image | Video] = []
    for message in body.messages:
        if isinstance(message.content, str):
            parts.append(Text(message.content))
        else:
            parts += [_part(item) for item in message.content]
    return Wish(Prompt(tuple(parts)), body.max_tokens, body.stream)


def body_of(prompt: Prompt, count: int, *, stream: bool) -> bytes:
    """The other way round, for clients."""
    content = [_item(part) for part in prompt.parts]
    message = {"role": "user", "content": content}
    return json.dumps({"messages": [message], "max_tokens": count, "stream": stream}).encode()


def chunk(text: str, tokens: Sequence[int], *, is_last: bool = False) -> dict[str, object]:
    """One streamed piece of an answer."""
    choice = {
        "index": 0,
        "delta": {"content": text, "token_ids": list(tokens)},
        "finish_reason": "length" if is_last else None,
    }
    return {"object": "chat.completion.chunk", "choices": [choice]}


def completion(text: str, tokens: Sequence[int]) -> dict[str, object]:
    """A whole answer."""
    message = {"role": "assistant", "content": text, "token_ids": list(tokens)}
    choice = {"index": 0, "message": message, "finish_reason": "length"}
    return {"object": "chat.completion", "choices": [choice]}


def error_of(message: str, kind: str) -> dict[str, object]:
    """What is sent instead of an answer, or behind a part of one."""
    return {"error": {"message": message, "type": kind}}


def _part(item: TextItem | ImageItem | VideoItem) -> Text | Image | Video:
    if isinstance(item, TextItem):
        return Text(item.text)
    if isinstance(item, ImageItem):
        return Image(_bytes(item.image_url.url))
    return Video(tuple(_bytes(url) for url in item.video), item.fps)


def _bytes(url: str) -> bytes:
    start, comma, data = url.partition(",")
    if not comma or not start.startswith("data:") or not start.endswith(";base64"):
        raise PromptError(f"image: expected a URL data:...;base64,..., got {url[:40]!r}")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise PromptError(f"image: its base64 is damaged ({error})") from error


def _url(data: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def _item(part: Text | Image | Video) -> dict[str, object]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    if isinstance(part, Image):
        return {"type": "image_url", "image_url": {"url": _url(part.data)}}
    return {"type": "video", "video": [_url(frame) for frame in part.frames], "fps": part.fps}
