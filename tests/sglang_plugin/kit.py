"""A SGLang of the size of a test: the classes that the plug-in hooks, with what it reads of them.

`modules()` are its modules by name; `installed` puts them where Python finds them. The registry
applies hooks the way SGLang's does, as wrappers with the hook in their closure. The "wire" is a
list of messages as SGLang would send them: without what begins with "_", the embedding's bytes
apart.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import enum
import functools
import pkgutil
import sys
import types
from collections.abc import Awaitable, Callable, Iterator
from typing import NamedTuple

import torch

from shmblocks import BlockPool
from shmblocks.sglang_plugin.attachment import Attachment
from shmblocks.sglang_plugin.encoder import Sender
from shmblocks.sglang_plugin.language import Receiver
from shmblocks.sglang_plugin.process import Counters, process
from shmblocks.sglang_plugin.settings import Settings

MiB = 1 << 20
# Small enough that a test fills it: 64 blocks of 64 KiB.
POOL_BYTES = 4 * MiB


def settings(name: str, **more: object) -> Settings:
    return Settings(name, pool_bytes=POOL_BYTES, min_bytes=0)._replace(**more)  # type: ignore[arg-type]


def tensor(rows: int = 40, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """An embedding of 3584 columns; 40 rows of bf16 are 287 KB: 5 blocks."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3584, generator=generator).to(dtype)


class EmbeddingData:
    """As SGLang's."""

    def __init__(self, req_id: str, embedding: torch.Tensor | None, error_msg: str | None = None):
        self.req_id = req_id
        self.embedding = embedding
        self.error_msg = error_msg
        self.dtype = None if embedding is None else embedding.dtype
        self.shape = None if embedding is None else list(embedding.shape)
        self._mr_ptr = None

    def copy_without_embedding(self) -> EmbeddingData:
        new = EmbeddingData(self.req_id, None, self.error_msg)
        for name, value in vars(self).items():
            if not name.startswith("_") and name != "embedding":
                setattr(new, name, value)
        return new


class ReqState:
    def __init__(self, embedding_data: EmbeddingData | None) -> None:
        self.embedding_data = embedding_data


class Wired(NamedTuple):
    """One message on the wire."""

    url: str
    message: EmbeddingData
    frame: bytes


class MMEncoder:
    rank = 0
    transfer_backend = "zmq_to_scheduler"

    def __init__(self, server_args: object = None) -> None:
        self.wire: list[Wired] = []
        self.fails = False

    async def _send(
        self,
        embedding: torch.Tensor,
        mm_data: EmbeddingData,
        session_id: object = None,
        buffer_address: object = None,
        prefill_host: object = None,
        embedding_port: object = None,
        url: str | None = None,
    ) -> None:
        await asyncio.sleep(0)
        if self.fails:
            raise ConnectionError("nobody is there")
        # SGLang sends its attribute, and not its argument.
        real = mm_data.embedding
        if real is not None:
            real = real.cpu().contiguous()
        frame = b"" if real is None else real.view(torch.uint8).numpy().tobytes()
        self.wire.append(Wired(url or "", copy.deepcopy(mm_data.copy_without_embedding()), frame))

    async def _compute_direct_embedding(self, ctx: object, *, keep_on_gpu: bool) -> bool:
        return keep_on_gpu


class ZmqDelivery:
    async def release(self, state: ReqState) -> str:
        return "released"


class MultiModalEmbeddingData:
    """Embeddings of one request, one part each."""

    def __init__(self, tensors: list[torch.Tensor | None]) -> None:
        self.embedding_list = tensors
        self.modality_list = ["image"] * len(tensors)
        self.embedding: object = tensors[0] if tensors else None

    def get_embedding(self, is_concat: bool = False) -> dict[str, torch.Tensor]:
        there = [each for each in self.embedding_list if each is not None]
        return {"image": torch.cat(there)}


class Inputs:
    """What the model gets; SGLang's object of that kind lives as long as the request."""

    def __init__(self, embedding: torch.Tensor) -> None:
        self.embedding = embedding


class RecvReq:
    def __init__(self) -> None:
        self.input_ids: object = None
        self.mm_inputs: Inputs | None = None


