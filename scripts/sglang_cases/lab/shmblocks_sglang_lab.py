"""A second plug-in beside ours, for the cases: it writes down what is sent and received, and at
named points it kills, waits or raises.

SHMBLOCKS_LAB is a folder. `faults` in it has lines `POINT: [once] ACTION`, read at every point:

    kill, raise, sleep SECONDS, yes, rank N     (`once`: the line is taken out first)

    point      where
    send       the encoder has an embedding to send          bytes      yes: no handles
    reserved   blocks are reserved, nothing is copied        copied     copied, not published
    published  published and announced, no message is sent   sent       the message is sent
    extract    a rank has the message, and no lease          opened     it has the lease
    attach     rank N does not attach                        protocol   yes: another protocol
    pixels     blocks for pixels are reserved

`trace.PID` gets one JSON line for each event.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import os
import pkgutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = os.environ.get("SHMBLOCKS_LAB", "")


def at(point: str) -> list[str]:
    """Come to a point; the words of an action that is the caller's to do."""
    path = Path(FOLDER, "faults")
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        name, _, action = line.partition(":")
        words = action.split()
        if name.strip() != point or not words:
            continue
        if words[0] == "once":
            path.write_text("\n".join(each for each in lines if each != line))
            words = words[1:]
        if words[0] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if words[0] == "raise":
            raise RuntimeError(f"injected at {point}")
        return words
    return []


def trace(what: str, **more: object) -> None:
    """Write an event down."""
    line = json.dumps({"what": what, "at": time.monotonic_ns(), "pid": os.getpid(), **more})
    with Path(FOLDER, f"trace.{os.getpid()}").open("a") as file:
        file.write(line + "\n")


def digest(tensor: object) -> str:
    """Of a tensor's bytes."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        return ""
    flat = tensor.detach().cpu().contiguous().view(torch.uint8)
    return hashlib.sha1(flat.numpy().tobytes(), usedforsecurity=False).hexdigest()[:12]


def rank() -> int:
    """Which rank of the language model this is."""
    return int(pkgutil.resolve_name("sglang.srt.runtime_context.get_parallel")().tp_rank)


def load() -> None:
    """Put the points into the plug-in's classes."""
    if FOLDER and os.environ.get("SHMBLOCKS_SGLANG_POOL"):
        _watch_encoder()
        _watch_language()
        _watch_pixels()


def _replace(owner: object, name: str, make: Callable[[Any], Callable[..., object]]) -> None:
    """Put `make(what is there)` into its place."""
    old = getattr(owner, name)
    setattr(owner, name, functools.wraps(old)(make(old)))


def _watch_encoder() -> None:
    from shmblocks.pool import BlockPool
    from shmblocks.sglang_plugin import attachment, encoder

    if at("protocol") == ["yes"]:
        attachment.PROTOCOL = "sgl0"
    _replace(encoder.Sender, "send", _send_watched)
    _replace(encoder.Sender, "_claim", _claim_watched)
    _replace(encoder, "fill", lambda old: _then(old, "copied"))
    _replace(BlockPool, "reserve_now", _reserve_watched)


def _send_watched(old: Any) -> Callable[..., object]:
    async def send(sender: Any, original: Any, encoder: Any, embedding: Any, data: Any,
                   *args: Any, **kwargs: Any) -> object:  # fmt: skip
        words = at("send")
        if words[:1] == ["sleep"]:
            await asyncio.sleep(float(words[1]))
        trace("send", rid=data.req_id, sha=digest(data.embedding))
        result = await old(sender, original, encoder, embedding, data, *args, **kwargs)
        at("sent")
        return result

    return send


def _claim_watched(old: Any) -> Callable[..., object]:
    async def claim(sender: Any, data: Any, embedding: Any, url: str) -> object:
        found = None if at("bytes") == ["yes"] else await old(sender, data, embedding, url)
        if found is not None:
            at("published")
        return found

    return claim


def _then(old: Any, point: str) -> Callable[..., object]:
    def call(*args: Any) -> object:
        result = old(*args)
        at(point)
        return result

    return call


def _reserve_watched(old: Any) -> Callable[..., object]:
    def reserve(pool: Any, num_tokens: int, *, req_id: str | None = None) -> object:
        found = old(pool, num_tokens, req_id=req_id)
        at("pixels" if req_id == "pixels" else "reserved")
        return found

    return reserve


def _watch_language() -> None:
    from shmblocks.sglang_plugin.language import Receiver

    _replace(Receiver, "__init__", _init_watched)
    _replace(Receiver, "extract", _extract_watched)
    _replace(Receiver, "give_back_dropped", _give_back_watched)


class NeverAttached:
    """An attachment that never comes."""

    def pool(self) -> None:
        return None

    def look_after(self) -> None:
        return None


def _init_watched(old: Any) -> Callable[..., object]:
    def init(receiver: Any, *args: Any) -> None:
        old(receiver, *args)
        if at("attach") == ["rank", str(rank())]:
            receiver.attachment = NeverAttached()

    return init


def _extract_watched(old: Any) -> Callable[..., object]:
    def extract(receiver: Any, original: Any, request: Any, message: Any, parts: Any) -> None:
        is_handle = isinstance(getattr(message, "shmblocks", None), bytes)
        if is_handle:
            at("extract")
        old(receiver, original, request, message, parts)
        if is_handle:
            at("opened")
        trace("extracted", rid=request.rid, handle=is_handle, rank=rank(),
              sha=digest(message.embedding))  # fmt: skip

    return extract


def _give_back_watched(old: Any) -> Callable[..., object]:
    def give_back(receiver: Any) -> None:
        count = len(receiver._noted)
        old(receiver)
        if count:
            trace("given back", count=count, rank=rank())

    return give_back


def _watch_pixels() -> None:
    from shmblocks.sglang_plugin.pixels import PixelsInPool

    _replace(PixelsInPool, "_put", _put_watched)


def _put_watched(old: Any) -> Callable[..., object]:
    def put(pixels: Any, tensor: Any) -> object:
        handle = old(pixels, tensor)
        trace("pixels", handle=handle is not None)
        return handle

    return put
