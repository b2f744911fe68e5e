"""The encoder's side: each embedding once into the pool, each attached rank a handle.

A publication is held by a lease of the encoder's own, until SGLang releases the request, or drops
the object that holds the embedding. So ranks may register one after the other, and none of them
can free the blocks before the next is announced.

    1  reserve, copy, publish to myself, open      the encoder's death gives it back
    2  add_reader(the rank)                        its claim, and nobody else's
    3  the message with the handle                 failed: forgo the rank's claim
    4  release of the request                      my lease ends; the ranks' go on
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

from shmblocks._state.info import ParticipantId
from shmblocks.cache import ROW_BYTES
from shmblocks.errors import ShmBlocksError
from shmblocks.handle import BlockHandle
from shmblocks.lease import Lease
from shmblocks.pool import BlockPool
from shmblocks.sglang_plugin.attachment import Attachment, role_of
from shmblocks.sglang_plugin.gpu import fill, mark_ready
from shmblocks.sglang_plugin.hooks import SERVER, Hook, are_in_place
from shmblocks.sglang_plugin.process import logger, process
from shmblocks.sglang_plugin.settings import LOCK_TIMEOUT, Settings, read_settings

if TYPE_CHECKING:
    import torch

# The attribute of a message that carries a handle. No embedding can look like it, SGLang copies
# attributes that it does not know, and its unpickler takes bytes.
HANDLE = "shmblocks"
# Where an embedding's offer hangs; SGLang leaves out what begins with "_" when it sends.
_OFFER = "_shmblocks_offer"
# Bytes from which a copy runs in a thread. Smaller: a thread for copies that take less than a
# millisecond. Larger: the encoder's event loop stands still longer (some 5 ms for 32 MB).
COPY_IN_THREAD = 32 << 20


class EmbeddingData(Protocol):
    """What is read of SGLang's class of that name."""

    req_id: str
    embedding: torch.Tensor | None
    error_msg: str | None


class RequestState(Protocol):
    """What is read of SGLang's `ReqState`."""

    embedding_data: EmbeddingData | None


class Encoder(Protocol):
    """What is read of SGLang's `MMEncoder`."""

    rank: int
    transfer_backend: str


Send = Callable[..., Awaitable[object]]


class Offer:
    """What became of one embedding: not tried yet, in the pool (`lease`), or to go as bytes."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.is_tried = False
        self.lease: Lease | None = None


class Claim(NamedTuple):
    """One rank's claim on a publication."""

    pool: BlockPool
    handle: BlockHandle
    reader: ParticipantId