class WaitingMMRequestBase:
    def __init__(self, rid: str = "r1") -> None:
        self.rid = rid
        self.recv_req = RecvReq()
        self.recv_embedding_data: MultiModalEmbeddingData | None = None
        self.error: Exception | None = None

    def consume(self, message: EmbeddingData, frame: bytes) -> None:
        """As SGLang: what `_extract...` raises fails this request."""
        try:
            self._extract_embedding_from_buffer(message, [b"", frame])
        except Exception as error:  # noqa: BLE001
            self._fail_assemble(error)
            return
        if self.recv_embedding_data is None:
            # The class that the hooks are on.
            self.recv_embedding_data = sys.modules[RECEIVER].MultiModalEmbeddingData([])
        assert self.recv_embedding_data is not None
        self.recv_embedding_data.embedding_list.append(message.embedding)
        self.recv_embedding_data.modality_list.append("image")

    def _extract_embedding_from_buffer(self, recv_obj: EmbeddingData, parts: list[bytes]) -> None:
        raise NotImplementedError

    def _assemble_mm_inputs_from_embeddings(self) -> bool:
        parts = self.recv_embedding_data
        assert parts is not None
        self.recv_req.mm_inputs = Inputs(parts.get_embedding(is_concat=True)["image"])
        return True

    def _fail_assemble(self, error: Exception) -> None:
        self.error = error
        self.release_resources()

    def release_resources(self) -> None:
        """Nothing of SGLang's own here."""


class WaitingZmqRequest(WaitingMMRequestBase):
    def _extract_embedding_from_buffer(self, recv_obj: EmbeddingData, parts: list[bytes]) -> None:
        assert recv_obj.dtype is not None
        assert recv_obj.shape is not None
        flat = torch.frombuffer(bytearray(parts[1]), dtype=recv_obj.dtype)
        recv_obj.embedding = flat.reshape(recv_obj.shape).clone()


def _resolve_embedding_part_request_id(
    embedding_data: EmbeddingData, expected_req_id: str | None = None
) -> str | None:
    return embedding_data.req_id


class MMReceiverBase:
    encoder_transfer_backend = "zmq_to_scheduler"
    hostname = "127.0.0.1"

    def __init__(self, server_args: object = None, scheduler: object = None) -> None:
        self.scheduler_embedding_port: int | None = 5555
        self.waiting_list: list[WaitingZmqRequest] = []
        self.socket: list[Wired] = []

    def _drain_scheduler_embeddings(self) -> None:
        receiver = sys.modules[RECEIVER]
        while self.socket:
            wired = self.socket.pop(0)
            rid = receiver._resolve_embedding_part_request_id(wired.message)
            for request in self.waiting_list:
                if request.rid == rid:
                    request.consume(wired.message, wired.frame)

    def _process_waiting_requests(self, recv_reqs: list[object], waiting_cls: object) -> str:
        if self.waiting_list:
            self._drain_scheduler_embeddings()
        return "done"

    def create_req(self, recv_req: RecvReq) -> object:
        return recv_req.input_ids


class NetworkAddress:
    def __init__(self, host: str, port: int) -> None:
        self._text = f"{host}:{port}"

    def to_host_port_str(self) -> str:
        return self._text


class HookType(enum.Enum):
    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"
    REPLACE = "replace"


class Registered(NamedTuple):
    target: str
    hook: Callable[..., object]
    kind: HookType


class HookRegistry:
    """Takes hooks; `apply` wraps the targets."""

    def __init__(self) -> None:
        self.hooks: list[Registered] = []

    def register(self, target: str, hook: Callable[..., object], hook_type: HookType) -> None:
        self.hooks.append(Registered(target, hook, hook_type))

    def apply(self, *left_out: str) -> None:
        for target, hook, kind in self.hooks:
            parent, _, name = target.rpartition(".")
            if name in left_out:
                continue
            owner = pkgutil.resolve_name(parent)
            original = getattr(owner, name)
            setattr(owner, name, hook if kind is HookType.REPLACE else wrap(original, hook, kind))


def wrap(
    original: Callable[..., object], hook: Callable[..., object], kind: HookType
) -> Callable[..., object]:
    """As SGLang's registry does it."""

    @functools.wraps(original)
    def wrapper(*args: object, **kwargs: object) -> object:
        if kind is HookType.AROUND:
            return hook(original, *args, **kwargs)
        if kind is HookType.BEFORE:
            hook(*args, **kwargs)
            return original(*args, **kwargs)
        result = original(*args, **kwargs)
        hook(result, *args, **kwargs)
        return result

    return wrapper


