"""The two kinds of process that the launcher starts.

Each does one thing at a time, reports to the launcher over its pipe, and ends when the launcher
closes that pipe or sends SIGTERM. Whatever else happens to it, the others go on without it.
"""

from __future__ import annotations

import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import FrameType

import torch

from qwen_vl.halves import Embedded, LanguageHalf, VisionHalf, same_arithmetic_everywhere
from qwen_vl.handoff import Asked, EmbeddingEnd, LanguageEnd, Received, Transport
from qwen_vl.memory import own_bytes
from qwen_vl.messages import (
    ENCODER,
    FROM_LAUNCHER,
    Crossed,
    Embed,
    Ended,
    Generate,
    Holding,
    Ready,
    Refused,
    Sent,
    Token,
    ToLauncher,
    Withdraw,
)
from qwen_vl.models import ModelSettings, parameter_bytes
from qwen_vl.prompts import PromptError
from shmblocks import ShmBlocksError, TransferError

# Seconds between two polls of the launcher, which may have withdrawn what a process waits for.
# Smaller: more wake-ups for nothing. Larger: when its partner died, a process goes on later.
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Setup:
    """What a process of the model is started with."""

    settings: ModelSettings
    transport: Transport


# ---------------------------------------------------------------------------- embedding process


def embedding_process(pipe: Connection[bytes, bytes], setup: Setup) -> None:
    """Holds the vision half; embeds one prompt after the other."""
    with obeying_the_launcher():
        same_arithmetic_everywhere(setup.settings)
        before = own_bytes(setup.settings.device)
        half = VisionHalf(setup.settings)
        launcher = Launcher(pipe, setup.settings.device)
        with setup.transport.embedding_end() as end:
            # Its names are those of the whole model's inner part.
            launcher.report(_ready(half.model, "model.", before, setup))
            while (message := launcher.next()) is not None:
                if isinstance(message, Embed):
                    launcher.report(_embed(half, end, message, launcher))


def _embed(half: VisionHalf, end: EmbeddingEnd, asked: Embed, launcher: Launcher) -> Sent | Refused:
    started = time.monotonic_ns()
    try:
        prepared = half.prepare(asked.prompt)
        prepared_ns = launcher.now(asked.is_timed)
        launcher.refuse_withdrawn(asked.room)
        embedded = half(prepared)
        ready_ns = launcher.now(asked.is_timed)
        _send(end, asked, embedded, launcher)
        if asked.with_digest:
            launcher.report(Crossed(asked.room, embedded.digest))
    except PromptError as error:
        return Refused(asked.room, str(error), is_prompt=True)
    except ShmBlocksError as error:  # a language process died, gave up or was too slow
        return Refused(asked.room, str(error), is_prompt=False)
    return Sent(asked.room, started, prepared_ns, ready_ns)


def _send(end: EmbeddingEnd, asked: Embed, embedded: Embedded, launcher: Launcher) -> None:
    """Hand over, polling the launcher meanwhile: it knows first when a reader has died."""
    launcher.refuse_withdrawn(asked.room)
    sending = end.send(asked.room, embedded, asked.way, asked.readers)
    try:
        while not sending.wait(POLL_SECONDS):
            launcher.refuse_withdrawn(asked.room)
    except BaseException as error:
        with suppress(ShmBlocksError):  # the error of `give_up` is not the cause
            sending.give_up(str(error))
        raise


# ----------------------------------------------------------------------------- language process


def language_process(pipe: Connection[bytes, bytes], setup: Setup, index: int) -> None:
    """Holds the language half; answers one request after the other."""
    with obeying_the_launcher():
        same_arithmetic_everywhere(setup.settings)
        before = own_bytes(setup.settings.device)
        half = LanguageHalf(setup.settings)
        launcher = Launcher(pipe, setup.settings.device)
        with setup.transport.language_end(index) as end:
            launcher.report(_ready(half.model, "", before, setup))
            while (message := launcher.next()) is not None:
                if isinstance(message, Generate):
                    launcher.report(_answer(half, end, message, launcher))


