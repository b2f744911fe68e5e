"""The side of one rank of the language model: handles become tensors, and their leases end.

A rank opens what was announced to it on the scheduler's own thread, so that each call waits for the
pool's lock only for a moment; failing that the request fails, and the scheduler goes on.

    a message comes        its handle is noted (`note`)
    SGLang extracts it     opened; the lease hangs at SGLang's request
    SGLang drops it        noted and not opened: the claim goes back
    SGLang assembles       its copy is made (or, with VIEW, none): the leases end
    failed, aborted        the leases end
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable, MutableSequence, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from shmblocks.errors import ShmBlocksError
from shmblocks.handle import BlockHandle
from shmblocks.lease import Lease
from shmblocks.sglang_plugin.attachment import Attachment, role_of
from shmblocks.sglang_plugin.encoder import HANDLE
from shmblocks.sglang_plugin.hooks import RECEIVER, Hook, address, are_in_place
from shmblocks.sglang_plugin.process import process
from shmblocks.sglang_plugin.settings import LOCK_TIMEOUT, Settings, read_settings

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("shmblocks.sglang")

_LEASES = "_shmblocks_leases"
_IS_VIEWED = "_shmblocks_is_viewed"
# Seconds for which the socket is read after a request has ended, though nothing waits: SGLang reads
# it only while requests wait, so that what comes for an aborted one would keep its blocks. Smaller:
# a slow encoder's embedding keeps them until the next request, or `unclaimed_timeout`.
DRAIN_AFTER = 60.0


class Message(Protocol):
    """What is read of SGLang's `EmbeddingData`, as it came."""

    embedding: torch.Tensor | None
    dtype: torch.dtype
    shape: Sequence[int]


class Parts(Protocol):
    """What is read of SGLang's `MultiModalEmbeddingData`."""

    embedding: object
    embedding_list: MutableSequence[torch.Tensor | None]
    modality_list: Sequence[object]


class Answer(Protocol):
    """What is read of SGLang's `TokenizedGenerateReqInput`."""

    input_ids: object
    mm_inputs: object


class Waiting(Protocol):
    """What is used of SGLang's `WaitingZmqRequest`."""

    recv_embedding_data: Parts | None
    recv_req: Answer

    def _fail_assemble(self, error: Exception) -> None: ...


class SchedulerSide(Protocol):
    """What is used of SGLang's `MMReceiverBase`."""

    encoder_transfer_backend: str
    scheduler_embedding_port: int | None
    hostname: str
    waiting_list: Sequence[object]

    def _drain_scheduler_embeddings(self) -> None: ...


class Receiver:
    """Opens what was announced to this rank. A process of SGLang has one at most."""

    active: ClassVar[Receiver | None] = None

    def __init__(self, settings: Settings, endpoint: str) -> None:
        """`endpoint`: `host:port` of the socket that encoders send to."""
        self.settings = settings
        self.attachment = Attachment(settings, role_of(endpoint))
        # Handles of messages that SGLang has looked at and not extracted.
        self._noted: dict[bytes, None] = {}
        self.drain_until = 0.0

    def note(self, message: object) -> None:
        """SGLang looks at a message."""
        data = getattr(message, HANDLE, None)
        if isinstance(data, bytes):
            self._noted[data] = None

    def give_back_dropped(self) -> None:
        """SGLang has looked at all messages: what it did not extract, it has dropped."""
        pool = self.attachment.pool()
        while self._noted and pool is not None and pool.participant is not None:
            data, _ = self._noted.popitem()
            try:
                with pool.lock_timeout(LOCK_TIMEOUT):
                    pool.forgo(BlockHandle.decode(data), reader=pool.participant)
                process.counters.given_back += 1
            except ShmBlocksError as error:
                logger.info("shmblocks: a message that was dropped: %s", error)

    def extract(self, original: Callable[..., None], request: object, message: Message,
                parts: object) -> None:  # fmt: skip
        """Set the message's embedding: from its handle, or from its bytes as SGLang does.

        What this raises fails the request; SGLang catches it.
        """
        data = getattr(message, HANDLE, None)
        if not isinstance(data, bytes):
            original(request, message, parts)
            return
        self._noted.pop(data, None)
        pool = self.attachment.pool()
        if pool is None:
            raise RuntimeError(
                "shmblocks: a handle came to a process that is not attached to the pool any more"
            )
        with pool.lock_timeout(LOCK_TIMEOUT):
            lease = pool.open(BlockHandle.decode(data))
        leases: list[Lease] = vars(request).setdefault(_LEASES, [])
        leases.append(lease)
        message.embedding = lease.tensor(message.dtype, message.shape)
        process.counters.opened += 1

    def look_after(self, scheduler: SchedulerSide) -> None:
        """Each turn of the scheduler's loop: read the socket of ended requests, reap, report."""
        if not scheduler.waiting_list and time.monotonic() < self.drain_until:
            scheduler._drain_scheduler_embeddings()
        self.attachment.look_after()

    def has_assembled(self, request: Waiting) -> None:
        """SGLang has what it needs of a request's embeddings."""
        parts = request.recv_embedding_data
        if getattr(parts, _IS_VIEWED, False) and request.recv_req.mm_inputs is not None:
            for lease in vars(request).get(_LEASES, ()):
                lease.end_with(request.recv_req.mm_inputs)
            if parts is not None:
                _empty(parts)
        else:
            self.release(request)

    def release(self, request: Waiting) -> None:
        """End the leases of a request; no tensor of it may look at the pool any more."""
        leases: list[Lease] = vars(request).pop(_LEASES, [])
        if leases and request.recv_embedding_data is not None:
            # First: else they would look at what others get.
            _empty(request.recv_embedding_data)
        for lease in leases:
            lease.release()