SERVER = "sglang.srt.disaggregation.encoder.server"
RECEIVER = "sglang.srt.disaggregation.encoder.receiver"


def fresh(cls: type) -> type:
    """A class of its own for each test, since hooks change it."""
    return type(cls.__name__, cls.__bases__, members(cls))


def members(cls: type) -> dict[str, object]:
    return {name: value for name, value in vars(cls).items() if name not in _OF_ITS_OWN}


_OF_ITS_OWN = ("__dict__", "__weakref__")


def modules() -> dict[str, types.ModuleType]:
    """The modules of a SGLang that nobody has hooked yet."""
    names = [
        "sglang", "sglang.srt", "sglang.srt.plugins", "sglang.srt.plugins.hook_registry",
        "sglang.srt.disaggregation", "sglang.srt.disaggregation.encoder", SERVER, RECEIVER,
        "sglang.srt.utils", "sglang.srt.utils.network", "sglang.srt.managers",
        "sglang.srt.managers.mm_utils", "sglang.srt.mem_cache",
        "sglang.srt.mem_cache.embedding_store", "sglang.srt.runtime_context",
    ]  # fmt: skip
    made = {name: types.ModuleType(name) for name in names}
    for name, module in made.items():
        vars(module)["__path__"] = []
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, module)
    base = fresh(WaitingMMRequestBase)
    zmq = type("WaitingZmqRequest", (base,), members(WaitingZmqRequest))
    vars(made[SERVER]).update(MMEncoder=fresh(MMEncoder), ZmqDelivery=fresh(ZmqDelivery))
    vars(made[RECEIVER]).update(
        EmbeddingData=fresh(EmbeddingData),
        MMReceiverBase=fresh(MMReceiverBase),
        MultiModalEmbeddingData=fresh(MultiModalEmbeddingData),
        WaitingMMRequestBase=base,
        WaitingZmqRequest=zmq,
        _resolve_embedding_part_request_id=_resolve_embedding_part_request_id,
    )
    made["sglang.srt.utils.network"].NetworkAddress = NetworkAddress  # type: ignore[attr-defined]
    vars(made["sglang.srt.plugins.hook_registry"]).update(
        HookRegistry=HookRegistry(), HookType=HookType
    )
    return made


@contextlib.contextmanager
def installed() -> Iterator[dict[str, types.ModuleType]]:
    """A SGLang that Python finds, and a process that has nothing yet."""
    made = modules()
    before = {name: sys.modules.get(name) for name in made}
    sys.modules.update(made)
    old = (Sender.active, Receiver.active, process.counters)
    Sender.active, Receiver.active, process.counters = None, None, Counters()
    try:
        yield made
    finally:
        for attachment in attachments():
            attachment.close()
        Sender.active, Receiver.active, process.counters = old
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def attachments() -> list[Attachment]:
    """Of the process."""
    parts = (Sender.active, Receiver.active)
    return [part.attachment for part in parts if part is not None]


@contextlib.contextmanager
def sender(name: str, **more: object) -> Iterator[Sender]:
    """A sender that is attached."""
    made = Sender(settings(name, **more))
    assert made.attachment.pool() is not None
    try:
        yield made
    finally:
        made.attachment.close()


@contextlib.contextmanager
def receiver(name: str, endpoint: str, **more: object) -> Iterator[Receiver]:
    """A receiver that is attached, by an attachment of its own."""
    made = Receiver(settings(name, **more), endpoint)
    assert made.attachment.pool() is not None
    try:
        yield made
    finally:
        made.attachment.close()


def pool_of(part: Sender | Receiver) -> BlockPool:
    pool = part.attachment.pool()
    assert pool is not None
    return pool


def send(made: Sender, target: MMEncoder, data: EmbeddingData, url: str) -> object:
    """One `_send` through the hook's own code."""
    return asyncio.run(_send(made, target, data, url))


async def _send(made: Sender, target: MMEncoder, data: EmbeddingData, url: str) -> object:
    original: Callable[..., Awaitable[object]] = MMEncoder._send
    return await made.send(original, target, data.embedding, data, url=url)


def blocks(part: Sender | Receiver) -> list[str]:
    """What is in the pool, and that it is right."""
    pool = pool_of(part)
    assert pool.check() == []
    return [
        f"{info.state}: {', '.join(sorted(lease.kind for lease in info.leases))}"
        for info in pool.allocations()
    ]