class Sender:
    """Puts embeddings into the pool and hands out claims. A process of SGLang has one at most."""

    active: ClassVar[Sender | None] = None

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.attachment = Attachment(settings, "sglang encoder")
        self._readers: dict[str, ParticipantId] = {}

    async def send(
        self,
        original: Send,
        encoder: Encoder,
        embedding: object,
        mm_data: EmbeddingData,
        /,
        *args: object,
        **kwargs: object,
    ) -> object:
        """`MMEncoder._send`, with a handle instead of the bytes where that is possible."""
        url = kwargs.get("url")
        claim = None
        if isinstance(url, str) and mm_data.error_msg is None and mm_data.embedding is not None:
            with process.guarded(f"{mm_data.req_id} goes as bytes"):
                claim = await self._claim(mm_data, mm_data.embedding, url)
            process.counters.bytes += claim is None
        if claim is None:
            return await original(encoder, embedding, mm_data, *args, **kwargs)
        # SGLang sends the attributes of this object without its embedding, and the embedding's
        # bytes behind them; dtype and shape stay those of the real tensor.
        message = copy.copy(mm_data)
        setattr(message, HANDLE, claim.handle.encode())
        message.embedding = _one_byte()
        try:
            result = await original(encoder, message.embedding, message, *args, **kwargs)
        except BaseException:
            self._forgo(claim)
            raise
        process.counters.handles += 1
        return result

    async def _claim(
        self, mm_data: EmbeddingData, embedding: torch.Tensor, url: str
    ) -> Claim | None:
        pool = self.attachment.pool()
        if pool is None:
            return None
        if embedding.nbytes < self.settings.min_bytes:
            process.counters.small += 1
            return None
        with pool.lock_timeout(LOCK_TIMEOUT):
            reader = self._reader(pool, url)
        if reader is None:
            process.counters.not_attached += 1
            return None
        lease = await self._offered(pool, mm_data, embedding)
        if lease is None:
            return None
        with pool.lock_timeout(LOCK_TIMEOUT):
            pool.add_reader(lease.handle, reader)
        return Claim(pool, lease.handle, reader)

    def _reader(self, pool: BlockPool, url: str) -> ParticipantId | None:
        known = self._readers.get(url)
        if known is not None and pool.is_alive(known):
            return known
        self._readers.pop(url, None)
        found = pool.find_participant(role_of(url))
        if found is not None:
            self._readers[url] = found
        return found

    async def _offered(
        self, pool: BlockPool, mm_data: EmbeddingData, embedding: torch.Tensor
    ) -> Lease | None:
        """The encoder's own lease on this embedding, which is copied into the pool the first time;
        None: it was no success then."""
        offer: Offer = vars(mm_data).setdefault(_OFFER, Offer())
        async with offer.lock:
            if not offer.is_tried:
                # Before the copy: cancelled in it, the thread goes on, and nobody starts another.
                offer.is_tried = True
                ready = mark_ready(embedding)
                arguments = (pool, mm_data, embedding, offer, ready)
                if ready is not None or embedding.nbytes >= COPY_IN_THREAD:
                    await asyncio.to_thread(self.publish, *arguments)
                else:
                    self.publish(*arguments)
        return offer.lease

    def publish(
        self,
        pool: BlockPool,
        mm_data: EmbeddingData,
        embedding: torch.Tensor,
        offer: Offer,
        ready: object,
    ) -> None:
        """Copy an embedding into the pool and hold it there; with no free blocks: nothing.

        `ready`: what the GPU has to come to before the embedding is there (None: it is there).
        """
        rows = -(-embedding.nbytes // ROW_BYTES)
        if pool.config.blocks_for(rows) > pool.config.total_blocks or pool.participant is None:
            process.counters.full += 1
            return
        with pool.lock_timeout(LOCK_TIMEOUT):
            reservation = pool.reserve_now(rows, req_id=mm_data.req_id)
            if reservation is None:
                process.counters.full += 1
                return
            with reservation:
                fill(reservation.tensor(embedding.dtype, embedding.shape), embedding, ready)
                handle = reservation.publish(readers=[pool.participant])
            lease = pool.open(handle)
            lease.end_with(mm_data)
            offer.lease = lease

    def _forgo(self, claim: Claim) -> None:
        with process.guarded("the claim of a message that was not sent comes back later"):
            try:
                with claim.pool.lock_timeout(LOCK_TIMEOUT):
                    claim.pool.forgo(claim.handle, reader=claim.reader)
            except ShmBlocksError as error:
                # The message came through all the same, or the rank has died since.
                logger.info("shmblocks: %s", error)

    def release(self, mm_data: EmbeddingData) -> None:
        """SGLang is through with an embedding."""
        offer: Offer | None = vars(mm_data).get(_OFFER)
        if offer is not None and offer.lease is not None:
            offer.lease.release()
        self.attachment.look_after()


def _one_byte() -> torch.Tensor:
    import torch

    return torch.zeros(1, dtype=torch.uint8)


# ---- hooks ---------------------------------------------------------------------------------------
# The first arguments by position only: SGLang's own keywords may have any name.


def after_init(result: object, encoder: Encoder, /, *args: object, **kwargs: object) -> None:
    """After `MMEncoder.__init__`: rank 0 is who sends."""
    with process.guarded("not used, embeddings go as bytes"):
        settings = read_settings()
        if settings is None or encoder.rank != 0 or encoder.transfer_backend != "zmq_to_scheduler":
            return
        if are_in_place(HOOKS):
            Sender.active = Sender(settings)
            Sender.active.attachment.pool()


def around_send(
    original: Send,
    encoder: Encoder,
    embedding: object,
    mm_data: EmbeddingData,
    /,
    *args: object,
    **kwargs: object,
) -> Awaitable[object]:
    """Around `MMEncoder._send`, a coroutine function."""
    sender = Sender.active
    if sender is None:
        return original(encoder, embedding, mm_data, *args, **kwargs)
    return sender.send(original, encoder, embedding, mm_data, *args, **kwargs)


async def around_release(original: Send, delivery: object, state: RequestState) -> object:
    """Around `ZmqDelivery.release`."""
    mm_data = state.embedding_data
    try:
        return await original(delivery, state)
    finally:
        if Sender.active is not None and mm_data is not None:
            with process.guarded("an embedding comes back when its object is collected"):
                Sender.active.release(mm_data)


async def around_compute(
    original: Send, encoder: Encoder, ctx: object, /, *, keep_on_gpu: bool
) -> object:
    """Around `MMEncoder._compute_direct_embedding`: leave it on the GPU, for `fill`.

    Only with PIN. What goes as bytes is brought to the CPU by SGLang when it is sent.
    """
    sender = Sender.active
    modality = getattr(getattr(ctx, "modality", None), "name", "")
    keeps = (
        sender is not None
        and sender.settings.pin
        # Of videos SGLang encodes the sound on the way to the CPU.
        and modality == "IMAGE"
        and not getattr(ctx, "is_health_check", False)
    )
    return await original(encoder, ctx, keep_on_gpu=keep_on_gpu or keeps)


HOOKS = (
    Hook(SERVER + "MMEncoder.__init__", after_init, "AFTER", ("self", "server_args")),
    Hook(
        SERVER + "MMEncoder._send",
        around_send,
        "AROUND",
        ("self", "embedding", "mm_data", "session_id", "buffer_address", "prefill_host",
         "embedding_port", "url"),
    ),
    Hook(SERVER + "ZmqDelivery.release", around_release, "AROUND", ("self", "state")),
)  # fmt: skip


GPU_HOOKS = (
    Hook(
        SERVER + "MMEncoder._compute_direct_embedding",
        around_compute,
        "AROUND",
        ("self", "ctx", "keep_on_gpu"),
    ),
)
