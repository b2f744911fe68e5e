"""The two kinds of process that launch.py starts, and what they report to the launcher.

    launcher --Job--> embedding process --input_embeddings, fill_ids, mrope_positions--> pool
       |  ^                 |                                                             |
       |  +----Encoded------+                  (handles, over two queues)                 |
       +-----Job----> language process <--------------reads them in place-----------------+
          ^                 |
          +----Answered-----+

Jobs and answers are msgspec messages over a pipe of each child's own; handles go over two queues
between the embedding process and each language process, and the embeddings through the pool only.

What is not here: starting, watching and ending the processes (launch.py).
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.queues import SimpleQueue
from types import FrameType
from typing import Literal

import msgspec
import torch

from _models import LanguageConfig, LanguageModel, VisionConfig, VisionTransformer, token_table
from _photos import Photo, Prompt, load, prompt_about
from shmblocks import BlockHandle, BlockPool, ShmBlocksError
from shmblocks.transfer import EmbeddingEndpoint, LanguageEndpoint

Way = Literal["landing", "push"]
READY = b"ready"  # a child's first message: its models are there


@dataclass(frozen=True)
class Settings:
    """What all processes of a run agree on."""

    pool_name: str
    vision: VisionConfig
    language: LanguageConfig
    seed: int
    new_tokens: int
    timeout: float  # seconds that one process waits for the other within a request


class Job(msgspec.Struct, frozen=True):
    """One request. `reader` is the language process that asks for it."""

    room: int
    photo: Photo
    way: Way
    reader: int


class Encoded(msgspec.Struct, frozen=True):
    """The embedding process is done with a request."""

    room: int
    ready_ns: int  # time.monotonic_ns(), one clock for all processes of a machine
    encode_ms: float


class Answered(msgspec.Struct, frozen=True):
    """A language process is done with a request."""

    room: int
    holding_ns: int
    num_tokens: int
    num_blocks: int
    rounds: int
    num_bytes: int
    is_zero_copy: bool
    answer: Answer


class Answer(msgspec.Struct, frozen=True):
    """What must be the same in every process: the tokens, and the bytes they came from."""

    tokens: tuple[int, ...]
    checksum: int


class Encoder:
    """Photograph -> prompt. In the embedding process and in the one-process reference."""

    def __init__(self, settings: Settings) -> None:
        self._vision = VisionTransformer.seeded(settings.vision, settings.seed)
        self._table = token_table(settings.language, settings.seed + 1)

    def __call__(self, photo: Photo) -> Prompt:
        side = self._vision.config.pixels_per_token
        image = self._vision(load(photo))
        return prompt_about(image, photo.height // side, photo.width // side, self._table)


class Answerer:
    """Embeddings -> tokens. In the language processes and in the one-process reference."""

    def __init__(self, settings: Settings) -> None:
        self._model = LanguageModel.seeded(settings.language, settings.seed + 1)
        self._new_tokens = settings.new_tokens

    def __call__(self, embeddings: torch.Tensor, positions: torch.Tensor, delta: int) -> Answer:
        tokens = self._model.generate(embeddings, positions, delta, self._new_tokens)
        return Answer(tuple(tokens), checksum(embeddings))


def checksum(embeddings: torch.Tensor) -> int:
    """Differs when any bit does, or when two rows changed places."""
    rows = embeddings.view(torch.int16).sum(dim=1, dtype=torch.int64)
    return int((rows * torch.arange(1, len(rows) + 1)).sum())


def same_arithmetic_everywhere() -> None:
    """One thread, hence one order of additions, in every process: bit-equal results."""
    torch.set_num_threads(1)


# ---------------------------------------------------------------------------- embedding process


def embedding_process(
    control: Connection[bytes, bytes],
    settings: Settings,
    queues: list[tuple[SimpleQueue[bytes], SimpleQueue[bytes]]],
) -> None:
    """Encode photographs for all language processes. `queues`: (out, in) for each of them."""
    with obeying_the_launcher(), ExitStack() as stack:
        same_arithmetic_everywhere()
        encode = Encoder(settings)
        pool = stack.enter_context(BlockPool.attach(settings.pool_name, role="embedding"))
        endpoints = [EmbeddingEndpoint(pool, tx, rx) for tx, rx in queues]
        for endpoint in endpoints:
            stack.callback(endpoint.close)
        control.send_bytes(READY)
        while (job := next_job(control)) is not None:
            started = time.perf_counter()
            prompt = encode(job.photo)
            encode_ms = (time.perf_counter() - started) * 1e3

            ready_ns = time.monotonic_ns()  # the handoff begins: see Row.handoff_ms
            with quiet_when_all_end(control):
                hand_over(pool, endpoints[job.reader], job, prompt, settings.timeout)
            report(control, Encoded(job.room, ready_ns, encode_ms))


def hand_over(
    pool: BlockPool, endpoint: EmbeddingEndpoint, job: Job, prompt: Prompt, timeout: float
) -> None:
    """One prompt to the language process, by the way that it asked for."""
    delta, req_id = prompt.mrope_position_delta, job.photo.name
    if job.way == "push":
        handle = write_into_own_blocks(pool, prompt, req_id, timeout)
        sender = endpoint.send_handle(job.room, handle, mrope_position_delta=delta, req_id=req_id)
    else:
        fields = {
            "input_embeddings": prompt.input_embeddings.bfloat16(),
            "fill_ids": prompt.fill_ids,
            "mrope_positions": prompt.mrope_positions,
        }
        sender = endpoint.send(job.room, fields, mrope_position_delta=delta, req_id=req_id)
    sender.wait(timeout)


def write_into_own_blocks(
    pool: BlockPool, prompt: Prompt, req_id: str, timeout: float
) -> BlockHandle:
    """Push: reserve what is needed and write once. Rounding to bf16 is the write.

    (`endpoint.send` would do it too, given a bf16 tensor; this is the way without that tensor.)
    """
    num_tokens = len(prompt.fill_ids)
    handle = pool.alloc(num_tokens, req_id, timeout=timeout)  # waits until enough blocks are free
    if handle is None:
        raise TimeoutError(f"no free blocks for {num_tokens} tokens within {timeout:g} s")
    view = pool.view(handle)
    view["input_embeddings"].copy_(prompt.input_embeddings)
    view["fill_ids"].copy_(prompt.fill_ids)
    view["mrope_positions"].copy_(prompt.mrope_positions)
    return handle


# ----------------------------------------------------------------------------- language process


def language_process(
    control: Connection[bytes, bytes],
    settings: Settings,
    tx: SimpleQueue[bytes],
    rx: SimpleQueue[bytes],
) -> None:
    """Ask for one prompt after the other and generate the tokens that follow it."""
    with obeying_the_launcher(), ExitStack() as stack:
        same_arithmetic_everywhere()
        answer = Answerer(settings)
        pool = stack.enter_context(BlockPool.attach(settings.pool_name, role="language"))
        endpoint = LanguageEndpoint(pool, tx, rx)
        stack.callback(endpoint.close)
        control.send_bytes(READY)
        while (job := next_job(control)) is not None:
            with quiet_when_all_end(control):
                answered = receive(endpoint, job, answer, settings)
            report(control, answered)


def receive(endpoint: LanguageEndpoint, job: Job, answer: Answerer, settings: Settings) -> Answered:
    """One request: ask for the prompt, read it where it lies, release it."""
    receiver = endpoint.receive(job.room, mode=job.way, req_id=job.photo.name)
    with receiver.wait(settings.timeout) as result:
        embeddings = result["input_embeddings"]
        holding_ns = time.monotonic_ns()  # the handoff ends: see Row.handoff_ms
        return Answered(
            room=job.room,
            holding_ns=holding_ns,
            num_tokens=result.num_tokens,
            num_blocks=endpoint.pool.config.blocks_for(result.num_tokens),
            rounds=result.rounds,
            num_bytes=result.num_bytes,
            is_zero_copy=result.is_zero_copy,
            answer=answer(embeddings, result["mrope_positions"], result.mrope_position_delta),
        )


# ------------------------------------------------------------------------------ what both do


@contextmanager
def obeying_the_launcher() -> Iterator[None]:
    """End when the launcher says so, and only then.

    Ctrl-C reaches every process of the terminal at once; the launcher alone acts on it. Its
    SIGTERM becomes SystemExit, once, so that every `with` closes what it opened. The launcher
    started this process with both signals blocked, so none could come before this line.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # we are ending anyway


def _end(signum: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + signum)


def next_job(control: Connection[bytes, bytes]) -> Job | None:
    """The next request; None when the launcher has closed the pipe (or is gone)."""
    try:
        return msgspec.msgpack.decode(control.recv_bytes(), type=Job)
    except (EOFError, ConnectionResetError):
        return None


@contextmanager
def quiet_when_all_end(control: Connection[bytes, bytes]) -> Iterator[None]:
    """A partner that ends before us, because the launcher ends all, is no error of ours."""
    try:
        yield
    except ShmBlocksError:
        while control.poll():
            if next_job(control) is None:
                sys.exit()
        raise


def report(control: Connection[bytes, bytes], done: Encoded | Answered) -> None:
    """Report to the launcher; without one there is no work left, so end."""
    try:
        control.send_bytes(msgspec.msgpack.encode(done))
    except BrokenPipeError:
        sys.exit("the launcher is gone")