def _answer(half: LanguageHalf, end: LanguageEnd, asked: Generate, launcher: Launcher) -> Ended:
    try:
        with _received(end.ask(asked.room, asked.way), asked, launcher) as received:
            launcher.report(_holding(asked, received, launcher))
            # A digest now would wait for the GPU, and so hide what came too late.
            given = received.embedded.copy() if asked.with_digests else None
            steps = half.generate(received.embedded, asked.count)
            step = next(steps)
        # The prompt has been read: its blocks are free for the next one while this one goes on.
        launcher.report(Token(asked.room, step.token, step.digest if asked.with_digests else ""))
        if given is not None:
            launcher.report(Crossed(asked.room, given.digest))
        for step in steps:
            launcher.report(
                Token(asked.room, step.token, step.digest if asked.with_digests else "")
            )
    except ShmBlocksError as error:
        return Ended(asked.room, failure=str(error))
    return Ended(asked.room)


def _received(room: Asked, asked: Generate, launcher: Launcher) -> AbstractContextManager[Received]:
    """Wait for the embeddings, polling the launcher: it knows first that none will come."""
    while (received := room.wait(POLL_SECONDS)) is None:
        reason = launcher.withdrawn(asked.room)
        if reason is not None:
            room.give_up(reason)
            raise TransferError(reason)
    return received


def _holding(asked: Generate, received: Received, launcher: Launcher) -> Holding:
    return Holding(
        room=asked.room,
        at_ns=launcher.now(asked.is_timed),
        num_tokens=received.embedded.num_tokens,
        num_blocks=received.num_blocks,
        rounds=received.rounds,
        num_bytes=received.num_bytes,
        is_zero_copy=received.is_zero_copy,
    )


# ------------------------------------------------------------------------------ what both have


def _ready(model: torch.nn.Module, prefix: str, before: int, setup: Setup) -> Ready:
    names = tuple(prefix + name for name, _ in model.named_parameters())
    return Ready(names, parameter_bytes(model), before, own_bytes(setup.settings.device))


class Launcher:
    """The launcher, as its child sees it."""

    def __init__(self, pipe: Connection[bytes, bytes], device: str) -> None:
        self._pipe, self._device = pipe, device
        self._later: deque[Embed | Generate] = deque()
        self._withdrawn: dict[int, str] = {}  # room -> why

    def report(self, message: ToLauncher) -> None:
        """Send a message; without a launcher there is no work left, so end."""
        try:
            self._pipe.send_bytes(ENCODER.encode(message))
        except BrokenPipeError:
            sys.exit("the launcher is gone")

    def next(self) -> Embed | Generate | None:
        """What to do next; None when the launcher has closed the pipe, or is gone."""
        while not self._later:
            if not self._read():
                return None
        message = self._later.popleft()
        # Room numbers only go up: every room before this one has ended.
        self._withdrawn = {r: why for r, why in self._withdrawn.items() if r >= message.room}
        return message

    def withdrawn(self, room: int) -> str | None:
        """Why nothing comes for this room, if the launcher says so. Does not block."""
        while self._pipe.poll():
            if not self._read():
                return "the launcher is gone"
        return self._withdrawn.get(room)

    def refuse_withdrawn(self, room: int) -> None:
        """`TransferError` with the reason when this room was withdrawn."""
        reason = self.withdrawn(room)
        if reason is not None:
            raise TransferError(reason)

    def _read(self) -> bool:
        """Take in the next message; False when there will be none."""
        try:
            message = FROM_LAUNCHER.decode(self._pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            return False
        if isinstance(message, Withdraw):
            self._withdrawn[message.room] = message.reason
        else:
            self._later.append(message)
        return True

    def now(self, is_timed: bool) -> int:
        """The time; when it is to be measured, after what was given to the GPU is done."""
        if is_timed and self._device != "cpu":
            torch.cuda.synchronize(self._device)
        return time.monotonic_ns()


@contextmanager
def obeying_the_launcher() -> Iterator[None]:
    """End when the launcher says so, and only then.

    Ctrl-C reaches every process of the terminal at once; the launcher alone acts on it. Its
    SIGTERM becomes SystemExit, once, so that every `with` closes what it opened. The launcher
    started this process with both signals blocked, so none could come earlier.
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