def _empty(parts: Parts) -> None:
    parts.embedding_list[:] = [None] * len(parts.embedding_list)
    parts.embedding = None


# ---- hooks ---------------------------------------------------------------------------------------
# The first arguments by position only: SGLang's own keywords may have any name.


def after_init(
    result: object, scheduler: SchedulerSide, /, *args: object, **kwargs: object
) -> None:
    """After `MMReceiverBase.__init__`: only in a scheduler, which has a socket of its own."""
    with process.guarded("not used, embeddings come as bytes"):
        settings = read_settings()
        port = scheduler.scheduler_embedding_port
        if (
            settings is None
            or port is None
            or scheduler.encoder_transfer_backend != "zmq_to_scheduler"
        ):
            return
        if are_in_place(HOOKS):
            Receiver.active = Receiver(settings, address(scheduler.hostname, port))
            Receiver.active.attachment.pool()


def around_resolve(
    original: Callable[..., object], message: object, /, *args: object, **kwargs: object
) -> object:
    """Around `_resolve_embedding_part_request_id`, which sees every message."""
    if Receiver.active is not None:
        Receiver.active.note(message)
    return original(message, *args, **kwargs)


def around_drain(original: Callable[..., object], scheduler: SchedulerSide) -> object:
    """Around `MMReceiverBase._drain_scheduler_embeddings`."""
    try:
        return original(scheduler)
    finally:
        if Receiver.active is not None:
            with process.guarded("claims of dropped messages come back later"):
                Receiver.active.give_back_dropped()


def around_process(
    original: Callable[..., object],
    scheduler: SchedulerSide,
    /,
    *args: object,
    **kwargs: object,
) -> object:
    """Around `MMReceiverBase._process_waiting_requests`."""
    result = original(scheduler, *args, **kwargs)
    if Receiver.active is not None:
        with process.guarded("blocks come back later"):
            Receiver.active.look_after(scheduler)
    return result


def around_extract(
    original: Callable[..., None], request: object, message: Message, parts: object
) -> None:
    """Around `WaitingZmqRequest._extract_embedding_from_buffer`."""
    if Receiver.active is None:
        original(request, message, parts)
    else:
        Receiver.active.extract(original, request, message, parts)


def around_get_embedding(
    original: Callable[..., object], parts: Parts, /, is_concat: bool = False
) -> object:
    """Around `MultiModalEmbeddingData.get_embedding`: with VIEW, one part needs no `cat`."""
    receiver = Receiver.active
    if is_concat and receiver is not None and receiver.settings.view:
        tensors: dict[object, list[torch.Tensor]] = {}
        for modality, tensor in zip(parts.modality_list, parts.embedding_list, strict=False):
            if tensor is not None:
                tensors.setdefault(modality, []).append(tensor)
        if all(len(found) == 1 for found in tensors.values()):
            setattr(parts, _IS_VIEWED, True)
            return {modality: found[0] for modality, found in tensors.items()}
    return original(parts, is_concat)


def around_assemble(original: Callable[..., bool], request: Waiting) -> bool:
    """Around `WaitingMMRequestBase._assemble_mm_inputs_from_embeddings`."""
    is_done = original(request)
    if is_done and Receiver.active is not None:
        try:
            Receiver.active.has_assembled(request)
        except Exception as error:
            # SGLang would not catch it here: the scheduler's loop would end.
            logger.exception("shmblocks: a request fails")
            request._fail_assemble(error)
    return is_done


def after_release(result: object, request: Waiting) -> None:
    """After `WaitingMMRequestBase.release_resources`: aborted, failed, too late."""
    if Receiver.active is not None:
        Receiver.active.drain_until = time.monotonic() + DRAIN_AFTER
        with process.guarded("leases of an ended request come back when it is collected"):
            Receiver.active.release(request)


def before_create_req(scheduler: object, request: Answer) -> None:
    """Before `MMReceiverBase.create_req`, with GUARD.

    SGLang 0.5.23: a Qwen-VL request that fails while it waits for its embedding has no `input_ids`
    yet, and answering it ends the scheduler (`len(None)` in `output_streamer.py`).
    """
    if request.input_ids is None:
        request.input_ids = array("q")


HOOKS = (
    Hook(
        RECEIVER + "MMReceiverBase.__init__",
        after_init,
        "AFTER",
        ("self", "server_args"),
    ),
    Hook(
        RECEIVER + "_resolve_embedding_part_request_id",
        around_resolve,
        "AROUND",
        ("embedding_data", "expected_req_id"),
    ),
    Hook(
        RECEIVER + "MMReceiverBase._drain_scheduler_embeddings",
        around_drain,
        "AROUND",
        ("self",),
    ),
    Hook(
        RECEIVER + "MMReceiverBase._process_waiting_requests",
        around_process,
        "AROUND",
        ("self", "recv_reqs", "waiting_cls"),
    ),
    Hook(
        RECEIVER + "WaitingZmqRequest._extract_embedding_from_buffer",
        around_extract,
        "AROUND",
        ("self", "recv_obj", "parts"),
    ),
    Hook(
        RECEIVER + "MultiModalEmbeddingData.get_embedding",
        around_get_embedding,
        "AROUND",
        ("self", "is_concat"),
    ),
    Hook(
        RECEIVER + "WaitingMMRequestBase._assemble_mm_inputs_from_embeddings",
        around_assemble,
        "AROUND",
        ("self",),
    ),
    Hook(
        RECEIVER + "WaitingMMRequestBase.release_resources",
        after_release,
        "AFTER",
        ("self",),
    ),
)


GUARD_HOOKS = (
    Hook(
        RECEIVER + "MMReceiverBase.create_req",
        before_create_req,
        "BEFORE",
        ("self", "recv_req"),
    ),
)
