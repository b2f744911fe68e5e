"""The messages between the launcher and its processes, over one pipe for each process.

    launcher --Embed, Withdraw-----> embedding process --Crossed, Sent, Refused---------> launcher
    launcher --Generate, Withdraw--> language process --Holding, Token, Crossed, Ended--> launcher

They are msgspec structs; nothing is unpickled. Embeddings never pass here, only through the pool.
Times are `time.monotonic_ns()`, one clock for all processes of a machine.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from qwen_vl.prompts import Prompt

# landing  into blocks that the language process reserves before it knows the length
# push     into blocks that the embedding process reserves; read in place
# fan-out  push to all language processes, which read the same blocks
Way = Literal["landing", "push", "fan-out"]


class Embed(msgspec.Struct, frozen=True, tag=True):
    """Compute the embeddings of a prompt, for these language processes."""

    room: int
    prompt: Prompt
    way: Way
    readers: tuple[int, ...]
    is_timed: bool = False  # wait for the GPU before noting a time
    with_digest: bool = False  # of what crosses


class Generate(msgspec.Struct, frozen=True, tag=True):
    """Ask for the embeddings of a room, and generate so many tokens."""

    room: int
    way: Way
    count: int
    is_timed: bool = False
    with_digests: bool = False  # of what crosses, and of each token's logits


class Withdraw(msgspec.Struct, frozen=True, tag=True):
    """The partner in this room is gone: nothing will come, or nothing will be taken."""

    room: int
    reason: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The process has its half of the model."""

    parameters: tuple[str, ...]
    parameter_bytes: int
    own_before: int  # bytes that are this process's alone, before its half was made; see memory.py
    own_after: int


class Sent(msgspec.Struct, frozen=True, tag=True):
    """The embedding process is done with a room."""

    room: int
    started_ns: int
    prepared_ns: int
    ready_ns: int  # the embeddings are in this process's memory: the handoff begins


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The embedding process could not do it; `is_prompt` when the prompt is to blame."""

    room: int
    reason: str
    is_prompt: bool


class Holding(msgspec.Struct, frozen=True, tag=True):
    """A language process holds the embeddings as tensors: the handoff ends."""

    room: int
    at_ns: int
    num_tokens: int
    num_blocks: int
    rounds: int
    num_bytes: int
    is_zero_copy: bool


class Crossed(msgspec.Struct, frozen=True, tag=True):
    """What this process has sent, or was given: its digest differs when any bit does."""

    room: int
    digest: str


class Token(msgspec.Struct, frozen=True, tag=True):
    """The next token of an answer."""

    room: int
    token: int
    digest: str = ""


class Ended(msgspec.Struct, frozen=True, tag=True):
    """A language process is done with a room; `failure` says why, when it has no answer."""

    room: int
    failure: str = ""


FromLauncher = Embed | Generate | Withdraw
ToLauncher = Ready | Sent | Refused | Holding | Crossed | Token | Ended

ENCODER = msgspec.msgpack.Encoder()
FROM_LAUNCHER: msgspec.msgpack.Decoder[FromLauncher] = msgspec.msgpack.Decoder(FromLauncher)
TO_LAUNCHER: msgspec.msgpack.Decoder[ToLauncher] = msgspec.msgpack.Decoder(ToLauncher)
